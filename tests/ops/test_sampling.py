"""`sample` and `logprobs` of the reference: the distribution drawn from, ties, and rows that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.core.sampler import warp
from paceline.core.types import SamplingParams
from paceline.ops.reference import ReferenceOps

OPS = ReferenceOps()


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    u = np.atleast_1d(np.asarray(u, np.float64))
    n = max(len(logits), len(u))
    f = [np.full(n, a, np.float32) for a in (temperature, top_p, min_p)]
    rows = np.broadcast_to(logits, (n, logits.shape[1]))
    return OPS.sample(rows, f[0], np.full(n, top_k, np.int32), f[1], f[2], np.broadcast_to(u, n))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 8, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 1e-6},
        {"min_p": 1.0},
    ],
)
def test_the_distribution_is_the_warped_one(options):
    """u over an even grid: every token is drawn as often as its probability says, to one grid step per token."""
    logits = np.random.default_rng(0).standard_normal(40).astype(np.float32) * 2
    n = 5000
    ids = draw(logits, (np.arange(n) + 0.5) / n, **options)
    p = warp(logits, SamplingParams(**options))
    assert np.abs(np.bincount(ids, minlength=40) / n - p).max() <= 1.01 / n
    descending = np.argsort(-logits, kind="stable").tolist()
    places = [descending.index(i) for i in ids]
    assert places == sorted(places), "the inverse CDF runs in descending order of probability"


def test_greedy_takes_the_lowest_of_equals():
    logits = np.array([0.0, 3.0, 3.0, 1.0])
    assert draw(logits, 0.99, temperature=0.0)[0] == 1
    assert draw(logits, 0.99, temperature=9e-6)[0] == 1
    assert draw(logits, 0.99, temperature=2e-5)[0] == 2, "two equals share the mass"
    assert draw(logits, 0.49, temperature=2e-5)[0] == 1
    assert draw(logits, 0.99, top_k=1)[0] == 1


def test_cuts_take_the_lower_id_on_ties():
    flat = np.zeros(10)
    assert set(draw(flat, np.linspace(0, 0.999, 50), top_k=3)) == {0, 1, 2}
    assert set(draw(flat, np.linspace(0, 0.999, 50), top_p=0.35)) == {0, 1, 2, 3}
    assert set(draw(flat[:8], np.linspace(0, 0.999, 50), top_p=0.25)) == {0, 1}, "a quarter is reached by two of eight"
    assert set(draw(flat, np.linspace(0, 0.999, 50), min_p=1.0)) == set(range(10))


def test_the_ends_of_the_unit_interval():
    assert draw([0.0, 0.0], 0.5)[0] == 1, "u on the border of two tokens belongs to the second"
    logits = np.array([5.0, 0.0, -np.inf, -800.0])
    assert draw(logits, 0.0)[0] == 0
    assert draw(logits, np.nextafter(1.0, 0.0))[0] == 1, "a token without probability is never drawn"
    one = np.full(1000, -np.inf)
    one[7] = -1e4
    assert (draw(one, np.linspace(0, 1 - 1e-16, 9)) == 7).all()
    assert (draw(one, np.linspace(0, 1 - 1e-16, 9), temperature=100.0, top_k=2000) == 7).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_rows(temperature):
    good = np.array([0.0, 1.0, -np.inf])
    rows = np.array([good, [0, np.nan, 1], [-np.inf] * 3, [0, np.inf, 1], [np.nan] * 3, good])
    ids = draw(rows, np.full(6, 0.1), temperature=temperature)
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, -1, -1, -1, -1, 1]


def test_rows_have_their_own_options():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((30, 25)).astype(np.float32)
    temperature, top_p, min_p = (rng.uniform(0.1, 1, 30).astype(np.float32) for _ in range(3))
    top_k, u = rng.integers(0, 25, 30).astype(np.int32), rng.uniform(size=30)
    ids = OPS.sample(rows, temperature, top_k, top_p, min_p, u)
    for r in range(30):
        at = slice(r, r + 1)
        assert OPS.sample(rows[at], temperature[at], top_k[at], top_p[at], min_p[at], u[at])[0] == ids[r]


def test_logprobs():
    rows = np.random.default_rng(2).standard_normal((6, 50)).astype(np.float32)
    rows[0, [3, 9, 4]] = 7.0
    exact = rows.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    ids = np.array([3, 0, 1, 2, 49, 5])
    own, top_ids, top = OPS.logprobs(rows, ids, 5)
    assert (own.dtype, top_ids.dtype, top.dtype) == (np.float32, np.int64, np.float32)
    np.testing.assert_allclose(own, exact[range(6), ids], rtol=0, atol=1e-6)
    assert top_ids[0, :3].tolist() == [3, 4, 9]
    for r in range(6):
        assert top_ids[r].tolist() == sorted(range(50), key=lambda i: (-rows[r, i], i))[:5]
        np.testing.assert_allclose(top[r], exact[r, top_ids[r]], rtol=0, atol=1e-6)
    own, top_ids, top = OPS.logprobs(rows, ids, 0)
    assert top_ids.shape == top.shape == (6, 0)
    assert OPS.logprobs(rows, ids, 50)[1].shape == (6, 50)


def test_logprobs_of_unusable_rows():
    rows = np.array([[0, np.nan, 1], [-np.inf] * 3, [0, -np.inf, 0]], np.float32)
    own, top_ids, top = OPS.logprobs(rows, np.array([0, 0, 1]), 2)
    assert np.isnan(own[:2]).all()
    assert own[2] == -np.inf
    assert ((top_ids >= 0) & (top_ids < 3)).all()
    np.testing.assert_allclose(top[2], np.log(0.5), atol=1e-6)
