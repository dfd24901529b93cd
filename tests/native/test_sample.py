"""Sampling and log-probabilities of every instruction set against a slow, exact version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.ops.native import NativeOps

TOLERANCE = 2e-5  # of mass: float32 weights


def rows(x, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, u=0.5):
    n = len(x)
    return (
        np.asarray(x, np.float32),
        np.broadcast_to(np.float32(temperature), n),
        np.broadcast_to(np.int32(top_k), n),
        np.broadcast_to(np.float32(top_p), n),
        np.broadcast_to(np.float32(min_p), n),
        np.broadcast_to(np.float64(u), n),
    )


def acceptable(x, temperature, top_k, top_p, min_p, u) -> set[int]:
    """Every id that exact arithmetic gives when masses and cuts may err by TOLERANCE."""
    order = np.argsort(-x.astype(np.float64), kind="stable")
    p = np.exp((x[order].astype(np.float64) - float(x.max())) / float(temperature))
    p = p[: top_k or None]
    top_p, min_p = float(top_p), float(min_p)
    ends = {len(p)}
    if top_p < 1:
        mass = np.cumsum(p) / p.sum()
        ends = {min(len(p), 1 + int(np.searchsorted(mass, t))) for t in (top_p - TOLERANCE, top_p, top_p + TOLERANCE)}
        ends = set(range(min(ends), max(ends) + 1))
    found: set[int] = set()
    for end in ends:
        for cut in {max(1, int(np.count_nonzero(p[:end] >= min_p * f))) for f in (1 - TOLERANCE, 1, 1 + TOLERANCE)}:
            mass = np.cumsum(p[:cut]) / p[:cut].sum()
            lo, hi = (min(cut - 1, int(np.searchsorted(mass, u + t, side="right"))) for t in (-TOLERANCE, TOLERANCE))
            found |= {int(i) for i in order[lo : hi + 1]}
    return found


@pytest.fixture(scope="module")
def fast() -> NativeOps:
    return NativeOps(n_threads=2)


@st.composite
def draws(draw):
    n = draw(st.sampled_from([1, 2, 15, 16, 17, 64, 100, 1023, 1025, 3000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = (rng.standard_normal(n) * draw(st.sampled_from([0.0, 0.1, 1, 4, 30]))).astype(np.float32)
    if draw(st.booleans()):
        x = np.round(x)  # many ties
    if draw(st.booleans()) and n > 2:
        x[rng.permutation(n)[: n // 3]] = -np.inf
    return (
        x,
        np.float32(draw(st.sampled_from([0.05, 0.7, 1.0, 1.7, 50.0]))),
        draw(st.sampled_from([0, 1, 2, 10, 40, 10**6])),
        np.float32(draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]))),
        np.float32(draw(st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]))),
        draw(st.floats(0, 1, exclude_max=True)),
    )


@settings(max_examples=400, deadline=None)
@given(draws())
def test_sample_is_the_inverse_cdf(fast, case):
    x, temperature, top_k, top_p, min_p, u = case
    got = int(fast.sample(*rows(x[None], temperature, top_k, top_p, min_p, u))[0])
    assert got in acceptable(x, temperature, min(top_k, len(x)), top_p, min_p, u)


@pytest.mark.parametrize("isa_case", range(40))
def test_every_instruction_set(ops, isa_case):
    rng = np.random.default_rng(isa_case)
    x = (rng.standard_normal(2000) * rng.choice([0.5, 2, 6])).astype(np.float32)
    args = (
        np.float32(rng.choice([0.5, 1.3])),
        int(rng.choice([0, 50])),
        np.float32(rng.choice([0.8, 1.0])),
        np.float32(rng.choice([0.0, 0.02])),
    )
    u = float(rng.random())
    assert int(ops.sample(*rows(x[None], *args, u))[0]) in acceptable(x, *args, u)


def test_draws_follow_the_distribution(ops):
    """Frequencies over a grid of u are the probabilities."""
    x = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.5], np.float32)
    u = (np.arange(20000) + 0.5) / 20000
    ids = ops.sample(*rows(np.tile(x, (20000, 1)), 0.8)[:5], u)
    p = np.exp(x.astype(np.float64) / np.float32(0.8))
    np.testing.assert_allclose(np.bincount(ids, minlength=6) / 20000, p / p.sum(), atol=1e-4)
    assert list(ids[np.flatnonzero(np.diff(ids)) + 1]) == [3, 2, 0, 5, 4]  # descending, ties by lower id


def test_greedy(ops):
    x = np.random.default_rng(1).standard_normal((50, 1111)).astype(np.float32)
    x[:, 700] = x.max(axis=1)  # ties
    assert np.array_equal(ops.sample(*rows(x, 0.0)), x.argmax(axis=1))
    assert np.array_equal(ops.sample(*rows(x, 9e-6)), x.argmax(axis=1))
    assert np.array_equal(ops.sample(*rows(x, 1.0, top_k=1, u=0.999)), x.argmax(axis=1))
    assert np.array_equal(ops.sample(*rows(x, 1.0, top_p=0.0, u=0.999)), x.argmax(axis=1))
    assert np.array_equal(ops.sample(*rows(x, 1.0, min_p=1.0, u=0.0)), x.argmax(axis=1))
    x[3] = -np.inf
    x[3, 1110] = -5
    assert ops.sample(*rows(x, 0.0))[3] == 1110


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_rows_fail_alone(ops, temperature):
    x = np.random.default_rng(2).standard_normal((8, 333)).astype(np.float32)
    good = ops.sample(*rows(x, temperature))
    x[1, 332], x[2, 0], x[3] = np.nan, np.inf, -np.inf
    x[4, :] = np.nan
    x[5, 7] = -np.inf
    x[6, 9] = -3.4028235e38
    ids = ops.sample(*rows(x, temperature))
    assert list(ids[[1, 2, 3, 4]]) == [-1] * 4
    assert np.array_equal(ids[[0, 7]], good[[0, 7]])
    assert (ids[[5, 6]] >= 0).all()


def test_same_choice_in_any_batch(ops, ops1):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 5000)).astype(np.float32) * 3
    args = (
        x,
        np.float32(rng.choice([0.0, 0.6, 1.5], 40)),
        np.int32(rng.choice([0, 20], 40)),
        np.float32(rng.choice([0.9, 1], 40)),
        np.float32(rng.choice([0, 0.01], 40)),
        rng.random(40),
    )
    whole = ops.sample(*args)
    assert [int(ops1.sample(*(a[i : i + 1] for a in args))[0]) for i in range(40)] == whole.tolist()
    same = NativeOps("generic", 1)
    assert np.array_equal(same.sample(*args), whole)


@pytest.mark.parametrize("n_top", [0, 1, 5, 300])
def test_logprobs(ops, n_top):
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((12, 300)) * 5).astype(np.float32)
    x[2, 10:] = -np.inf
    x[3] = np.round(x[3])
    x[4] = 0
    x[5, :280] += 500
    ids = rng.integers(0, 300, 12)
    own, top_ids, top = ops.logprobs(x, ids, n_top)
    e = x.astype(np.float64)
    want = e - e.max(1, keepdims=True)
    want -= np.log(np.exp(want).sum(1, keepdims=True))
    np.testing.assert_allclose(own, want[np.arange(12), ids], rtol=3e-7, atol=1e-6)
    order = np.argsort(-x, axis=1, kind="stable")[:, :n_top]
    assert np.array_equal(top_ids, order)
    np.testing.assert_allclose(top, np.take_along_axis(want, order, 1), rtol=3e-7, atol=1e-6)


def test_logprobs_of_unusable_rows(ops):
    x = np.zeros((3, 20), np.float32)
    x[0, 3], x[1] = np.nan, -np.inf
    own, top_ids, top = ops.logprobs(x, np.zeros(3, np.int64), 4)
    assert np.isnan(own[:2]).all()
    assert np.isnan(top[:2]).all()
    assert ((top_ids >= 0) & (top_ids < 20)).all()
    np.testing.assert_allclose(own[2], -np.log(20), rtol=1e-6)


@pytest.mark.parametrize("n", [128_256, 262_144])
def test_large_vocabulary(fast, n):
    x = (np.random.default_rng(n).standard_normal(n) * 3).astype(np.float32)
    for args in ((1.0, 0, 1.0, 0.0), (0.8, 40, 0.95, 0.0), (1.0, 0, 0.9, 0.0), (1.5, 0, 1.0, 0.05), (3.0, 0, 1.0, 0.0)):
        case = (np.float32(args[0]), args[1], np.float32(args[2]), np.float32(args[3]))
        for u in (0.0, 0.3, 0.97):
            assert int(fast.sample(*rows(x[None], *case, u))[0]) in acceptable(x, *case, u)
