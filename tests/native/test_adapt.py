"""Adapters on the native kernels: against NumPy in float64, the same bits in any company, rows without one untouched."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from paceline import _native
from paceline.core.batch import Batch
from paceline.ops.adapters import LowRank
from paceline.ops.native import NativeOps
from paceline.ops.packed import Packed
from paceline.ops.reference import ReferenceOps

N_IN, N_OUT = 83, 150
BF16 = ml_dtypes.bfloat16


def matrix(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def update(seed: int, rank: int, n_in: int, n_out: int, col: int = 0, dtype: type = np.float32) -> LowRank:
    a, b = matrix(seed, rank, n_in).astype(dtype), matrix(seed + 1, n_out, rank).astype(dtype)
    return LowRank(a, b, 0.25 + seed % 7, col)


# one site; several modules in it, of other ranks and types; nothing there
ADAPTERS = [
    [[update(10, 16, N_IN, N_OUT)]],
    [[update(20, 3, N_IN, 40, 0), update(22, 1, N_IN, 17, 64), update(24, 8, N_IN, 9, 141)]],
    [[update(30, 70, N_IN, N_OUT, 0, BF16)]],
    [[]],
    [[update(40, 5, N_IN, 31, 7, BF16), update(42, 2, N_IN, 60, 50)]],
]


def batch(lens: list[int], of: list[int] | None, adapters: list) -> Batch:
    cu = np.cumsum([0, *lens]).astype(np.int32)
    n = int(cu[-1])
    rows = np.zeros(n, np.int32), np.arange(n, dtype=np.int32), cu, np.array([n - 1], np.int32)
    return Batch(*rows, [], [], adapters=adapters, adapter_of=None if of is None else np.array(of, np.int32))


def run(ops, y, x, lens, of):
    b = ops.begin(batch(lens, of, [ops.adapter(a) for a in ADAPTERS]))
    return np.array(ops.adapt(y.copy(), x, b, 0))


def expected(y, x, lens, of):
    out, row = y.astype(np.float64), 0
    for n, which in zip(lens, of, strict=True):
        for u in ADAPTERS[which][0] if which >= 0 else []:
            h = x[row : row + n].astype(np.float64) @ u.a.astype(np.float64).T * u.scale
            out[row : row + n, u.col : u.col + len(u.b)] += h @ u.b.astype(np.float64).T
        row += n
    return out


LENS, OF = [1, 5, 70, 1, 1, 40, 2, 3, 33], [0, 1, 2, -1, 2, 4, 0, 3, 1]


def test_against_numpy(ops):
    n = sum(LENS)
    x, y = matrix(1, n, N_IN), matrix(2, n, N_OUT)
    for backend in (ops, ReferenceOps()):
        got, want = run(backend, y, x, LENS, OF), expected(y, x, LENS, OF)
        assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


def test_a_row_has_its_bits_in_any_company_and_on_any_threads(ops, ops1):
    n = sum(LENS)
    x, y = matrix(3, n, N_IN), matrix(4, n, N_OUT)
    whole = run(ops, y, x, LENS, OF)
    assert whole.tobytes() == run(ops1, y, x, LENS, OF).tobytes()
    row = 0
    for length, which in zip(LENS, OF, strict=True):
        rows = slice(row, row + length)
        assert run(ops, y[rows], x[rows], [length], [which]).tobytes() == whole[rows].tobytes()
        for r in range(row, row + length, 7):
            assert run(ops, y[r : r + 1], x[r : r + 1], [1], [which]).tobytes() == whole[r : r + 1].tobytes()
        if which in (-1, 3):
            assert whole[rows].tobytes() == y[rows].tobytes()
        row += length


def test_many_rows_and_columns(ops, ops1):
    big = [[update(50, 32, 576, 3072)]]
    x, y = matrix(5, 130, 576), matrix(6, 130, 3072)

    def through(backend, lo, hi):
        b = backend.begin(batch([hi - lo], [0], [backend.adapter(big)]))
        return np.array(backend.adapt(y[lo:hi].copy(), x[lo:hi], b, 0))

    u = big[0][0]
    want = y + (x.astype(np.float64) @ u.a.T * u.scale) @ u.b.T.astype(np.float64)
    got = through(ops, 0, 130)
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()
    assert got.tobytes() == through(ops1, 0, 130).tobytes()
    assert got[57:66].tobytes() == through(ops, 57, 66).tobytes()


def test_within_a_program(ops):
    """In place in the arena, after a linear and before a gate and a sum; an input is not changed."""
    from weights import pack

    up: Packed = pack(matrix(7, N_OUT, N_IN), "f32")[0]
    down: Packed = pack(matrix(8, N_IN, N_OUT // 2), "f32")[0]

    def net(x, b):
        h = ops.adapt(ops.linear(x, up), x, b, 0)
        return ops.add(x, ops.linear(ops.gated(h, "silu"), down)), ops.adapt(x, x, b, 1)

    both = [[updates[0], [update(60 + i, 4, N_IN, N_IN)]] for i, updates in enumerate(ADAPTERS)]
    bound = [ops.adapter(a) for a in both]
    x = matrix(9, sum(LENS), N_IN)
    kept = x.copy()
    b = ops.begin(batch(LENS, OF, bound))
    first, second = ops.compile(net, (N_IN,))(x, b)
    assert np.array_equal(x, kept)
    h = run(ops, np.array(ops.linear(x, up)), x, LENS, OF)
    want = np.array(ops.add(x, ops.linear(ops.gated(h, "silu"), down)))
    assert np.asarray(first).tobytes() == want.tobytes()
    assert np.asarray(second).tobytes() == np.array(ops.adapt(x.copy(), x, b, 1)).tobytes()
    plain = ops.begin(batch(LENS, None, []))
    assert np.asarray(ops.compile(net, (N_IN,))(x, plain)[1]).tobytes() == x.tobytes()


def test_misuse_is_an_error():
    ops = NativeOps(n_threads=1)
    f32 = np.float32
    for sites, text in (
        ([(np.zeros((2, 3), f32), np.zeros(1, f32), [])], "scale"),
        ([(np.zeros((2, 3), f32), np.zeros(2, f32), [])], "add up"),
        ([(np.zeros((2, 3), f32), np.zeros(2, f32), [(np.zeros((1, 2, 8), f32), 0, 5)])], "16"),
        ([(np.zeros((2, 3), f32), np.zeros(2, f32), [(np.zeros((1, 2, 16), f32), 0, 17)])], "columns"),
        ([(np.zeros((2, 3), f32), np.zeros(2, f32), [(np.zeros((1, 2, 16), np.uint16), 0, 5)])], "type"),
        ([(np.zeros((2, 3), f32), np.zeros(2, f32), [(np.zeros((1, 2, 16), f32), -1, 5)])], "columns"),
    ):
        with pytest.raises(ValueError, match=text):
            _native.Adapter(sites)
    adapter = ops.adapter(ADAPTERS[0])
    x, y = matrix(1, 2, N_IN), matrix(2, 2, N_OUT)
    with pytest.raises(ValueError, match="does not exist"):
        ops.begin(batch([2], [1], [adapter]))
    with pytest.raises(ValueError, match="one for each"):
        ops.begin(batch([1, 1], [0], [adapter]))
    b = ops.begin(batch([2], [0], [adapter]))
    with pytest.raises(ValueError, match="lacks this site"):
        ops.adapt(y.copy(), x, b, 1)
    with pytest.raises(ValueError, match="other columns"):
        ops.adapt(y.copy(), x[:, :-1].copy(), b, 0)
    with pytest.raises(ValueError, match="beyond"):
        ops.adapt(y[:, :-1].copy(), x, b, 0)
