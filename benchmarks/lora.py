"""What adapters cost: prefill and decoding with 0, 1 and 4 LoRA adapters in the batch, against the plain model.

    python benchmarks/lora.py [--shape smollm2-135m ...] [--format int4] [--rank 16] [--batch 1 --batch 8] [--steps 60]
        [--threads 1 --cpu] [--json FILE]

Random weights. Every linear of the layers is adapted. `plain`: nothing is loaded. `0 of 4`: four are loaded, no request names one. `1`: all
sequences share one; `4`: the sequences take them in turn. Prefill is one step over 512 prompt tokens of 4 sequences. Medians of
milliseconds per step (--cpu: of the process's own CPU time, for a machine that is shared; with one thread only). The cases are
measured in turn, round by round, so that a change of the machine's mood meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from paceline.analysis.synthetic import RandomCheckpoint, random_adapter, shape_config
from paceline.core.types import SamplingParams
from paceline.llm import LLM

Clock = Callable[[], float]

CASES = {"plain": 0, "0 of 4": 0, "1": 1, "4": 4}  # adapters that requests name
N_LOADED = 4


def submit(llm: LLM, n: int, n_tokens: int, n_new: int, n_adapters: int, seed: int) -> None:
    """n requests of random tokens, which take the adapters in turn."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True)
    for i in range(n):
        tokens = rng.integers(0, llm.plan.model.n_vocab, n_tokens).tolist()
        llm.submit(tokens, params, adapter=f"a{i % n_adapters}" if n_adapters else "")


def prefill(llm: LLM, n_adapters: int, seed: int, clock: Clock) -> float:
    """Milliseconds of the step that computes 512 tokens."""
    submit(llm, 4, 128, 1, n_adapters, seed)
    start = clock()
    llm.engine.step()
    spent = 1e3 * (clock() - start)
    assert not llm.engine.has_work, "the prompts did not fit one step"
    return spent


def decode(llm: LLM, batch: int, n_adapters: int, steps: int, seed: int, clock: Clock) -> float:
    """Milliseconds of a step, one token for each sequence after a prompt of 32."""
    submit(llm, batch, 32, steps + 4, n_adapters, seed)
    spent = []
    while llm.engine.has_work:
        start = clock()
        llm.engine.step()
        spent.append(1e3 * (clock() - start))
    return statistics.median(spent[2:-1])


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians by kind of step and case."""
    clock = process_time if args.cpu else perf_counter
    llms: dict[str, LLM] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = shape_config(shape)
        paths = [random_adapter(Path(folder) / f"a{i}", config, args.rank, seed=i) for i in range(N_LOADED)]
        options = {
            "format": args.format,
            "context": 2048,
            "kv_memory": 1 << 30,
            "use": ("no:serving/radix",),
            "threads": args.threads,
        }
        options["adapter_dtype"] = args.adapter_dtype
        llms["plain"] = LLM(RandomCheckpoint(shape), **options)
        loaded = LLM(RandomCheckpoint(shape), adapters=[f"a{i}={p}" for i, p in enumerate(paths)], **options)
    found: dict[str, dict[str, list[float]]] = {}
    for round_ in range(args.rounds + 1):
        for case, n in CASES.items():
            llm = llms.get(case, loaded)
            times = {"prefill 512": prefill(llm, n, round_, clock)}
            times |= {f"decode {b}": decode(llm, b, n, args.steps, round_, clock) for b in args.batch if b >= n}
            for kind, ms in times.items() if round_ else ():  # the first round warms up
                found.setdefault(kind, {}).setdefault(case, []).append(ms)
    return {
        "shape": shape,
        "format": args.format,
        "rank": args.rank,
        "adapter_dtype": args.adapter_dtype,
        "adapter_mb": loaded.plan.adapter_bytes / N_LOADED / 1e6,
        "ms": {kind: {case: statistics.median(ms) for case, ms in cases.items()} for kind, cases in found.items()},
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['shape']} {result['format']}, rank {result['rank']}, {result['adapter_mb']:.1f} MB an adapter")
    print(f"{'':14}" + "".join(f"{case:>18}" for case in CASES))
    for kind, ms in result["ms"].items():
        cells = "".join(f"{ms[c]:9.2f} ({ms[c] / ms['plain']:5.3f})" if c in ms else f"{'':18}" for c in CASES)
        print(f"{kind:14}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--adapter-dtype", default="auto", help="float32 as made, or bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    args.batch = args.batch or [1, 4, 8]
    results = []
    for shape in args.shape or ["smollm2-135m", "llama-3.2-1b"]:
        results.append(measure(shape, args))
        show(results[-1])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
