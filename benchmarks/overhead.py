"""What a step costs outside the native kernels: scheduling, tables, the border, sampling, bookkeeping, text.

    python benchmarks/overhead.py [--shape smollm2-135m | --model lab-8m] [--format int4] [--batch 1 --batch 8] [--steps 200]

Decoding after prompts of `--prompt` tokens; medians of microseconds per step. `native` is what the device itself counts as spent in
programs and kernels, `outside` the rest of a step that nothing else is timed in. The parts are timed in further steps, where they are
called, so with the caches as the kernels leave them; the timing adds to them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from time import perf_counter
from typing import Any

import numpy as np

from paceline.analysis.synthetic import RandomCheckpoint
from paceline.core import runner as runner_module
from paceline.core.types import SamplingParams
from paceline.llm import LLM


class Meter:
    """Seconds per part, each without the parts called within it and without the time in native code."""

    def __init__(self, device: Any):
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time `owner.name` as `part` from now on."""
        fn = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            busy, start = self.device.busy, perf_counter()
            out = fn(*args, **kwargs)
            whole = perf_counter() - start
            native = self.device.busy - busy
            self.spent[part] += whole - native - self._inner
            self._inner = outer + whole - native
            return out

        object.__setattr__(owner, name, run)

    def take(self) -> dict[str, float]:
        out = dict(self.spent)
        self.spent.clear()
        return out


def instrument(llm: LLM) -> Meter:
    """A meter on every part of a step, for good."""
    engine, runner = llm.engine, llm.engine.runner
    meter = Meter(runner.ops.device)
    meter.wrap(runner.scheduler, "schedule", "schedule")
    meter.wrap(runner_module, "build", "tables")
    meter.wrap(runner.ops, "begin", "begin")
    meter.wrap(runner.model.program, "forward", "border")
    meter.wrap(runner.sampler, "draw", "sampling")
    meter.wrap(runner, "append", "append, text")
    meter.wrap(runner, "_commit", "commit")
    meter.wrap(runner, "step", "runner")
    meter.wrap(engine, "step", "engine")
    return meter


def measure(llm: LLM, batch: int, args: argparse.Namespace, meter: Meter | None = None) -> dict[str, float]:
    """Microseconds per step: the whole, or its parts when there is a meter."""
    rng = np.random.default_rng(batch)
    params = SamplingParams(temperature=args.temperature, max_tokens=args.steps + 8, ignore_eos=True, seed=1)
    ids = [llm.submit(rng.integers(0, llm.plan.model.n_vocab, args.prompt).tolist(), params) for _ in range(batch)]
    engine, device = llm.engine, llm.engine.runner.ops.device
    while any(s.n_computed < s.n_prompt for live in engine.live.values() for s in live.seqs):
        engine.step()
    for _ in range(4):
        engine.step()
    rows: dict[str, list[float]] = defaultdict(list)
    if meter:
        meter.take()
    for _ in range(args.steps):
        busy, start = device.busy, perf_counter()
        engine.step()
        whole, native = perf_counter() - start, device.busy - busy
        found = meter.take() if meter else {"native": native, "outside": whole - native, "step": whole}
        for part, seconds in found.items():
            rows[part].append(seconds)
    for request_id in ids:
        engine.abort(request_id)
    return {part: 1e6 * float(np.median(seconds)) for part, seconds in rows.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="smollm2-135m")
    p.add_argument("--model", help="instead of a shape: a model with a tokenizer, so that text is made")
    p.add_argument("--format", default="int4")
    p.add_argument("--batch", type=int, action="append")
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--temperature", type=float, default=0.0)
    args = p.parse_args()
    llm = LLM(args.model or RandomCheckpoint(args.shape), format=args.format, context=args.prompt + args.steps + 16)
    batches = args.batch or [1, 8, 32]
    wholes = {b: measure(llm, b, args) for b in batches}
    meter = instrument(llm)
    results = {b: {**measure(llm, b, args, meter), **wholes[b]} for b in batches}
    print(f"{'us per step':14}" + "".join(f"{f'batch {b}':>12}" for b in batches))
    for part in next(iter(results.values())):
        print(f"{part:14}" + "".join(f"{r[part]:12.1f}" for r in results.values()))
    shares = (100 * r["outside"] / r["step"] for r in results.values())
    print(f"{'share of step':14}" + "".join(f"{x:11.1f}%" for x in shares))
    print(
        json.dumps({"benchmark": "overhead", "shape": args.model or args.shape, "format": args.format, "us": results})
    )


if __name__ == "__main__":
    main()
