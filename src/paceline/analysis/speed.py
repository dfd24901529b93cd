"""Tokens per second of a model: prefill and decode at several batch sizes, against what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from paceline.core.types import SamplingParams
from paceline.llm import LLM

Progress = Callable[[int, int, str], None] | None


@dataclass(frozen=True)
class Speed:
    """One cell. tokens_per_s: median over `runs`; bound_tokens_per_s: what bandwidth and arithmetic allow, None if not measured."""

    work: str
    batch: int
    tokens: int
    runs: int
    tokens_per_s: float
    spread: float  # (max - min) / median over the runs
    bytes_per_token: float
    flops_per_token: float
    bound_tokens_per_s: float | None
    share_of_bandwidth: float | None
    share_of_peak: float | None

    def describe(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """Measured here: bytes/s read by all threads, and operations/s of the unit the format's linears run on."""

    bandwidth: float
    peak: float


def measure_limits(llm: LLM) -> Limits | None:
    """The machine's limits with the engine's own threads; None on backends that cannot measure them."""
    device = getattr(llm.engine.runner.ops, "device", None)
    if device is None or not hasattr(device, "read_bandwidth"):
        return None
    formats = llm.plan.model.formats
    unit = "int8" if "int" in formats else "bf16" if "bf16" in formats else "f32"
    return Limits(device.read_bandwidth(), device.peak(unit))


def prefill(llm: LLM, n: int, runs: int, limits: Limits | None, seed: int = 0) -> Speed:
    """Time to compute a prompt of n random tokens and its first new token; every run has other tokens (no prefix hit)."""
    rng = np.random.default_rng(seed + n)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    times = []
    for _ in range(runs + 1):
        prompt = rng.integers(0, llm.plan.model.n_vocab, n).tolist()
        times.append(llm.generate([prompt], params)[0].timing.prompt)
    return _cell(llm, f"prefill {n}", 1, n, [n / t for t in times[1:]], limits, rows_per_pass=n)


def decode(llm: LLM, batch: int, prompt: int, n: int, runs: int, limits: Limits | None, seed: int = 0) -> Speed:
    """Generated tokens per second of `batch` sequences after prompts of `prompt` tokens, n tokens each, prompts not counted."""
    rng = np.random.default_rng(seed + 1000 * batch)
    rates = []
    for _ in range(runs):
        params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
        engine = llm.engine
        prompts = rng.integers(0, llm.plan.model.n_vocab, (batch, prompt)).tolist()
        for p in prompts:
            llm.submit(p, params)
        while any(s.n_computed < s.n_prompt for live in engine.live.values() for s in live.seqs):
            engine.step()
        before = engine.stats.n_output_tokens
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        rates.append((engine.stats.n_output_tokens - before) / (time.perf_counter() - start))
    return _cell(llm, f"decode b{batch}", batch, n, rates, limits, rows_per_pass=batch, context=prompt + n // 2)


def _cell(
    llm: LLM,
    work: str,
    batch: int,
    tokens: int,
    rates: Sequence[float],
    limits: Limits | None,
    rows_per_pass: int,
    context: int = 0,
) -> Speed:
    """Bytes: weights once per pass (one pass per max_rows rows) and, in decode, the KV read; FLOPs: 2 per parameter and token."""
    plan = llm.plan
    rows = min(rows_per_pass, plan.limits.max_rows)
    n_bytes = plan.model.weight_bytes / rows + plan.kv_bytes_per_token * context
    flops = 2.0 * plan.model.n_params
    rate = statistics.median(rates)
    bound = bandwidth = peak = None
    if limits is not None:
        bound = 1.0 / max(n_bytes / limits.bandwidth, flops / limits.peak)
        bandwidth, peak = rate * n_bytes / limits.bandwidth, rate * flops / limits.peak
    spread = (max(rates) - min(rates)) / rate
    return Speed(work, batch, tokens, len(rates), rate, spread, n_bytes, flops, bound, bandwidth, peak)
