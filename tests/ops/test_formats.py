"""Weight formats: layout, arithmetic, round trips, errors."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import FORMATS, QUANTISED

from paceline.core.errors import CheckpointError, ConfigError
from paceline.ops import formats
from paceline.ops.packed import Codes, Packed

SHAPES = [(1, 1), (15, 17), (16, 64), (17, 65), (33, 100), (1, 130), (2, 256)]
shapes = st.tuples(st.sampled_from([1, 15, 16, 17, 40]), st.sampled_from([1, 17, 64, 65, 100, 129]))


def weights(shape: tuple[int, int], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def unpack(p: Packed) -> np.ndarray:
    return formats.get(p.format).unpack(p)


def code_at(p: Packed, n: int, k: int) -> int:
    """The code of one element by the index formulas of ops/packed.py."""
    if p.format == "int8":
        return int(p.data[n // 16, k // 4, n % 16, k % 4])
    block, place = divmod(k, 64)
    high, place = divmod(place, 32)
    byte = int(p.data[block_of(n), block, place // 4, n % 16, place % 4])
    return byte >> 4 if high else byte & 15


def block_of(n: int) -> int:
    return n // 16


def value_at(p: Packed, n: int, k: int) -> np.float32:
    if p.format == "f32":
        return p.data[n // 16, k, n % 16]
    if p.format in ("f16", "bf16"):
        return np.float32(p.data[n // 16, k // 2, n % 16, k % 2])
    assert p.scales is not None
    g = k // p.group if p.group else 0
    q, scale = np.float32(code_at(p, n, k)), np.float32(p.scales[n // 16, g, n % 16])
    if p.mins is not None:
        return scale * q + np.float32(p.mins[n // 16, g, n % 16])
    return scale * (q - 8 if p.format == "int4g" else q)


# ---------------------------------------------------------------- registry and text form


def test_the_folder_is_the_registry():
    folder = Path(formats.__file__).parent
    files = {p.stem for p in folder.glob("*.py")} - {"__init__", "base"}
    assert (
        set(formats.names())
        == {f for f in files if not f.startswith("_")}
        == {"f32", "f16", "bf16", "int8", "int4", "int4g"}
    )
    for name in formats.names():
        assert formats.get(name).name == name


@pytest.mark.parametrize("text", FORMATS)
def test_text_round_trip(text):
    assert str(formats.parse(text)) == text
    assert formats.parse(str(formats.parse(text))) == formats.parse(text)


def test_text_defaults_and_aliases():
    assert formats.parse("int4g") == formats.Spec("int4g", 32, False)
    assert formats.parse(" int4g:mins ") == formats.Spec("int4g", 32, True)
    assert formats.parse("int4g:group=64,mins=0") == formats.Spec("int4g", 64, False)
    assert formats.parse("bfloat16") == formats.Spec("bf16")
    assert formats.parse("int8:group=0").group == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int5", "unknown"),
        ("", "unknown"),
        ("int4g:group=48", "32, 64 or 128"),
        ("int4g:group=0", "32, 64 or 128"),
        ("int8:mins", "mins"),
        ("bf16:group=32", "no groups"),
        ("int4g:grp=32", "grp=32"),
        ("int4g:group=x", "group=x"),
        ("int4g:group=-32", "group=-32"),
        ("int4g:mins=2", "mins=2"),
        ("int4g:group=" + "9" * 5000, "32, 64 or 128"),
    ],
)
def test_text_errors_name_the_value(text, said):
    with pytest.raises(ConfigError) as e:
        formats.parse(text)
    assert said in str(e.value)
    assert "format = " in str(e.value)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("f32", 32),
        ("bf16", 16),
        ("int8:group=0", 8),
        ("int8:group=64", 8.25),
        ("int4g:group=128", 4.125),
        ("int4g:group=32,mins", 5),
    ],
)
def test_bits(text, bits):
    assert formats.parse(text).bits == bits
    n_bytes = formats.parse(text).nbytes((1600, 6400))
    assert n_bytes * 8 == pytest.approx(1600 * 6400 * bits, rel=1e-2)


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout_and_sizes(text, shape):
    spec = formats.parse(text)
    p = spec.pack(weights(shape))
    declared = spec.arrays(shape)
    for name in ("data", "scales", "mins"):
        array = getattr(p, name)
        assert (name in declared) == (array is not None)
        if array is not None:
            assert (array.shape, array.dtype) == declared[name]
            assert array.ctypes.data % 64 == 0
            assert array.flags.c_contiguous
    assert (p.format, p.shape, p.group) == (spec.name, shape, spec.group)
    assert p.nbytes == spec.nbytes(shape) == formats.nbytes(p) == formats.nbytes(formats.placeholder(spec, shape))
    by_hand = np.array([[value_at(p, n, k) for k in range(shape[1])] for n in range(shape[0])], np.float32)
    np.testing.assert_array_equal(unpack(p), by_hand)


@pytest.mark.parametrize("text", FORMATS)
def test_padding_is_zero_bytes(text):
    n, k = 17, 65
    p = formats.parse(text).pack(np.ones((n, k), np.float32))
    words = p.data.view(np.uint8).reshape(2, -1, 16, p.data.itemsize * int(np.prod(p.data.shape[3:], dtype=int)) or 4)
    assert not words[1, :, 1:].any()
    if p.scales is not None:
        assert not p.scales[1, :, 1:].any()
        assert not p.scales[:, -(-k // (p.group or k)) :].any()
        assert all(code_at(p, 0, at) == 0 for at in range(k, p.data.shape[1] * (64 if p.format == "int4g" else 4)))


def test_f32_and_halves_round_to_nearest_even():
    w = weights((33, 100), scale=3)
    np.testing.assert_array_equal(unpack(formats.get("f32").pack(w)), w)
    np.testing.assert_array_equal(unpack(formats.get("f16").pack(w)), w.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(unpack(formats.get("bf16").pack(w)), w.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("text", FORMATS)
def test_rows_reads_what_unpack_gives(text):
    p = formats.parse(text).pack(weights((40, 100)))
    ids = np.array([0, 39, 17, 17, 15])
    np.testing.assert_array_equal(formats.get(p.format).rows(p, ids), unpack(p)[ids])


@pytest.mark.parametrize("text", FORMATS)
def test_blocks_of_rows_pack_as_the_whole(text):
    w, spec = weights((70, 129)), formats.parse(text)
    whole, top, rest = spec.pack(w), spec.pack(w[:32]), spec.pack(w[32:])
    np.testing.assert_array_equal(whole.data.view(np.uint8), np.concatenate([top.data, rest.data]).view(np.uint8))
    if whole.scales is not None:
        np.testing.assert_array_equal(whole.scales, np.concatenate([top.scales, rest.scales]))


@pytest.mark.parametrize("text", FORMATS)
def test_many_chunks(text):
    w, spec = weights((530, 2048)), formats.parse(text)
    top = spec.pack(w[512:])
    np.testing.assert_array_equal(unpack(spec.pack(w))[512:], unpack(top))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("text", ["f32", "bf16", "int8", "int4g:group=32,mins"])
def test_inputs_of_other_dtypes_and_strides(text, dtype):
    w, spec = weights((17, 65)).astype(dtype), formats.parse(text)
    expected = unpack(spec.pack(w.astype(np.float32)))
    np.testing.assert_array_equal(unpack(spec.pack(w)), expected)
    np.testing.assert_array_equal(unpack(spec.pack(np.asfortranarray(w))), expected)
    before = w.copy()
    spec.pack(w)
    np.testing.assert_array_equal(w, before)


# ---------------------------------------------------------------- arithmetic of rounding to nearest


def quantise_by_hand(group: np.ndarray, text: str) -> tuple[list[int], np.float32, np.float32]:
    """(codes, scale, min) of one group, one number at a time."""
    f = np.float32
    spec = formats.parse(text)
    stored = (lambda x: f(np.float16(x))) if spec.group else f
    if spec.name == "int8":
        scale = stored(f(max(abs(w) for w in group)) / f(127))
        return [int(max(-127, min(127, np.rint(w / scale)))) if scale else 0 for w in group], scale, f(0)
    if spec.mins:
        low, high = f(min(group)), f(max(group))
        scale, least = stored((high - low) / f(15)), stored(low)
        return [int(max(0, min(15, np.rint((w - least) / scale)))) if scale else 0 for w in group], scale, least
    best = f(0)
    for w in group:
        if abs(w) > abs(best):
            best = w
    scale = stored(best / f(-8))
    return [int(max(0, min(15, np.rint(w / scale) + 8))) if scale else 8 for w in group], scale, f(0)


@pytest.mark.parametrize("text", QUANTISED)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), exponent=st.integers(-9, 3), flat=st.booleans())
def test_codes_are_those_of_the_documented_arithmetic(text, shape, seed, exponent, flat):
    w = weights(shape, seed, 10.0**exponent)
    if flat:  # ties, and groups of one value
        w = np.round(w * 2) / 2
    spec = formats.parse(text)
    c = formats.get(spec.name).codes(spec.pack(w))
    size = spec.group or shape[1]
    for n in {0, shape[0] - 1}:
        for g in range(-(-shape[1] // size)):
            at = slice(g * size, (g + 1) * size)
            q, scale, least = quantise_by_hand(w[n, at], text)
            assert c.q[n, at].tolist() == q
            assert c.scales[n, g] == scale
            assert c.mins is None or c.mins[n, g] == least


@pytest.mark.parametrize("text", QUANTISED)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), exponent=st.integers(-2, 2))
def test_error_bounds(text, shape, seed, exponent):
    w, spec = weights(shape, seed, 10.0**exponent), formats.parse(text)
    p = spec.pack(w)
    c = formats.get(spec.name).codes(p)
    scales = np.repeat(np.abs(c.scales.astype(np.float64)), spec.group or shape[1], axis=1)[:, : shape[1]]
    levels = {"int8": 127, "int4g": 15}[spec.name]
    half = (
        1.0 if (spec.name == "int4g" and not spec.mins) else 0.5
    )  # symmetric int4g has no +8: up to one step at the far end
    # scales and mins are float16: 11 significant bits, and steps of 2^-24 near zero
    slack = levels * np.maximum(scales * 2.0**-11, 2.0**-25) + np.maximum(np.abs(w) * 2.0**-10, 2.0**-24)
    assert (np.abs(unpack(p) - w) <= half * scales + slack).all()


def test_zero_and_tiny_groups():
    for text in QUANTISED:
        assert not unpack(formats.parse(text).pack(np.zeros((17, 65), np.float32))).any()
        tiny = unpack(formats.parse(text).pack(np.full((3, 64), 1e-12, np.float32)))
        assert np.isfinite(tiny).all()
        assert np.abs(tiny).max() <= 2e-12
    q = formats.get("int4g").codes(formats.get("int4g").pack(np.zeros((1, 32), np.float32))).q
    assert (q == 8).all()


# ---------------------------------------------------------------- codes of other checkpoints


def random_codes(bits: int, group: int, mins: bool, shape: tuple[int, int] = (17, 96), seed: int = 0) -> Codes:
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, shape).astype(np.int8) if bits == 8 else rng.integers(0, 16, shape).astype(np.uint8)
    n_groups = -(-shape[1] // group) if group else 1
    scales = rng.standard_normal((shape[0], n_groups)).astype(np.float16 if group else np.float32)
    return Codes(bits, q, scales, rng.standard_normal(scales.shape).astype(np.float16) if mins else None, group)


@pytest.mark.parametrize(
    ("bits", "group", "mins"), [(8, 32, False), (8, 0, False), (4, 32, False), (4, 32, True), (4, 128, True)]
)
def test_codes_are_kept(bits, group, mins):
    c = random_codes(bits, group, mins, (17, 100))
    fmt = formats.get("int8" if bits == 8 else "int4g")
    p = fmt.pack(c)
    back = fmt.codes(p)
    np.testing.assert_array_equal(back.q, c.q)
    np.testing.assert_array_equal(back.scales, c.scales)
    assert back.group == c.group
    assert (back.mins is None) == (c.mins is None)
    if c.mins is not None:
        np.testing.assert_array_equal(back.mins, c.mins)
    np.testing.assert_array_equal(fmt.pack(c, group=group).data, p.data)
    at = np.minimum(np.arange(100) // (group or 100), c.scales.shape[1] - 1)
    q = c.q.astype(np.float32) - (8 if bits == 4 and not mins else 0)
    expected = q * c.scales.astype(np.float32)[:, at]
    if c.mins is not None:
        expected = expected + c.mins.astype(np.float32)[:, at]
    np.testing.assert_array_equal(unpack(p), expected)


def test_codes_in_another_format_are_dequantised_first():
    c = random_codes(4, 32, True)
    values = unpack(formats.get("int4g").pack(c))
    np.testing.assert_array_equal(unpack(formats.get("f32").pack(c)), values)
    np.testing.assert_array_equal(
        formats.get("int8").pack(c, group=64).data, formats.get("int8").pack(values, group=64).data
    )
    regrouped = formats.get("int4g").pack(c, group=64)
    assert (regrouped.group, regrouped.mins) == (64, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": np.full((17, 96), 16, np.uint8)}, "codes from 16"),
        ({"scales": np.full((17, 3), np.nan, np.float16)}, "scales"),
        ({"scales": np.ones((17, 2), np.float16)}, "shape"),
        ({"mins": np.full((17, 3), np.inf, np.float16)}, "mins"),
        ({"group": 48}, "48"),
    ],
)
def test_bad_codes(change, said):
    c = random_codes(4, 32, False)
    with pytest.raises(CheckpointError, match=said):
        formats.get("int4g").pack(
            Codes(**({f: getattr(c, f) for f in ("bits", "q", "scales", "mins", "group")} | change))
        )
    with pytest.raises(CheckpointError, match="-128"):
        formats.get("int8").pack(Codes(8, np.full((1, 32), -128, np.int8), np.ones((1, 1), np.float16), None, 32))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("text", FORMATS)
def test_nan_and_infinity_are_counted(text):
    w = weights((600, 1000))
    w[599, 3:6], w[0, 7] = np.nan, -np.inf
    with pytest.raises(CheckpointError, match=r"3 NaN and 1 infinite values of 600000"):
        formats.parse(text).pack(w)


def test_values_beyond_the_format():
    big = np.full((1, 64), 1e6, np.float32)
    with pytest.raises(CheckpointError, match=r"1e\+06.*bf16 or f32"):
        formats.get("f16").pack(big)
    with pytest.raises(CheckpointError, match="bf16 or f32"):
        formats.get("bf16").pack(np.full((1, 64), 3.4e38, np.float32))
    for text in ("int8:group=64", "int4g:group=64", "int4g:group=64,mins"):
        with pytest.raises(CheckpointError, match="65504"):
            formats.parse(text).pack(np.linspace(-3e38, 3e38, 64, dtype=np.float32)[None])
    assert np.abs(unpack(formats.parse("int8:group=0").pack(big))).max() == pytest.approx(1e6)


def test_shapes_groups_and_dtypes_are_checked():
    for name in formats.names():
        with pytest.raises(CheckpointError, match="at least 1"):
            formats.get(name).pack(np.empty((0, 4), np.float32))
        with pytest.raises(CheckpointError, match="two dimensions"):
            formats.get(name).pack(np.empty(4, np.float32))
        with pytest.raises(CheckpointError, match="int32"):
            formats.get(name).pack(np.empty((4, 4), np.int32))
        with pytest.raises(CheckpointError, match=r"mins|group"):
            formats.get(name).arrays((4, 4), 48, True)
        assert formats.get(name).why_not((4, 4)) is None
        assert formats.get(name).why_not((4, 4), 7, False)
    with pytest.raises(CheckpointError, match="no codes"):
        formats.get("f32").codes(formats.get("f32").pack(np.ones((1, 1), np.float32)))
    with pytest.raises(ConfigError, match="int9"):
        formats.get("int9")
