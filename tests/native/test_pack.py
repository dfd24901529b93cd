"""The native packer gives the bits of ops/formats, whose NumPy arithmetic is normative."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from paceline.core.errors import CheckpointError
from paceline.ops import formats

CASES = [("f32", 0, False), ("f16", 0, False), ("bf16", 0, False), ("int8", 0, False)]
CASES += [("int8", g, False) for g in (32, 64, 128)] + [("int4g", g, m) for g in (32, 64, 128) for m in (False, True)]
CASES += [("int4", 32, False)]


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("fmt", "group", "mins"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_same_bits_as_numpy(ops, fmt, group, mins, dtype):
    rng = np.random.default_rng(1)
    for n, k in ((1, 1), (3, 17), (16, 64), (33, 100), (40, 700)):
        w = rng.standard_normal((n, k), dtype=np.float32)
        w[0, : k // 2] = 0  # whole groups of zeros
        w[-1, k // 3 :] = np.float32(0.5) * rng.integers(-3, 4, k - k // 3)  # ties in size and in rounding
        w = w.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        got, want = ops.pack(w, fmt, group, mins), formats.get(fmt).pack(w, group, mins)
        assert (got.format, got.shape, got.group) == (want.format, want.shape, want.group)
        assert same(got.data, want.data), (n, k)
        assert same(got.scales, want.scales), (n, k)
        assert same(got.mins, want.mins), (n, k)
        assert same(got.factors, want.factors), (n, k)


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", "int8", "int4", "int4g"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_refused(ops, fmt, bad):
    w = np.ones((20, 70), np.float32)
    w[17, 69] = bad
    with pytest.raises(CheckpointError, match="NaN and"):
        ops.pack(w, fmt)


@pytest.mark.parametrize("fmt", ["f16", "int8", "int4g"])
def test_beyond_the_range_is_refused(ops, fmt):
    with pytest.raises(CheckpointError):
        ops.pack(np.full((16, 64), 1e12, np.float32), fmt)


def test_strided_weights(ops):
    w = np.random.default_rng(1).standard_normal((64, 48), dtype=np.float32).T
    assert same(ops.pack(w, "int4").data, formats.get("int4").pack(w).data)


def test_what_the_format_refuses(ops):
    with pytest.raises(CheckpointError, match="group = 48"):
        ops.pack(np.ones((16, 64), np.float32), "int4", 48)
