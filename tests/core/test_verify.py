"""Verification of drafts keeps the plain model's tokens (coupled) or distribution (rejection), over chains and trees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import rng
from paceline.core.sequence import Draft
from paceline.core.verify import children, coupled, inverse_cdf, rejection

N_VOCAB = 6


@dataclass
class TableTarget:
    """A model whose distribution depends on the last token alone: probs[token]."""

    probs_of: np.ndarray  # (n_vocab, n_vocab)
    draft: Draft
    last: int
    seed: int
    place: int = 0

    def probs(self, node: int, path: tuple[int, ...]) -> np.ndarray:
        return self.probs_of[self.last if node < 0 else int(self.draft.tokens[node])]

    def draw(self, node: int, path: tuple[int, ...]) -> int:
        return inverse_cdf(self.probs(node, path), rng.uniform(self.seed, self.place + len(path)))

    def uniform(self, path: tuple[int, ...], k: int) -> float:
        return rng.uniform(self.seed, self.place + len(path), 1000 + k)


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(N_VOCAB), size=N_VOCAB)


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    n = draw(st.integers(0, 12))
    parents = [draw(st.integers(-1, i - 1)) for i in range(n)]
    tokens = [draw(st.integers(0, N_VOCAB - 1)) for _ in range(n)]
    return Draft(np.array(tokens, np.int32), np.array(parents, np.int32))


@settings(max_examples=200, deadline=None)
@given(drafts(), st.integers(0, 1 << 30))
def test_coupled_gives_the_plain_run(draft: Draft, seed: int) -> None:
    target = TableTarget(table(3), draft, last=2, seed=seed)
    verdict = coupled(draft, target)
    got = [int(draft.tokens[i]) for i in verdict.path] + [verdict.bonus]
    plain, last = [], 2
    for place in range(len(got)):
        last = inverse_cdf(target.probs_of[last], rng.uniform(seed, place))
        plain.append(last)
    assert got == plain
    for above, below in zip((-1, *verdict.path), verdict.path, strict=False):
        assert draft.parents[below] == above
    end = verdict.path[-1] if verdict.path else -1
    assert all(draft.tokens[c] != verdict.bonus for c in children(draft, end)), "it stopped although a child matched"


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = counts.sum() * p
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n_children", [1, 2, 3])
def test_rejection_keeps_the_distribution(n_children: int) -> None:
    """First tokens over 20,000 runs with a badly matched proposal; chi-square with 5 degrees of freedom, p = 1e-4."""
    p, q = table(5), table(9)
    counts = np.zeros(N_VOCAB)
    draws = np.random.default_rng(1)
    for seed in range(20_000):
        tokens = draws.choice(N_VOCAB, size=n_children, p=q[0]).astype(np.int32)
        draft = Draft(tokens, np.full(n_children, -1, np.int32), np.repeat(q[:1], n_children, 0).astype(np.float32))
        verdict = rejection(draft, TableTarget(p, draft, last=0, seed=seed))
        counts[int(tokens[verdict.path[0]]) if verdict.path else verdict.bonus] += 1
    assert chi_square(counts, p[0]) < 25.7


def test_rejection_of_a_chain_keeps_the_joint_distribution() -> None:
    """Pairs of tokens from a chain of two; 35 degrees of freedom, p = 1e-4."""
    p, q = table(5), table(9)
    counts = np.zeros((N_VOCAB, N_VOCAB))
    draws = np.random.default_rng(2)
    for seed in range(30_000):
        first = draws.choice(N_VOCAB, p=q[1])
        second = draws.choice(N_VOCAB, p=q[first])
        draft = Draft(
            np.array([first, second], np.int32), np.array([-1, 0], np.int32), q[[1, first]].astype(np.float32)
        )
        verdict = rejection(draft, TableTarget(p, draft, last=1, seed=seed))
        out = [int(draft.tokens[i]) for i in verdict.path] + [verdict.bonus]
        if len(out) == 1:  # the next token comes from the next plain step
            out.append(inverse_cdf(p[out[0]], draws.random()))
        counts[out[0], out[1]] += 1
    assert chi_square(counts.ravel(), (p[1][:, None] * p).ravel()) < 80


def test_equal_distributions_accept_everything() -> None:
    p = table(4)
    tokens = [int(np.argmax(p[0]))]
    draft = Draft(np.array(tokens, np.int32), np.array([-1], np.int32), p[:1].astype(np.float32))
    accepted = [len(rejection(draft, TableTarget(p, draft, 0, seed)).path) for seed in range(500)]
    assert min(accepted) == 1


def test_an_unusable_row_ends_the_path() -> None:
    draft = Draft(np.array([1], np.int32), np.array([-1], np.int32))

    class Broken(TableTarget):
        def draw(self, node: int, path: tuple[int, ...]) -> int:
            return -1

    assert coupled(draft, Broken(table(1), draft, 0, 0)).bonus == -1
