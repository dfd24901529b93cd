"""Linear kernels of every instruction set against float64, and their promise of the same bits in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from weights import FORMATS, exact, pack

SHAPES = [(1, 1), (3, 17), (17, 64), (100, 3), (576, 192), (40, 4100)]  # (N, K)


def matrix(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def close(y: np.ndarray, x: np.ndarray, w: np.ndarray, want: np.ndarray) -> None:
    """Float32 accumulation errs by at most about K ulp of sum |x||w|; in practice far less."""
    size = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T + 1.0
    assert np.max(np.abs(np.asarray(y) - want) / size) < 2e-6


@pytest.mark.parametrize(("fmt", "group", "mins"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(ops, shape, fmt, group, mins):
    n, k = shape
    w, bias = matrix(1, n, k), matrix(2, n)
    packed, plain = pack(w, fmt, group, mins)
    for m in (1, 3, 5, 17, 70):
        x = matrix(100 + m, m, k)
        for b in (None, bias):
            close(ops.linear(x, packed, b), x, w, exact(x, fmt, plain, group, b, ops.isa))


@pytest.mark.parametrize(("fmt", "group", "mins"), FORMATS)
def test_same_bits_in_any_batch(ops, ops1, fmt, group, mins):
    n, k = 200, 640
    packed, _ = pack(matrix(1, n, k), fmt, group, mins)
    x = matrix(7, 70, k)
    alone = np.concatenate([np.asarray(ops1.linear(x[i : i + 1], packed)) for i in range(70)])
    order = np.random.default_rng(3).permutation(70)
    for o in (ops, ops1):
        for m in range(1, 71):
            assert np.array_equal(np.asarray(o.linear(x[:m], packed)), alone[:m]), m
        assert np.array_equal(np.asarray(o.linear(x[order], packed)), alone[order])


@pytest.mark.parametrize(("fmt", "group", "mins"), FORMATS)
def test_many_rows_and_chunks(ops, ops1, fmt, group, mins):
    """More rows than a panel and more k's than a chunk of the blocked kernels."""
    n, k, m = 48, 4480, 530
    w = matrix(1, n, k)
    packed, plain = pack(w, fmt, group, mins)
    x = matrix(2, m, k)
    y = np.asarray(ops.linear(x, packed))
    close(y, x, w, exact(x, fmt, plain, group, None, ops.isa))
    for rows in (slice(0, 1), slice(511, 530), slice(100, 140)):
        assert np.array_equal(y[rows], np.asarray(ops1.linear(x[rows], packed)))


@pytest.mark.parametrize(("fmt", "group", "mins"), FORMATS)
def test_integers_are_exact(ops, fmt, group, mins):
    """Small integers come out exactly, so a wrong lane or a saturated product cannot hide in a tolerance."""
    rng = np.random.default_rng(5)
    n, k = 33, 256
    w = rng.integers(-7, 8, (n, k)).astype(np.float32)
    if fmt == "int8":
        w[:, ::32] = 127
    if fmt.startswith("int4"):
        w[:, ::32] = -8
        if mins:
            w[:, 1::32] = 7
    if fmt == "int4":
        w[:, :32] *= 15
        w[:, 32:64] *= -4
    x = rng.integers(-127, 128, (9, k)).astype(np.float32)
    x[:, ::32] = 127
    packed, _ = pack(w, fmt, group, mins)
    assert np.array_equal(np.asarray(ops.linear(x, packed)), x @ w.T)


@pytest.mark.parametrize("fmt", ["int8", "int4g"])
def test_extreme_codes_do_not_saturate(ops, fmt):
    k = 128
    w = np.full((16, k), 127.0 if fmt == "int8" else 15.0, np.float32)
    w[8:] *= -1 if fmt == "int8" else 1
    w[:, 0] = 127 if fmt == "int8" else 0
    packed, _ = pack(w, fmt, 128 if fmt == "int4g" else 0, fmt == "int4g")
    for m in (1, 6):
        for sign in (1, -1):
            x = np.full((m, k), 127.0 * sign, np.float32)
            assert np.array_equal(np.asarray(ops.linear(x, packed)), x @ w.T)


def test_extreme_factors_do_not_saturate(ops):
    """Codes of -8 with factors of 15 and -15 against activations of 127: the largest sums that occur, alone and over many k's."""
    k = 4096
    w = np.full((16, k), -120.0, np.float32)
    w[:, 32:64] = 120
    w[8:, 64:] *= -1
    packed, _ = pack(w, "int4", 32)
    for m in (1, 6, 40):
        for sign in (1, -1):
            x = np.full((m, k), 127.0 * sign, np.float32)
            assert np.array_equal(np.asarray(ops.linear(x, packed)), x @ w.T)


@pytest.mark.parametrize(("fmt", "group", "mins"), FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_own_row(ops, fmt, group, mins, bad):
    packed, _ = pack(matrix(1, 32, 96), fmt, group, mins)
    for m in (3, 20):
        x = matrix(2, m, 96)
        clean = np.asarray(ops.linear(x, packed)).copy()
        x[1, 5] = bad
        y = np.asarray(ops.linear(x, packed))
        assert not np.isfinite(y[1]).any()
        assert np.array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


def test_zero_rows(ops):
    packed, _ = pack(matrix(1, 32, 96), "f32")
    assert np.asarray(ops.linear(np.empty((0, 96), np.float32), packed)).shape == (0, 32)
