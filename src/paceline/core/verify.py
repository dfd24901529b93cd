"""Which part of a draft is kept, and the token after it.

Two lossless rules over chains and trees. `coupled`: at every node draw from the model with the random number that plain decoding
would use there; follow the child that equals the draw. The output is the plain run's, token for token, sampled or greedy; a
proposal without probabilities is accepted as often as by rejection sampling. `rejection`: accept a child drawn from q with
probability min(1, p/q), else continue with the residual max(p - q, 0) (Leviathan et al., arXiv:2211.17192; several children per
node: SpecInfer, arXiv:2305.09781, section 4.3). The output has the plain run's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paceline.core.sequence import Draft


@dataclass(frozen=True)
class Verdict:
    """Accepted nodes from the root down, and the token that follows the last of them."""

    path: tuple[int, ...]
    bonus: int


class Target(Protocol):
    """The model's choice after node `node` (-1: after the last real token) when `path` has been accepted."""

    def draw(self, node: int, path: tuple[int, ...]) -> int:
        """The token plain decoding would take here; -1 when the logits are unusable."""

    def probs(self, node: int, path: tuple[int, ...]) -> np.ndarray:
        """float64 (n_vocab,) distribution plain decoding draws from here; all zeros when the logits are unusable."""

    def uniform(self, path: tuple[int, ...], k: int) -> float:
        """The k-th auxiliary random number in [0, 1) at this place, repeatable."""


Acceptor = Callable[[Draft, Target], Verdict]


def children(draft: Draft, node: int) -> list[int]:
    return [int(c) for c in np.nonzero(draft.parents == node)[0]]


def coupled(draft: Draft, target: Target) -> Verdict:
    path: tuple[int, ...] = ()
    node = -1
    while True:
        token = target.draw(node, path)
        child = next((c for c in children(draft, node) if draft.tokens[c] == token), None)
        if child is None:
            return Verdict(path, token)
        path, node = (*path, child), child


def rejection(draft: Draft, target: Target) -> Verdict:
    """Needs `draft.q`; siblings are independent draws from the same q (repeats allowed)."""
    assert draft.q is not None or len(draft) == 0, "rejection sampling needs the proposal's probabilities"
    path: tuple[int, ...] = ()
    node = -1
    while True:
        p = target.probs(node, path)
        if not p.any():
            return Verdict(path, -1)
        taken = None
        tried = 0
        for child in children(draft, node):
            assert draft.q is not None
            q = draft.q[child].astype(np.float64)
            token = int(draft.tokens[child])
            if target.uniform(path, tried) * q[token] < p[token]:
                taken = child
                break
            tried += 1
            p = np.maximum(p - q, 0.0)
            total = p.sum()
            if total <= 0.0:  # p == q up to rounding: a rejection here has probability zero
                p = target.probs(node, path)
                break
            p /= total
        if taken is None:
            return Verdict(path, inverse_cdf(p, target.uniform(path, tried)))
        path, node = (*path, taken), taken


def inverse_cdf(p: np.ndarray, u: float) -> int:
    """The token at quantile u of a float64 distribution."""
    cdf = np.cumsum(p)
    return int(min(np.searchsorted(cdf, u * cdf[-1], side="right"), np.nonzero(p)[0][-1]))
