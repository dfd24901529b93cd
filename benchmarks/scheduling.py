"""Policies and step budgets compared on recorded traffic: the real scheduler on a virtual clock (`analysis/simulation.py`).

    python benchmarks/scheduling.py --trace azure_conversation_2023.csv [--cost smollm2-135m-int4] [--load 0.7 --load 1.1] [--json out.json]
    python benchmarks/scheduling.py --pages 120 --use serving/first_come        # short of memory: what is computed twice
    python benchmarks/scheduling.py --engine smollm2-135m --format int4         # the real engine: gaps in streams beside long prompts

--load: arrivals as a share of what the machine takes when all requests are there at once. Times are milliseconds. `goodput` counts requests
that met both targets. `twice`: rows computed again after preemptions, in percent (means nothing with a prefix index). `heavy`, `light`:
median TTFT of two owners, of whom the first sends nine requests in ten.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from paceline import techniques
from paceline.analysis.simulation import Outcome, StepCost, simulate
from paceline.analysis.traffic import Arrival, owned, read_trace, scale, summary
from paceline.core.kvcache import KVCache
from paceline.core.runner import Parts
from paceline.core.scheduler import Limits
from paceline.core.technique import make, parse_use
from paceline.core.types import SamplingParams

# Seconds on two cores of a Xeon with AMX, from `benchmarks/shapes.py` and steps timed one by one; jitter as seen beside other work.
COSTS = {
    "lab-8m-int8": StepCost(
        ((1, 0.0005), (16, 0.0008), (32, 0.00105), (64, 0.0017), (128, 0.003), (256, 0.0056), (512, 0.0095)),
        3e-5, 2.1e-7, 2.7e-8, 0.1,
    ),
    "smollm2-135m-int4": StepCost(
        ((1, 0.0028), (8, 0.005), (32, 0.012), (64, 0.022), (128, 0.043), (256, 0.09), (512, 0.2)), 4e-4, 9e-7, 2.4e-7, 0.1
    ),
    "llama-3.2-1b-int4": StepCost(
        ((1, 0.025), (8, 0.033), (32, 0.08), (64, 0.165), (128, 0.34), (256, 0.68), (512, 1.36)), 1e-3, 1.3e-6, 6e-7, 0.1
    ),
}  # fmt: skip

USES = (
    "serving/first_come", "serving/shortest", "serving/laps", "serving/fair", "serving/deadline", "serving/priority:ageing=0.1",
)  # fmt: skip


def parts_of(use: Sequence[str], limits: Limits) -> Callable[[KVCache], Parts]:
    """What `assemble.build_parts` does, without a plan."""

    def build(cache: KVCache) -> Parts:
        parts, context = Parts(), SimpleNamespace(plan=SimpleNamespace(limits=limits), cache=cache)
        for text in use:
            technique = make(*parse_use(text), techniques.get)
            (seam,) = technique.manifest().seams
            setattr(parts, seam, technique.build(context))
        return parts

    return build


def capacity(arrivals: Sequence[Arrival], cost: StepCost, limits: Limits) -> float:
    """Requests per second of a machine that is always full: the same traffic, all of it there at once."""
    at_once = [replace(a, at_s=0.0) for a in arrivals[:300]]
    pages = 1 + sum(-(-(a.n_prompt + a.n_output) // 32) for a in at_once)
    outcome = simulate(at_once, cost, parts_of(("serving/first_come",), limits), limits=limits, n_pages=pages)
    return len(at_once) / summary(outcome.served, 1.0, 1.0)["makespan"]


def run(
    use: str, arrivals: Sequence[Arrival], cost: StepCost, limits: Limits, args: argparse.Namespace
) -> dict[str, Any]:
    uses = [*use.split("+"), *args.also]
    began = time.perf_counter()
    outcome: Outcome = simulate(
        arrivals, cost, parts_of(uses, limits), limits=limits, n_pages=args.pages, max_tokens=args.max_tokens
    )
    seconds = time.perf_counter() - began
    found: dict[str, Any] = summary(outcome.served, args.ttft, args.tpot)
    found |= {"use": use, "steps": outcome.n_steps, "preempted": outcome.n_preempted, "host_seconds": seconds}
    found["twice"] = outcome.n_rows / outcome.n_needed - 1
    for owner in sorted({s.arrival.owner for s in outcome.served} - {""}):
        found[f"ttft_{owner}"] = float(np.median([s.ttft for s in outcome.served if s.arrival.owner == owner]))
    return found


COLUMNS = (
    ("ttft mean", "ttft_mean", 1e3), ("p50", "ttft_p50", 1e3), ("p99", "ttft_p99", 1e3), ("tpot p50", "tpot_p50", 1e3),
    ("p99", "tpot_p99", 1e3), ("gap p99", "gap_p99", 1e3), ("met %", "met", 100), ("goodput", "goodput", 1), ("tok/s", "tokens_per_s", 1),
    ("makespan", "makespan", 1), ("preempt", "preempted", 1), ("twice", "twice", 100),
    ("heavy", "ttft_heavy", 1e3), ("light", "ttft_light", 1e3),
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'use':44}" + "".join(f"{title:>10}" for title, _, _ in COLUMNS)]
    for r in rows:
        cells = (f"{r[key] * factor:10.1f}" if factor != 1 else f"{r[key]:10.2f}" for _, key, factor in COLUMNS)
        lines.append(f"{r['use']:44}" + "".join(cells))
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    cost = COSTS[args.cost]
    limits = Limits(args.max_rows, args.max_seqs, args.max_rows, args.max_rows)
    trace = scale(
        read_trace(args.trace)[args.skip : args.skip + args.n], max_prompt=args.max_prompt, max_output=args.max_output
    )
    most = capacity(trace, cost, limits)
    results = []
    for load in args.load or [0.7, 1.1]:
        arrivals = owned(scale(trace, rate=load * most), {"heavy": 0.9, "light": 0.1})
        print(
            f"\n{args.cost}, load {load:g} = {load * most:.2f} requests/s, {len(arrivals)} requests, targets "
            f"{args.ttft:g} s, {args.tpot:g} s/token"
        )
        rows = [{"load": load, **run(use, arrivals, cost, limits, args)} for use in args.use or USES]
        print(table(rows), flush=True)
        results += rows
    return results


def gaps_of_engine(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Streams of the real engine while long prompts come: milliseconds between their tokens, and how the prompts fared."""
    from paceline.analysis.synthetic import RandomCheckpoint, shapes
    from paceline.llm import LLM

    results = []
    for use in args.use or (
        "no:serving/splitfuse",
        "serving/splitfuse",
        "serving/splitfuse:target_ms=5",
        "serving/splitfuse:target_ms=10",
    ):
        model = RandomCheckpoint(args.engine) if args.engine in shapes() else args.engine
        sizes = {"context": args.max_prompt + 64, "max_rows": args.max_rows}
        with LLM(model, format=args.format, use=("no:serving/radix", use), **sizes) as llm:
            results.append({"use": use, **_streams(llm, args)})
        r = results[-1]
        print(
            f"{use:36} gap ms p50 {r['gap_p50']:7.2f} p99 {r['gap_p99']:7.2f} max {r['gap_max']:7.2f}   prompt ms p50 {r['ttft_p50']:8.1f}"
            f"   prompts/s {r['prompts_per_s']:6.2f}  stream tokens/s {r['stream_tokens_per_s']:7.1f}", flush=True,
        )  # fmt: skip
    return results


