"""Heads in two passes on every instruction set: which blocks are computed again, with whose bits, in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import pack

from paceline.ops import RESCORED
from paceline.ops.packed import LANES
from paceline.ops.reference import ReferenceOps

# (outputs, K): few blocks, odd ends, a large head
SHAPES = [(5, 40), (1024, 33), (1030, 100), (3001, 96), (2600, 2080), (32768 + 7, 40)]
PAIRS = [("int4", 32, "int8", 32), ("int4g", 64, "bf16", 0), ("int4", 32, "f32", 0), ("int8", 0, "int8", 128)]


def matrix(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def again(coarse: np.ndarray) -> np.ndarray:
    """Which outputs are computed again, by sorting."""
    n_rows, n_out = coarse.shape
    n = -(-n_out // LANES)
    blocks = np.full((n_rows, n * LANES), -np.inf, np.float32)
    blocks[:, :n_out] = np.where(np.isnan(coarse), np.inf, coarse)
    best = blocks.reshape(n_rows, n, LANES).max(2)
    chosen = np.zeros((n_rows, n), bool)
    for r in range(n_rows):
        chosen[r, sorted(range(n), key=lambda b: (-best[r, b], b))[:RESCORED]] = True
    return np.repeat(chosen, LANES, axis=1)[:, :n_out]


def same_bits(a, b) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check(ops, x, coarse, fine) -> np.ndarray:
    y, a, b = (np.asarray(y) for y in (ops.rescored(x, coarse, fine), ops.linear(x, coarse), ops.linear(x, fine)))
    assert same_bits(y, np.where(again(a), b, a))
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best_blocks_are_the_fine_ones(ops, ops1, shape):
    w = matrix(1, *shape)
    coarse, fine = pack(w, "int4", 32)[0], pack(w, "int8", 32)[0]
    x = matrix(2, 33, shape[1])
    whole = check(ops, x, coarse, fine)
    for rows in (1, 2, 8):
        assert same_bits(check(ops, x[:rows], coarse, fine), whole[:rows])
    for r in (0, 7, 32):
        assert same_bits(ops1.rescored(x[r : r + 1], coarse, fine), whole[r : r + 1])
    assert same_bits(ops1.rescored(x, coarse, fine), whole)


@pytest.mark.parametrize(("a", "a_group", "b", "b_group"), PAIRS)
def test_any_two_formats(ops, a, a_group, b, b_group):
    w = matrix(1, 1500, 130)
    for rows in (1, 20, 40):
        check(ops, matrix(rows, rows, 130), pack(w, a, a_group)[0], pack(w, b, b_group)[0])


@pytest.mark.parametrize("n", [700, 1100, 33000])
def test_against_the_reference(ops, n):
    w, x = matrix(3, n, 96), matrix(4, 9, 96)
    coarse, fine = pack(w, "int4", 32)[0], pack(w, "int8", 32)[0]
    want, y = ReferenceOps().rescored(x, coarse, fine), np.asarray(ops.rescored(x, coarse, fine))
    on_tiles = ops.isa.startswith("amx") and n < 1 << 15  # activations in bfloat16 there
    assert np.abs(y - want).max() < (0.3 if on_tiles else 1e-4)


def test_ties_go_to_the_lower_block(ops):
    """All coarse logits alike, then all but those of the last blocks."""
    n = 100 * LANES + 3
    same, fine = np.ones((n, 32), np.float32), pack(matrix(1, n, 32), "int8", 32)[0]
    x = np.abs(matrix(2, 5, 32))
    for n_raised in (0, 4):
        start = (101 - n_raised) * LANES
        same[start:] = 2
        y, b = check(ops, x, pack(same, "int4", 32)[0], fine), np.asarray(ops.linear(x, fine))
        n_low = (RESCORED - n_raised) * LANES
        assert same_bits(y[:, :n_low], b[:, :n_low])
        assert not (y[:, n_low:start] == b[:, n_low:start]).any()
        assert same_bits(y[:, start:], b[:, start:])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_logits(ops, ops1, data):
    """One input, so that the weights are the logits: few distinct values, infinite ones and NaN among them."""
    n = data.draw(st.integers(1, 2200))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    values = data.draw(
        st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0, np.inf, -np.inf, np.nan]), min_size=1, max_size=4)
    )
    logits = rng.choice(np.array(values, np.float32), (n, 1))
    if data.draw(st.booleans()):
        logits += rng.standard_normal((n, 1), np.float32)
    logits = data.draw(st.sampled_from([lambda a: a, lambda a: np.sort(a, 0), lambda a: np.sort(a, 0)[::-1]]))(logits)
    coarse, fine = pack(logits, "f32")[0], pack(np.full((n, 1), 1000, np.float32), "f32")[0]
    x = np.ones((data.draw(st.integers(1, 3)), 1), np.float32)
    for o in (ops, ops1):
        got = np.asarray(o.rescored(x, coarse, fine)) == 1000
        assert (got == again(np.asarray(o.linear(x, coarse)))).all()
    assert (got == (ReferenceOps().rescored(x, coarse, fine) == 1000)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_number_leaves_the_others(ops, bad):
    w = matrix(1, 1500, 96)
    coarse, fine = pack(w, "int4", 32)[0], pack(w, "int8", 32)[0]
    x = matrix(2, 20, 96)
    clean = np.asarray(ops.rescored(x, coarse, fine)).copy()
    x[3, 5] = bad
    y = np.asarray(ops.rescored(x, coarse, fine))
    assert not np.isfinite(y[3]).any()
    assert same_bits(np.delete(y, 3, 0), np.delete(clean, 3, 0))


def test_shapes_that_do_not_fit_are_refused(ops):
    a, b = pack(matrix(1, 64, 32), "int4", 32)[0], pack(matrix(1, 80, 32), "int8", 32)[0]
    with pytest.raises(ValueError, match="both matrices"):
        ops.rescored(matrix(1, 2, 32), a, b)
    assert np.asarray(ops.rescored(np.empty((0, 32), np.float32), b, b)).shape == (0, 80)
