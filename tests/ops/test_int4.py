"""int4 with whole factors: its meaning, its choice of factors, and that it is an int8 matrix in disguise."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.core.errors import CheckpointError, ConfigError
from paceline.ops import formats
from paceline.ops.formats import int4


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (16, 64), (33, 100), (40, 700)])
def test_values_lie_within_half_a_step(shape):
    w = weights(*shape)
    p = formats.pack(w, "int4")
    c = formats.get("int4").codes(p)
    assert (c.bits, c.group, c.q.dtype, c.scales.dtype) == (8, 0, np.int8, np.float32)
    assert np.abs(c.q).max() <= 120
    got = formats.get("int4").unpack(p)
    np.testing.assert_array_equal(got, c.scales * c.q.astype(np.float32))
    np.testing.assert_array_equal(formats.get("int4").rows(p, np.array([0, shape[0] - 1])), got[[0, shape[0] - 1]])
    # a group's step is at most top / 7.5 by the choice of factor, and a value beyond +7 steps loses up to one
    top = np.abs(np.pad(w, ((0, 0), (0, -shape[1] % 32)))).reshape(shape[0], -1, 32).max(2)
    scale = np.abs(w).max(1, keepdims=True) / 120
    bound = np.repeat(1.1 * (top / 8 + 2 * scale), 32, axis=1)[:, : shape[1]]
    assert (np.abs(got - w) <= bound + 1e-7).all()


def test_the_widest_element_of_a_row_is_exact_and_zero_groups_are_zero():
    w = weights(4, 96)
    w[0, 7] = -9.0
    w[1] = 0
    w[2, 32:64] = 0
    got = formats.get("int4").unpack(formats.pack(w, "int4"))
    assert got[0, 7] == pytest.approx(-9.0, rel=1e-6)
    assert not got[1].any()
    assert not got[2, 32:64].any()


def test_no_neighbouring_factor_is_better():
    w = weights(8, 256, seed=3).reshape(8, 8, 32)
    codes, factors, scales = int4.quantise(w)
    step = scales[:, None, None] * factors[..., None].astype(np.float32)
    error = (((codes.astype(np.float32) - 8) * step - w) ** 2).sum(-1)
    for by in (-1, 1):
        size = np.abs(factors.astype(int)) + by
        other = scales[:, None, None] * (np.sign(factors) * size)[..., None].astype(np.float32)
        q = np.clip(np.rint(w / np.where(other == 0, np.inf, other)), -8, 7)
        worse = ((q * other - w) ** 2).sum(-1)
        first_choice = np.rint(
            np.abs(np.take_along_axis(w, np.abs(w).argmax(-1)[..., None], -1)[..., 0]) / 8 / scales[:, None]
        )
        tried = (size >= 1) & (size <= 15) & (np.abs(size - first_choice) <= 1)
        assert (error[tried] <= worse[tried] * (1 + 1e-5)).all()


def test_it_beats_the_grouped_format_of_more_bits():
    """On normal weights the error is not above that of int4g in groups of 32, which takes 4.5 bits (Q4_0)."""
    w = weights(256, 1024, seed=5)

    def error(name: str) -> float:
        return float(np.square(formats.get(name).unpack(formats.pack(w, name)) - w).mean())

    assert formats.parse("int4").bits == 4.25 < formats.parse("int4g").bits == 4.5
    assert error("int4") < 1.02 * error("int4g")


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="group = 64: must be 32; int4g has other groups"):
        formats.parse("int4:group=64")
    with pytest.raises(ConfigError, match="use int4g"):
        formats.parse("int4:mins")
    assert "131072" in (formats.get("int4").why_not((16, 200000)) or "")
    with pytest.raises(CheckpointError, match="NaN"):
        formats.pack(np.full((4, 64), np.nan, np.float32), "int4")
