"""Choosing tokens from rows of logits, in float64 on NumPy: the oracle of every backend's `sample` and `logprobs`."""

from __future__ import annotations

import numpy as np

GREEDY_BELOW = 1e-5


def sample(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray, u: np.ndarray
) -> np.ndarray:
    """`Ops.sample`: token ids int64 (n,) for logits (n, n_vocab); -1 where a row has NaN or +inf, or -inf only."""
    out = np.empty(len(logits), np.int64)
    for r, row in enumerate(logits):
        best = row.max(initial=-np.inf)  # NaN when there is one
        if not np.isfinite(best):
            out[r] = -1
        elif temperature[r] < GREEDY_BELOW:
            out[r] = row.argmax()
        else:
            out[r] = _draw(row, float(temperature[r]), int(top_k[r]), float(top_p[r]), float(min_p[r]), float(u[r]))
    return out


def _draw(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    x = row.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    p = np.exp((x[order] - x[order[0]]) / temperature)
    if top_k:
        p = p[:top_k]
    if top_p < 1.0:
        mass = np.cumsum(p)
        p = p[: 1 + int(np.searchsorted(mass, top_p * mass[-1], side="left"))]
    n = int(np.count_nonzero(p >= max(min_p, np.finfo(np.float64).tiny) * p[0]))  # p descends: a prefix is kept
    mass = np.cumsum(p[:n])
    return int(order[min(int(np.searchsorted(mass, u * mass[-1], side="right")), n - 1)])


def logprobs(logits: np.ndarray, ids: np.ndarray, n_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Ops.logprobs`: log-softmax of ids (n,), and the n_top largest (ties: lower id) with their log-softmax."""
    n, n_vocab = logits.shape
    assert n_top <= n_vocab
    own = np.empty(n, np.float32)
    top_ids, top = np.empty((n, n_top), np.int64), np.empty((n, n_top), np.float32)
    for r, row in enumerate(logits):
        x = row.astype(np.float64)
        best = x.max()
        with np.errstate(invalid="ignore"):  # a row of -inf, or one with NaN, has no log-softmax: NaN
            x -= best + np.log(np.exp(x - best).sum())
        own[r] = x[ids[r]]
        if n_top:
            top_ids[r] = _largest(row, n_top)
            top[r] = x[top_ids[r]]
    return own, top_ids, top


def _largest(row: np.ndarray, n: int) -> np.ndarray:
    """The places of the n largest, in descending order, the lower first on ties; NaN last."""
    x = np.where(np.isnan(row), -np.inf, row)
    limit = np.partition(x, len(x) - n)[len(x) - n]
    candidates = np.flatnonzero(x >= limit)
    return candidates[np.argsort(-x[candidates], kind="stable")[:n]]