def _streams(llm: Any, args: argparse.Namespace) -> dict[str, float]:
    rng, engine, n_vocab = np.random.default_rng(0), llm.engine, llm.plan.model.n_vocab

    def submit(n: int, n_output: int) -> str:
        params = SamplingParams(temperature=0.0, max_tokens=n_output, ignore_eos=True)
        return str(llm.submit(rng.integers(0, n_vocab, n).tolist(), params))

    gaps: list[float] = []
    ttft: list[float] = []
    length = args.max_prompt - 300
    streams = {submit(16, args.max_prompt) for _ in range(args.streams)}
    for _ in range(2 * args.streams + 20):
        engine.step()
    last = time.perf_counter()
    start, came, prompt = last, last, submit(length, 1)
    while len(ttft) < args.prompts:
        _, outputs = engine.step()
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        for output in outputs:
            if output.id == prompt:
                ttft.append(now - came)
                came, prompt = now, submit(length, 1)
            else:  # a stream came to its end: another takes its place
                streams.discard(output.id)
                streams.add(submit(16, args.max_prompt))
    for name in (*streams, prompt):
        engine.abort(name)
    span = last - start
    found = {
        f"gap_{k}": 1e3 * float(f(gaps))
        for k, f in (("p50", np.median), ("p99", lambda g: np.percentile(g, 99)), ("max", max))
    }
    return {
        **found, "ttft_p50": 1e3 * float(np.median(ttft)), "prompts_per_s": len(ttft) / span,
        "stream_tokens_per_s": args.streams * len(gaps) / span,
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trace", help="CSV or JSON lines, see analysis/traffic.py")
    p.add_argument(
        "--engine",
        metavar="MODEL",
        help="time the real engine instead of simulating: a model, or a shape with random weights",
    )
    p.add_argument("--format", default="auto", help="of the real engine's weights")
    p.add_argument("--cost", choices=COSTS, default="smollm2-135m-int4")
    p.add_argument("--use", action="append", help="what to compare, techniques joined by +")
    p.add_argument("--also", action="append", default=[], help="techniques in all of them")
    p.add_argument("--load", type=float, action="append")
    p.add_argument("--n", type=int, default=600)
    p.add_argument("--skip", type=int, default=0)
    p.add_argument("--max-prompt", type=int, default=2048)
    p.add_argument("--max-output", type=int, default=256)
    p.add_argument("--max-tokens", type=int, default=512, help="what requests ask for at most")
    p.add_argument("--max-rows", type=int, default=512)
    p.add_argument("--max-seqs", type=int, default=64)
    p.add_argument("--pages", type=int, default=5000)
    p.add_argument("--ttft", type=float, default=2.0)
    p.add_argument("--tpot", type=float, default=0.1)
    p.add_argument("--streams", type=int, default=4)
    p.add_argument("--prompts", type=int, default=12)
    p.add_argument("--json")
    args = p.parse_args()
    if not (args.trace or args.engine):
        p.error("--trace or --engine is needed")
    results = gaps_of_engine(args) if args.engine else compare(args)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"benchmark": "scheduling", "arguments": vars(args), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
