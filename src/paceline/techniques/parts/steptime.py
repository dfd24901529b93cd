"""How long a step takes on this machine with this model, learned from the steps as they run.

seconds = c . x with c >= 0, where x holds one, the rows (piecewise linear: weights are read once whatever the rows, then
arithmetic takes over), the sequences, the cache entries read and the query-key pairs. Least squares on relative errors with
exponential forgetting; each observation is followed by a sweep of projected coordinate descent (Gauss-Seidel), so the
coefficients stay non-negative and nothing is inverted. About 30 us an observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

from paceline.core.scheduler import Share

KNOTS = (16, 64, 256)  # rows where the slope may change
FORGET = 0.99
DAMPING = 1e-3  # keeps what the observations so far say nothing about where it is
N_TRUSTED = 16  # observations after which one far above the prediction is taken for a disturbance
OUTLIER = 3.0
FIRST_ROWS = 16  # before anything else is known: a step's fixed cost is that of so many rows
EVERY = 8  # of the steps that only decode, one in so many is observed: they are all alike


class Work(NamedTuple):
    """What a step computes. entries: cache entries that some sequence reads; pairs: query-key pairs."""

    rows: int = 0
    seqs: int = 0
    entries: int = 0
    pairs: int = 0

    def plus(self, n: int, start: int) -> Work:
        """With n rows more, of a sequence that has `start` entries."""
        pairs = self.pairs + n * start + n * (n + 1) // 2
        return Work(self.rows + n, self.seqs + 1, self.entries + start + n, pairs)


def work_of(shares: Sequence[Share]) -> Work:
    rows = entries = pairs = 0
    for share in shares:
        n, start = share.n, share.positions[0]
        rows += n
        entries += start + n
        pairs += n * start + n * (n + 1) // 2
    return Work(rows, len(shares), entries, pairs)


def _features(work: Work) -> list[float]:
    """Of order one each, for steps of usual size."""
    n = work.rows
    a, b, c = KNOTS
    return [
        min(n, a) / a,
        min(max(n - a, 0), b - a) / (b - a),
        min(max(n - b, 0), c - b) / (c - b),
        max(n - c, 0) / c,
        1.0,
        work.seqs / 16,
        work.entries / 8192,
        work.pairs / 65536,
    ]


N_FEATURES = 8


class StepTime:
    """Predicts seconds of steps. `n_observed` is 0 until the first observation; predictions are 0 until then."""

    def __init__(self) -> None:
        self.n_observed = 0
        self._n_decodes = 0
        self._c = [0.0] * N_FEATURES
        self._a = [[0.0] * N_FEATURES for _ in range(N_FEATURES)]  # sum of x x^T / seconds^2
        self._b = [0.0] * N_FEATURES  # sum of x / seconds

    def seconds(self, work: Work) -> float:
        return sum(map(mul, self._c, _features(work)))

    def observe(self, shares: Sequence[Share], seconds: float) -> None:
        """Learn from a step; those that only decode are sampled. (Prompts are last among the shares.)"""
        if shares[-1].n - shares[-1].n_draft == 1:
            self._n_decodes += 1
            if self._n_decodes % EVERY != 1:
                return
        self.learn(work_of(shares), seconds)

    def learn(self, work: Work, seconds: float) -> None:
        """Fit to one observation more; one of no time (a coarse clock) says nothing."""
        if seconds <= 0.0:
            return
        if not self.n_observed:
            self._guess(work, seconds)
        self.n_observed += 1
        if self.n_observed > N_TRUSTED:
            seconds = min(seconds, OUTLIER * self.seconds(work))
        x = [f / seconds for f in _features(work)]
        for i, xi in enumerate(x):
            row = [FORGET * v for v in self._a[i]]
            self._a[i] = [v + xi * xj for v, xj in zip(row, x, strict=True)] if xi else row
            self._b[i] = FORGET * self._b[i] + xi
        self._sweep()

    def _guess(self, work: Work, seconds: float) -> None:
        per_row = seconds / (FIRST_ROWS + work.rows)
        a, b, c = KNOTS
        self._c = [per_row * n for n in (a, b - a, c - b, c, FIRST_ROWS)] + [0.0] * (N_FEATURES - 5)

    def _sweep(self) -> None:
        c = self._c
        for i, row in enumerate(self._a):
            curvature = row[i]
            if curvature:
                gradient = self._b[i] - sum(map(mul, row, c))
                c[i] = max(0.0, c[i] + gradient / (curvature * (1 + DAMPING)))
