"""Paceline. Besides times it says what the machine's limits make of each cell: `bound` in tokens/s."""

from __future__ import annotations

import os
import time
from typing import Any

import serve

from paceline import LLM, SamplingParams
from paceline.analysis import speed
from paceline.assemble import native_isas

FORMATS = {"bf16": "bf16", "int8": "int8", "w8a8": "int8:group=0", "int4": "int4"}


def isa() -> str | None:
    """PACELINE_ISA, or the best that is not an emulation (which builds for tests may contain)."""
    real = [i for i in native_isas() if not i.endswith("emulated")]
    return os.environ.get("PACELINE_ISA") or (real[-1] if real else None)


class Ours:
    whole = False

    def __init__(self, options: dict[str, Any]):
        self.n_vocab = options["n_vocab"]
        kind = {"dtype": "bfloat16"} if options["bits"] == "bf16" else {"format": FORMATS[options["bits"]]}
        self.llm = LLM(
            options["model"],
            context=options["max_context"],
            max_seqs=max(options["max_batch"], 4),
            threads=options["threads"],
            isa=isa(),
            offline=True,
            **kind,
        )
        self.ids: list[str] = []

    def facts(self) -> dict[str, Any]:
        plan = self.llm.plan
        return {
            "backend": plan.backend,
            "isa": plan.isa,
            "formats": plan.model.formats,
            "kv_dtype": plan.kv_dtype,
            "weight_bytes": plan.model.weight_bytes,
        }

    def _greedy(self, n: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)

    def prefill(self, prompt: serve.Prompt) -> float:
        start = time.perf_counter()
        self.llm.generate([prompt], self._greedy(1))
        return time.perf_counter() - start

    def begin(self, prompts: list[serve.Prompt], room: int) -> None:
        self.ids = [self.llm.submit(p, self._greedy(room + 1)) for p in prompts]
        engine = self.llm.engine
        while any(s.n_computed < s.n_prompt for live in engine.live.values() for s in live.seqs):
            engine.step()

    def step(self, n: int) -> tuple[float, int]:
        start = time.perf_counter()
        for _ in range(n):
            self.llm.engine.step()
        return time.perf_counter() - start, n * len(self.ids)

    def end(self) -> None:
        for request_id in self.ids:
            self.llm.engine.abort(request_id)

    def generate(self, prompts: list[serve.Prompt], n: int) -> list[list[int]]:
        return [o.completions[0].token_ids for o in self.llm.generate(prompts, self._greedy(n))]

    # ---- limits of the machine, for the driver

    def limits(self) -> dict[str, Any]:
        """Bytes/s and operations/s, measured now with the engine's threads."""
        self.measured = speed.measure_limits(self.llm)
        if self.measured is None:
            raise RuntimeError("no native core: its limits cannot be measured")
        return {"bandwidth": self.measured.bandwidth, "peaks": dict(self.measured.peaks)}

    def bound(self, request: dict[str, Any]) -> dict[str, Any]:
        """What `limits` allows for a cell: every weight and KV entry read once, or every FLOP at the peak of its unit."""
        if request["work"] == "prefill":
            n, chunk = request["n"], self.llm.plan.limits.chunk
            passes = [([min(chunk, n - at)], [at], "last" if at + chunk >= n else "none") for at in range(0, n, chunk)]
            times = speed.Times("prefill", 1, 0, n, (1.0,), tuple(passes))
        else:
            batch, context = request["batch"], request["context"]
            passes = [([1] * batch, [context] * batch, "last")]
            times = speed.Times("decode", batch, context, batch, (1.0,), tuple(passes))
        return {"tokens_per_s": speed.judge(self.llm, times, self.measured).bound_tokens_per_s}


class Server(serve.Server):
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "limits":
            return self.peer.limits()
        if request["do"] == "bound":
            return self.peer.bound(request)
        return super().answer(request)


if __name__ == "__main__":
    serve.main(Ours, Server)
