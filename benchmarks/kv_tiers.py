"""What do a prefix index and tiers of KV beyond memory save in conversations that share system prompts?

    python benchmarks/kv_tiers.py [--model lab-8m | --shape smollm2-135m --format int4] [--data ../shared/data] [--redis URL] [--json FILE]

Conversations take turns, one request at a time: turn 1 of each, then turn 2 of each, ... A request is a system prompt (one of two, the
beginning of a text of --data), all turns so far with their answers, and the next question of MT-bench. "big": a cache that holds all
conversations; "small": one that holds about one and a half. Each line is a process's life: a new engine, and where it says "restart" the
same folder or server as the line before; "evicted" asks the kernel to forget the files first. Greedy; every line must give the same tokens.

computed: prompt tokens computed, of all. TTFT: from submission to the first token, mean over all requests and over those of the first
turn, in milliseconds. total: seconds for everything, the start of the engine aside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from paceline import LLM, SamplingParams
from paceline.analysis.synthetic import RandomCheckpoint
from paceline.assemble import inspect
from paceline.core.config import EngineConfig
from paceline.llm import make_config

N_SYSTEM = 2
Turns = list[list[int]]


@dataclass(frozen=True)
class Case:
    name: str
    use: tuple[str, ...]
    big: bool = False
    evict: bool = False
    fresh: bool = False


def conversations(data: Path, n: int, n_turns: int, n_system_tokens: int) -> tuple[list[list[int]], list[Turns]]:
    """Token ids of the system prompts, and of each conversation's questions; ids of the embedded tokenizer, which every vocabulary has."""
    with LLM() as lab:
        encode = lab.tokens
        texts = [
            (data / "text" / f"{name}.utf8").read_text(encoding="utf-8")[:40_000] for name in ("technical", "wiki")
        ]
        systems = [encode(text)[:n_system_tokens] for text in texts[:N_SYSTEM]]
        path = data / "prompts" / "spec-decode" / "mt_bench" / "question.jsonl"
        lines = [json.loads(line)["turns"] for line in path.read_text(encoding="utf-8").splitlines()]
        questions = [encode("\n\n" + turn + "\n\n") for turns in lines for turn in turns]
    return systems, [questions[i * n_turns : (i + 1) * n_turns] for i in range(n)]


def run(args: argparse.Namespace, case: Case, systems: list[list[int]], talks: list[Turns]) -> dict[str, Any]:
    n_longest = max(len(systems[0]) + sum(map(len, talk)) + len(talk) * args.answer for talk in talks) + 64
    n_tokens = int(n_longest * (len(talks) + 1 if case.big else 1.5))
    model: Any = RandomCheckpoint(args.shape) if args.shape else args.model
    options: dict[str, Any] = {"format": args.format, "context": n_longest, "use": case.use, "kv_dtype": args.kv_dtype}
    per_token = inspect(model, make_config(EngineConfig(), options)).plan.kv_bytes_per_token
    params = SamplingParams(temperature=0, max_tokens=args.answer, ignore_eos=True)
    first: list[float] = []
    later: list[float] = []
    n_prompt = n_computed = 0
    answers = []
    with LLM(model, **options, kv_memory=n_tokens * (per_token + 256)) as llm:
        tiers = llm.engine.runner.parts.tiers
        if case.fresh and tiers is not None:
            tiers.clear().result()
        llm.generate([1, 2, 3] * 40, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))  # warm
        history = [list(systems[i % len(systems)]) for i in range(len(talks))]
        start = perf_counter()
        for turn in range(len(talks[0])):
            for talk, past in zip(talks, history, strict=True):
                past += talk[turn]
                out = llm.generate([past], params)[0]
                (later if turn else first).append(1000 * out.timing.first_token)
                n_prompt += len(past)
                n_computed += len(past) - out.n_cached
                past += out.token_ids
                answers.append(out.token_ids)
        seconds = perf_counter() - start
        stats = tiers.stats() if tiers is not None else {}
    return {
        "case": case.name, "prompt_tokens": n_prompt, "computed_tokens": n_computed, "seconds": seconds,
        "ttft_ms": float(np.mean(first + later)), "ttft_first_turn_ms": float(np.mean(first)),
        "ttft_later_ms": float(np.mean(later)) if later else None, "kv_bytes_per_token": per_token, "cache_tokens": n_tokens,
        "tiers": stats, "answers": answers,
    }  # fmt: skip


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files' pages, so that they are read from the disk."""
    for path in folder.rglob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cases(folder: Path, redis: str | None) -> list[Case]:
    ram, disk = "kvcache/ram:size_mib=2048", f"kvcache/disk:path={folder}"
    found = [
        Case("nothing kept", ("no:serving/radix",), big=True),
        Case("radix, big cache", (), big=True),
        Case("radix, small cache", ()),
        Case("small cache + ram", (ram,)),
        Case("small cache + disk", (disk,)),
        Case("small cache + disk, restart", (disk,)),
        Case("small cache + disk, restart, evicted", (disk,), evict=True),
        Case("radix, big cache, restart", (), big=True),
        Case("big cache + disk, restart", (disk,), big=True),
    ]
    if redis is not None:
        os.environ["PACELINE_REDIS_URL"] = redis
        found += [
            Case("small cache + redis", ("kvcache/redis",), fresh=True),
            Case("small cache + redis, restart", ("kvcache/redis",)),
        ]
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="lab-8m")
    p.add_argument("--shape", help="random weights in this shape instead")
    p.add_argument("--format", default="auto")
    p.add_argument("--kv-dtype", default="auto")
    p.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    p.add_argument("--conversations", type=int, default=8)
    p.add_argument("--turns", type=int, default=4)
    p.add_argument("--system", type=int, default=600, help="tokens of a system prompt")
    p.add_argument("--answer", type=int, default=24, help="tokens of an answer")
    p.add_argument("--redis", help="URL of a server to include; what Paceline keeps there is deleted first")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    systems, talks = conversations(args.data, args.conversations, args.turns, args.system)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "kv"
        for case in cases(folder, args.redis):
            if case.evict:
                forget(folder)
            r = run(args, case, systems, talks)
            results.append(r)
            same = r["answers"] == results[0]["answers"]
            share = 100 * r["computed_tokens"] / r["prompt_tokens"]
            print(
                f"{case.name:38} computed {r['computed_tokens']:6} of {r['prompt_tokens']:6} ({share:3.0f} %)  TTFT {r['ttft_ms']:7.1f}"
                f"  first turn {r['ttft_first_turn_ms']:7.1f}  total {r['seconds']:6.1f} s  {'' if same else 'OTHER TOKENS'}",
                flush=True,
            )
            for name, t in r["tiers"].get("tiers", {}).items():
                if t["bytes_per_second"]:
                    print(
                        f"{'':40}{name}: {t['n_hits']} hits, {t['bytes_per_second'] / 1e6:.0f} MB/s, {t['n_declined']} declined"
                    )
    all_same = len({json.dumps(r.pop("answers")) for r in results}) == 1
    if args.json:
        args.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(args).items()}, "results": results}, indent=1)
        )
    if not all_same:
        sys.exit("the answers differ")


if __name__ == "__main__":
    main()
