"""Tokens per second of a model against what the machine can do: prefill, decode, verification of drafts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.analysis import operators
from paceline.analysis.operators import Costs, Limits, Operator
from paceline.core.errors import ConfigError
from paceline.core.sequence import Draft
from paceline.core.sequence import Sequence as TokenSequence
from paceline.core.types import SamplingParams
from paceline.llm import LLM

WARM = 2  # steps before a measurement

Ints = Sequence[int]


@dataclass(frozen=True)
class Times:
    """One kind of work, measured `len(seconds)` times.

    new, cached: rows computed and rows already there of each sequence, for each pass of one run; tokens: counted per run.
    """

    work: str
    batch: int
    context: int
    tokens: int
    seconds: tuple[float, ...]
    passes: tuple[tuple[Ints, Ints, str], ...]  # and whose logits are needed, as in `ops.count.step`
    repeats: int = 1  # how often a run does these passes


@dataclass(frozen=True)
class Speed:
    """One cell. tokens_per_s: median of the runs; bytes (weights, KV) and FLOPs of a run, and what share of the limits that is."""

    work: str
    batch: int  # sequences
    context: int  # entries that each has in the middle of the measurement; 0 for prefill
    tokens: int
    runs: int
    tokens_per_s: float
    spread: float  # (max - min) / median over the runs
    bytes: int
    flops: int
    bound_tokens_per_s: float | None  # None on backends that cannot measure their limits
    bandwidth_share: float | None
    peak_share: float | None


def device_of(llm: LLM) -> Any:
    """The native device, None on other backends."""
    return getattr(llm.engine.runner.ops, "device", None)


def measure_limits(llm: LLM) -> Limits | None:
    """The machine's limits with the engine's own threads; None on backends that cannot measure them. Takes 0.5 GiB for a moment."""
    device = device_of(llm)
    return None if device is None else operators.measure_limits(device)


def prefill(llm: LLM, n: int, runs: int, seed: int = 0) -> Times:
    """Time to compute a prompt of n random tokens and draw the next; every run has other tokens, so no prefix is found."""
    rng = np.random.default_rng([seed, n])
    _check(llm, 1, n, 1)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    times = []
    for _ in range(runs + 1):
        prompt = rng.integers(0, llm.plan.model.n_vocab, n).tolist()
        times.append(llm.generate([prompt], params)[0].timing.prompt)
    chunk = llm.plan.limits.chunk
    starts = range(0, n, chunk)
    passes = tuple(([min(chunk, n - at)], [at], "last" if at + chunk >= n else "none") for at in starts)
    return Times(f"prefill {n}", 1, 0, n, tuple(times[1:]), passes)


@contextmanager
def _decoding(llm: LLM, batch: int, context: int, n_steps: int, seed: int) -> Iterator[None]:
    """`batch` sequences, each with `context` computed tokens of its own, that go on for at least n_steps steps."""
    rng = np.random.default_rng([seed, batch, context])
    _check(llm, batch, context, n_steps + WARM + 1)
    params = SamplingParams(temperature=0.0, max_tokens=n_steps + WARM + 1, ignore_eos=True)
    ids = [llm.submit(rng.integers(0, llm.plan.model.n_vocab, context).tolist(), params) for _ in range(batch)]
    try:
        engine = llm.engine
        while any(s.n_computed < s.n_prompt for live in engine.live.values() for s in live.seqs):
            engine.step()
        for _ in range(WARM):
            engine.step()
        yield
    finally:
        for request_id in ids:
            llm.engine.abort(request_id)


def decode(llm: LLM, batch: int, context: int, n: int, runs: int, seed: int = 1) -> Times:
    """Time of n steps of `batch` sequences that have `context` tokens each; the runs follow each other in the same sequences."""
    with _decoding(llm, batch, context, n * runs, seed):
        seconds = tuple(_steps(llm, n) for _ in range(runs))
    middle = context + WARM + n * runs // 2
    passes = (([1] * batch, [middle] * batch, "last"),)
    return Times(f"decode b{batch}", batch, middle, n * batch, seconds, passes, n)


def _steps(llm: LLM, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        llm.engine.step()
    return time.perf_counter() - start


class _RandomDrafts:
    """The `drafter` seam: n random tokens for every sequence, nearly always rejected."""

    def __init__(self, n: int, n_vocab: int, seed: int = 0):
        self.n, self.n_vocab, self.rng = n, n_vocab, np.random.default_rng(seed)

    def propose(self, seqs: Sequence[TokenSequence]) -> list[Draft]:
        chain = np.arange(-1, self.n - 1, dtype=np.int32)
        return [Draft(self.rng.integers(0, self.n_vocab, self.n).astype(np.int32), chain) for _ in seqs]

    def observe(self, seq: TokenSequence, n_accepted: int) -> None:
        pass


@dataclass(frozen=True)
class Verification:
    """A step that verifies a chain of `draft` tokens (draft + 1 rows of one sequence) against a step of one row."""

    draft: int
    context: int
    seconds: float
    seconds_of_one: float
    ratio: float


def verification(llm: LLM, draft: int, context: int, n: int, runs: int) -> Verification:
    """Medians over n * runs steps of each kind, in turns."""
    parts = llm.engine.runner.parts
    kept, drafter = parts.drafter, _RandomDrafts(draft, llm.plan.model.n_vocab)
    times: dict[bool, list[float]] = {False: [], True: []}
    with _decoding(llm, 1, context, 2 * n * runs + draft, seed=2):
        try:
            for _ in range(runs):
                for drafting in (False, True):
                    parts.drafter = drafter if drafting else None
                    times[drafting] += [_steps(llm, 1) for _ in range(n)]
        finally:
            parts.drafter = kept
    one, many = statistics.median(times[False]), statistics.median(times[True])
    return Verification(draft, context, many, one, many / one)


def profile_decode(llm: LLM, batch: int, context: int, limits: Limits, n: int = 32) -> list[Operator]:
    """Operators of a step of `batch` sequences that have `context` tokens each."""

    def steps() -> int:
        _steps(llm, n)
        return n

    with _decoding(llm, batch, context, n, seed=3):
        return _profile(llm, steps, [1] * batch, [context + WARM + n // 2] * batch, limits)


def profile_prefill(llm: LLM, n: int, limits: Limits, runs: int = 2) -> list[Operator]:
    """Operators of a step that computes a prompt of n tokens, or its first chunk where it needs several steps."""
    n = min(n, llm.plan.limits.chunk)

    def steps() -> int:
        prefill(llm, n, runs - 1, seed=4)
        return runs

    return _profile(llm, steps, [n], [0], limits)


def _profile(llm: LLM, steps: Callable[[], int], new: Ints, cached: Ints, limits: Limits) -> list[Operator]:
    costs = operators.count(llm.engine.runner.model, new, cached, llm.plan.kv_dtype)
    return operators.profile(device_of(llm), steps, costs, limits, llm.plan.kv_dtype)


def judge(llm: LLM, times: Times, limits: Limits | None) -> Speed:
    """Rates, and what share of the machine they are."""
    costs = [
        operators.count(llm.engine.runner.model, new, cached, llm.plan.kv_dtype, want)
        for new, cached, want in times.passes
    ]
    n_bytes = times.repeats * sum(map(operators.streamed, costs))
    flops = times.repeats * sum(c.flops for cost in costs for c in cost.values())
    median = statistics.median(times.seconds)
    spread = (max(times.seconds) - min(times.seconds)) / median
    bound = bandwidth = peak = None
    if limits is not None:
        arithmetic = times.repeats * sum(_arithmetic(c, limits, llm.plan.kv_dtype) for c in costs)
        bound = times.tokens / max(n_bytes / limits.bandwidth, arithmetic)
        bandwidth, peak = n_bytes / limits.bandwidth / median, arithmetic / median
    rate = times.tokens / median
    return Speed(
        times.work,
        times.batch,
        times.context,
        times.tokens,
        len(times.seconds),
        rate,
        spread,
        n_bytes,
        flops,
        bound,
        bandwidth,
        peak,
    )


def _arithmetic(costs: Costs, limits: Limits, kv_dtype: str) -> float:
    return sum(limits.arithmetic(name, cost, kv_dtype) for name, cost in costs.items())


def _check(llm: LLM, batch: int, context: int, more: int) -> None:
    """Refuse what would not fit, so that nothing is preempted while time runs."""
    plan, page = llm.plan, llm.plan.page_size
    if context + more > plan.context:
        raise ConfigError(
            f"prompt = {context}: with {more} tokens more it exceeds the context of {plan.context}; shorten it, or raise --context"
        )
    pages = batch * -(-(context + more) // page)
    if pages > plan.n_pages - 1 or batch > plan.limits.max_seqs:
        raise ConfigError(
            f"batch = {batch}: needs {pages} pages of KV cache and {batch} sequences at once, of {plan.n_pages - 1} and "
            f"{plan.limits.max_seqs}; raise --kv-memory or --max-seqs, or shorten --prompt"
        )
