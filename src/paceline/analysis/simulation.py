"""The real engine and scheduler on a virtual clock: steps compute nothing and take the time a cost formula gives.

So policies are compared on the same traffic, hours of it in seconds, without the machine's noise. What is simulated is only
`model.program.forward` and its seconds; queues, pages, prefix index, preemption and bookkeeping are the engine's own.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.analysis.traffic import Arrival, Served
from paceline.core.batch import Batch
from paceline.core.clock import ManualClock
from paceline.core.engine import Engine, Serving
from paceline.core.kvcache import KVCache, make_groups
from paceline.core.runner import Parts
from paceline.core.scheduler import Limits
from paceline.core.specs import KV
from paceline.core.types import Request, SamplingParams

N_VOCAB = 1 << 20
TILE = 16


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step. rows: (rows, seconds) ascending, straight between, for rows in whole tiles; the rest is added per piece.

    jitter: standard deviation of the logarithm of a random factor.
    """

    rows: tuple[tuple[int, float], ...]
    per_seq: float
    per_entry: float
    per_pair: float
    jitter: float = 0.0

    def seconds(self, batch: Batch) -> float:
        n = np.diff(batch.cu_rows).astype(np.int64)
        ends = batch.groups[0].lens.astype(np.int64)
        pairs = float((n * (ends - n) + n * (n + 1) // 2).sum())
        of_rows = self._of_rows(batch.n_rows)
        return of_rows + self.per_seq * len(n) + self.per_entry * float(ends.sum()) + self.per_pair * pairs

    def _of_rows(self, n: int) -> float:
        if n > TILE:
            n = -(-n // TILE) * TILE
        at = min(max(1, bisect_left(self.rows, (n, 0.0))), len(self.rows) - 1)
        (a, ta), (b, tb) = self.rows[at - 1], self.rows[at]
        return ta + (tb - ta) * (n - a) / (b - a)


@dataclass
class _NoOps:
    """The few ops that the engine itself calls; pools are of one number an entry."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def move(self, pool: np.ndarray, src: np.ndarray, dst: np.ndarray) -> None:
        pass

    def numpy(self, x: Any) -> Any:
        return x

    def begin(self, batch: Batch) -> Batch:
        return batch

    def sample(self, rows: np.ndarray, *settings: Any) -> np.ndarray:
        return np.zeros(len(rows), np.int64)


@dataclass
class _Model:
    """A model whose forward pass only lets time go by."""

    cost: StepCost
    clock: ManualClock
    rng: random.Random
    n_rows: int = 0
    ops: _NoOps = field(default_factory=_NoOps)

    @property
    def program(self) -> _Model:
        return self

    def forward(self, batch: Batch) -> np.ndarray:
        factor = self.rng.lognormvariate(0.0, self.cost.jitter) if self.cost.jitter else 1.0
        self.clock.advance(self.cost.seconds(batch) * factor)
        self.n_rows += batch.n_rows
        return np.zeros((len(batch.want), 2), np.float32)


class _Until:
    """A text that ends after a number of tokens, which the scheduler does not know. The request carries it as its seed."""

    def __init__(self, params: SamplingParams):
        self.left = params.seed or 1

    def push(self, token: int) -> tuple[str, str | None]:
        self.left -= 1
        return "", None if self.left > 0 else "end"

    def finish(self) -> str:
        return ""


@dataclass(frozen=True)
class Outcome:
    """n_rows: rows computed; n_needed: what would have been without preemption (prefix hits as they were)."""

    served: list[Served]
    n_rows: int
    n_needed: int
    n_preempted: int
    n_steps: int


def simulate(
    arrivals: Sequence[Arrival],
    cost: StepCost,
    parts: Callable[[KVCache], Parts],
    *,
    limits: Limits,
    n_pages: int,
    page_size: int = 32,
    max_tokens: int = 1024,
    seed: int = 0,
    fields: Callable[[Arrival], Mapping[str, Any]] = lambda arrival: {},
    steps: int = 10_000_000,
) -> Outcome:
    """Serve all arrivals to their end. parts: from a `KVCache` to `Parts`. max_tokens: what requests ask for; they end by themselves
    after `n_output`. fields: further ones of each `Request`. Raises RuntimeError when that takes more than `steps` steps."""
    clock = ManualClock()
    model = _Model(cost, clock, random.Random(seed))
    cache = KVCache(make_groups((KV(1, 1),), page_size), model.ops, "float32", n_pages)
    serving = Serving(N_VOCAB, (n_pages - 1) * page_size)
    engine = Engine(model, cache, parts(cache), limits, serving, text=_Until, clock=clock)
    served = {f"r{i}": Served(a) for i, a in enumerate(arrivals)}
    due = [(a.at_s, f"r{i}", a) for i, a in enumerate(arrivals)]
    due.sort(key=lambda d: d[0], reverse=True)
    n_needed = n_preempted = 0
    while due or engine.has_work:
        if not engine.has_work:
            clock.time = max(clock.time, due[-1][0])
        while due and due[-1][0] <= clock.time:
            _, name, a = due.pop()
            params = SamplingParams(temperature=0.0, max_tokens=max(max_tokens, a.n_output), seed=a.n_output)
            prompt = tuple(a.tokens(N_VOCAB, seed + int(name[1:])))
            engine.add(Request(name, prompt, params, arrival=a.at_s, owner=a.owner, **fields(a)))
        deltas, outputs = engine.step()
        for delta in deltas:
            served[delta.request].token_times += [clock.time] * len(delta.token_ids)
        for output in outputs:
            n_needed += len(output.prompt_token_ids) - output.n_cached + len(output.token_ids) - 1
            n_preempted += output.n_preempted
        if engine.runner.n_steps > steps:
            raise RuntimeError(f"not at an end after {steps} steps: {len(engine.live)} requests are left")
    return Outcome(list(served.values()), model.n_rows, n_needed, n_preempted, engine.runner.n_steps)
