"""Reference ops: what each computes, and that a row's bits never depend on the other rows."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import FORMATS, Paged, attend, causal, dense, random_qkv

from paceline.core import entries
from paceline.core.errors import ConfigError
from paceline.core.specs import AttnSpec
from paceline.ops import RESCORED, Experts, Rope, formats
from paceline.ops import reference as reference_file
from paceline.ops.packed import LANES, Packed
from paceline.ops.reference import ReferenceOps

OPS = ReferenceOps()


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pack(text: str, *shape: int, seed: int = 5) -> Packed:
    return formats.parse(text).pack(rand(*shape, seed=seed) * 0.1)


def unpack(p: Packed) -> np.ndarray:
    return formats.get(p.format).unpack(p)


def rope_of(n: int, dim: int, interleaved: bool = False) -> Rope:
    angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    return Rope(dim, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), interleaved)


# ---------------------------------------------------------------- linear


def representable(text: str, rows: int, n_in: int, seed: int) -> np.ndarray:
    """Activations that the format's rounding leaves as they are: integers, and for codes with 127 in every group."""
    x = np.random.default_rng(seed).integers(-127, 128, (rows, n_in)).astype(np.float32)
    spec = formats.parse(text)
    x[:, :: spec.group or n_in] = 127
    return x


@pytest.mark.parametrize("text", FORMATS)
@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 15, 33]), st.sampled_from([1, 17, 65, 100, 256]), st.integers(1, 4), st.integers(0, 99))
def test_packed_matmul_is_dequantise_then_multiply(text, n_out, n_in, rows, seed):
    w = pack(text, n_out, n_in, seed=seed)
    x = representable(text, rows, n_in, seed)
    exact = x.astype(np.float64) @ unpack(w).astype(np.float64).T
    bound = np.abs(x).astype(np.float64) @ np.abs(unpack(w)).astype(np.float64).T
    mins = 0 if w.mins is None else (np.abs(x).sum(1, keepdims=True) * np.abs(w.mins.astype(np.float64)).max())
    assert (np.abs(OPS.linear(x, w) - exact) <= (bound + mins) * 4e-6).all()
    bias = rand(n_out, seed=seed)
    np.testing.assert_array_equal(OPS.linear(x, w, bias), OPS.linear(x, w) + bias)


def test_activations_are_rounded_as_documented():
    x, w = rand(3, 100), pack("bf16", 20, 100)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ unpack(w).astype(np.float64).T
    np.testing.assert_allclose(OPS.linear(x, w), rounded, rtol=0, atol=1e-5)
    for text in ("int8:group=64", "int4g:group=64,mins", "int8:group=0"):
        w = pack(text, 20, 128)
        x = rand(3, 128)
        x[1, 64:], x[2] = 0, 0
        groups = x.reshape(3, -1, w.group or 128).astype(np.float64)
        scale = np.abs(groups).max(-1, keepdims=True) / 127
        scale[scale == 0] = 1
        x_q = (np.rint(groups * (1 / scale)) * scale).reshape(3, 128)
        np.testing.assert_allclose(OPS.linear(x, w), x_q @ unpack(w).astype(np.float64).T, rtol=0, atol=2e-5)
        assert not OPS.linear(x, w)[2].any()


def test_sums_of_codes_are_exact_over_long_rows():
    """Products of 5000 codes exceed what float32 holds exactly; the sum is rounded once, at the end."""
    q = np.random.default_rng(0).integers(64, 128, (40, 5000))
    q[:, 0] = 127  # scale 1
    w = formats.parse("int8:group=0").pack(q[:20].astype(np.float32))
    exact = (q[20:] @ q[:20].T).astype(np.float32)
    np.testing.assert_array_equal(OPS.linear(q[20:].astype(np.float32), w), exact)


def test_not_finite_activations_show():
    for text in FORMATS:
        x = rand(2, 128)
        x[0, 3] = np.nan
        with np.errstate(invalid="ignore"):
            y = OPS.linear(x, pack(text, 17, 128))
        assert np.isnan(y[0]).all(), text
        assert np.isfinite(y[1]).all(), text


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("n_in", [17, 100, 384])
def test_linear_rows_stand_alone(text, n_in):
    w, x = pack(text, 50, n_in), rand(9, n_in)
    whole = OPS.linear(x, w)
    for r in range(9):
        np.testing.assert_array_equal(OPS.linear(x[r : r + 1], w)[0], whole[r])
    np.testing.assert_array_equal(OPS.linear(np.ascontiguousarray(np.hstack([x, x]))[:, n_in:], w), whole)


@pytest.mark.parametrize("n_out", [40, RESCORED * LANES, 1041, 3000])
def test_a_head_in_two_passes(n_out):
    """The blocks with the largest coarse logits have the bits of the fine matrix, others those of the coarse one; rows stand alone."""
    coarse, fine, x = pack("int4", n_out, 65), pack("int8:group=32", n_out, 65), rand(5, 65)
    y, a, b = OPS.rescored(x, coarse, fine), OPS.linear(x, coarse), OPS.linear(x, fine)
    for r in range(5):
        best = [(-a[r, at : at + LANES].max(), at) for at in range(0, n_out, LANES)]
        chosen = [at for _, at in sorted(best)[:RESCORED]]
        want = a[r].copy()
        for at in chosen:
            want[at : at + LANES] = b[r, at : at + LANES]
        np.testing.assert_array_equal(y[r], want)
        np.testing.assert_array_equal(OPS.rescored(x[r : r + 1], coarse, fine)[0], want)


def test_cache_and_pieces_do_not_change_bits(monkeypatch):
    x = rand(4, 100)
    for text in FORMATS:
        w = pack(text, 90, 100)
        whole = OPS.linear(x, w)
        cached = ReferenceOps(cache_bytes=90 * 100 * 4)
        for _ in range(2):
            np.testing.assert_array_equal(cached.linear(x, w), whole)
        assert len(cached._cache.items) == 1
        cached.linear(x, pack("f32", 90, 100))
        assert len(cached._cache.items) == 1, "the cache holds no more than it may"
        monkeypatch.setattr(reference_file, "_PIECE", 32 * 100)
        np.testing.assert_allclose(ReferenceOps().linear(x, w), whole, rtol=0, atol=1e-6)
        assert ReferenceOps().linear(x, w).shape == whole.shape
        monkeypatch.undo()


def test_one_product_for_all_rows_is_an_option():
    w, x = pack("f32", 33, 100), rand(7, 100)
    np.testing.assert_allclose(ReferenceOps(invariant=False).linear(x, w), OPS.linear(x, w), rtol=0, atol=1e-6)


def test_float64_is_more_accurate():
    w, x = pack("f32", 33, 1000), rand(3, 1000)
    exact = [math.fsum(a * b for a, b in zip(map(float, x[0]), map(float, row), strict=True)) for row in unpack(w)]
    wide = ReferenceOps(dtype="float64")
    y = wide.linear(x.astype(np.float64), w)
    assert y.dtype == np.float64
    assert np.abs(y[0] - exact).max() < 1e-14
    assert 1e-9 < np.abs(OPS.linear(x, w)[0] - exact).max() < 1e-5


# ---------------------------------------------------------------- small ops


def test_norms_over_runs():
    x, w = rand(5, 24), rand(8)
    runs = x.reshape(5, 3, 8).astype(np.float64)
    expected = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + 1e-5) * (1 + w.astype(np.float64))
    np.testing.assert_allclose(OPS.rms_norm(x, w, 1e-5, offset=1.0), expected.reshape(5, 24), rtol=0, atol=2e-6)
    wide = np.hstack([x, x])[:, 24:]  # a view, as `split` gives
    np.testing.assert_array_equal(OPS.rms_norm(wide, w, 1e-5), OPS.rms_norm(x, w, 1e-5))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 6])
def test_rope_is_a_rotation_of_pairs(interleaved, dim):
    spec = AttnSpec(2, 2, 8, 1.0)
    batch = OPS.begin(Paged(OPS, spec, [20]).batch([(0, 5, 9)]))
    x, table = rand(4, 16), rope_of(20, dim, interleaved)
    y = OPS.rope(x, batch, table, 8).reshape(4, 2, 8)
    heads = x.reshape(4, 2, 8).astype(np.float64)
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        turned = (heads[:, :, a] + 1j * heads[:, :, b]) * np.exp(1j * np.arange(5, 9) * 10000.0 ** (-2 * i / dim))[
            :, None
        ]
        np.testing.assert_allclose(y[:, :, a] + 1j * y[:, :, b], turned, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(y[:, :, dim:], heads[:, :, dim:])


def test_activations_at_their_limits():
    x = np.array([[-1e30, -200.0, -1.0, 0.0, 1.0, 200.0, 1e30]], np.float32)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        y = OPS.act(x, kind)[0]
        assert y.dtype == np.float32
        assert (y[:2] == 0).all()
        assert y[3] == 0
        assert (y[5:] == x[0, 5:]).all()
        assert np.isnan(OPS.act(np.full((1, 1), np.nan, np.float32), kind)).all()
    x = x[:, 1:-1]
    np.testing.assert_array_equal(OPS.gated(np.hstack([x, x + 1]), "silu"), OPS.act(x, "silu") * (x + 1))
    assert np.abs(OPS.softcap(x, 30.0)).max() <= 30


@pytest.mark.parametrize("width", [1, 7, 33, 512])
def test_elementwise_rows_stand_alone(width):
    x = rand(6, 2 * width)
    fns = {
        "rms": lambda a: OPS.rms_norm(a, np.ones(2 * width, np.float32), 1e-6),
        "layer": lambda a: OPS.layer_norm(a, np.ones(2 * width, np.float32), None, 1e-6),
        "softcap": lambda a: OPS.softcap(a, 5.0),
        "gated": lambda a: OPS.gated(a, "silu"),
    } | {kind: (lambda a, kind=kind: OPS.act(a, kind)) for kind in ("silu", "gelu", "gelu_tanh", "relu")}
    for name, fn in fns.items():
        whole = fn(x)
        for r in range(6):
            np.testing.assert_array_equal(fn(x[r : r + 1])[0], whole[r], err_msg=name)


def test_embed_split_wanted():
    table, spec = pack("int4g:group=32", 50, 100), AttnSpec(1, 1, 4, 1.0)
    batch = Paged(OPS, spec, [20]).batch([(0, 3, 7)])
    batch.tokens[:] = [49, 0, 17, 17]
    batch.want = np.array([0, 3], np.int32)
    bound = OPS.begin(batch)
    np.testing.assert_array_equal(OPS.embed(bound, table), unpack(table)[[49, 0, 17, 17]])
    np.testing.assert_array_equal(OPS.embed(bound, table, by="positions"), unpack(table)[[3, 4, 5, 6]])
    x = rand(4, 10)
    np.testing.assert_array_equal(OPS.wanted(x, bound), x[[0, 3]])
    a, b, c = OPS.split(x, (3, 6, 1))
    np.testing.assert_array_equal(np.hstack([a, b, c]), x)
    assert (a.shape, b.shape, c.shape) == ((4, 3), (4, 6), (4, 1))


def test_unknown_library_dtype_and_format():
    with pytest.raises(ConfigError, match="math"):
        ReferenceOps(xp=math)
    with pytest.raises(ConfigError, match="bfloat16"):
        ReferenceOps(dtype="bfloat16")
    w = pack("f32", 4, 4)
    assert OPS.why_not(w) is None
    assert "int3" in str(OPS.why_not(Packed("int3", (4, 4), w.data)))


# ---------------------------------------------------------------- mixture of experts


def moe_case(rows: int, normalise: bool = True, text: str = "f32") -> tuple[np.ndarray, np.ndarray, Experts]:
    gate_up = [pack(text, 48, 32, seed=e) for e in range(5)]
    down = [pack(text, 32, 24, seed=10 + e) for e in range(5)]
    return rand(rows, 32), rand(rows, 5, seed=3), Experts(gate_up, down, 2, "silu", normalise)


@pytest.mark.parametrize("normalise", [True, False])
def test_moe_is_the_weighted_sum_of_the_best(normalise):
    x, router, experts = moe_case(6, normalise)
    router[0] = 0  # all alike: the lowest ids
    y = OPS.moe(x, router, experts)
    for r in range(6):
        p = np.exp(router[r].astype(np.float64))
        p /= p.sum()
        best = sorted(range(5), key=lambda e: (-p[e], e))[:2]
        total = p[best].sum() if normalise else 1.0
        expected = np.zeros(32)
        for e in best:
            h = x[r].astype(np.float64) @ unpack(experts.gate_up[e]).T
            h = h[:24] / (1 + np.exp(-h[:24])) * h[24:]
            expected += p[e] / total * (h @ unpack(experts.down[e]).T)
        np.testing.assert_allclose(y[r], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["f32", "bf16", "int8", "int4"])
def test_moe_rows_stand_alone(text):
    x, router, experts = moe_case(7, text=text)
    whole = OPS.moe(x, router, experts)
    for r in range(7):
        np.testing.assert_array_equal(OPS.moe(x[r : r + 1], router[r : r + 1], experts)[0], whole[r])


# ---------------------------------------------------------------- attention

SPECS = {
    "plain": AttnSpec(2, 2, 8, 8**-0.5),
    "gqa": AttnSpec(6, 2, 8, 0.3),
    "mqa": AttnSpec(3, 1, 8, 0.3),
    "window": AttnSpec(4, 2, 8, 0.3, window=5),
    "softcap": AttnSpec(4, 2, 8, 0.3, softcap=2.0),
    "all": AttnSpec(4, 2, 6, 0.3, window=7, softcap=1.0),
}
LENS = [17, 3, 9]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_attention_is_dense_attention(name, dtype):
    spec, qkv = SPECS[name], random_qkv(SPECS[name], LENS)
    out = attend(OPS, Paged(OPS, spec, LENS, dtype=dtype), spec, qkv, [(s, 0, n) for s, n in enumerate(LENS)])
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

    def stored(x):
        if dtype != "int8":
            return x.astype(kinds[dtype])
        heads = x.reshape(len(x), spec.n_kv_heads, spec.dim)
        return entries.decode(entries.encode(heads, "int8"), "int8").reshape(x.shape)

    at = 0
    for (q, k, v), n in zip(qkv, LENS, strict=True):
        expected = dense(spec, q, stored(k), stored(v), causal(n))
        np.testing.assert_allclose(out[at : at + n], expected, rtol=0, atol=2e-6)
        at += n


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_attention_bits_do_not_depend_on_the_schedule(name, data):
    """Any interleaving of chunks of three sequences, in any page size, gives the bits of each sequence in one go."""
    spec, qkv = SPECS[name], random_qkv(SPECS[name], LENS)
    alone = [attend(OPS, Paged(OPS, spec, LENS, page_size=32), spec, qkv, [(s, 0, n)]) for s, n in enumerate(LENS)]
    paged = Paged(OPS, spec, LENS, page_size=data.draw(st.sampled_from([1, 4, 5])), seed=data.draw(st.integers(0, 9)))
    done = [0] * len(LENS)
    while any(d < n for d, n in zip(done, LENS, strict=True)):
        waiting = [s for s in range(3) if done[s] < LENS[s]]
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        parts = [(s, done[s], done[s] + data.draw(st.integers(1, LENS[s] - done[s]))) for s in chosen]
        out, at = attend(OPS, paged, spec, qkv, parts), 0
        for s, lo, hi in parts:
            np.testing.assert_array_equal(out[at : at + hi - lo], alone[s][lo:hi])
            at, done[s] = at + hi - lo, hi


def test_heads_split_over_groups():
    spec = AttnSpec(8, 4, 8, 0.3, window=6)
    qkv = random_qkv(spec, LENS)
    parts = [(s, 0, n) for s, n in enumerate(LENS)]
    whole = attend(OPS, Paged(OPS, spec, LENS), spec, qkv, parts)
    split = attend(OPS, Paged(OPS, spec, LENS, heads=[(0, 3), (1,), (2,)]), spec, qkv, parts)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-6)


def test_pages_behind_the_window_are_not_read():
    spec = SPECS["window"]
    qkv = random_qkv(spec, LENS)
    paged = Paged(OPS, spec, LENS)
    whole = attend(OPS, Paged(OPS, spec, LENS), spec, qkv, [(0, 0, 17)])
    attend(OPS, paged, spec, qkv, [(0, 0, 12)])
    np.testing.assert_array_equal(attend(OPS, paged, spec, qkv, [(0, 12, 17)], forget=2), whole[12:])
    with pytest.raises(AssertionError, match="released"):
        attend(OPS, paged, spec, qkv, [(0, 12, 17)], forget=3)


@pytest.mark.parametrize("name", ["gqa", "all"])
def test_tree_masks(name):
    """Draft nodes see the text before the step, their ancestors and themselves; a path has the bits of a chain."""
    spec = SPECS[name]
    first, parents = 6, [-1, 0, 0, 1, 2, 3]  # node 5 hangs below 3, 1, 0
    n = first + len(parents)
    qkv = random_qkv(spec, [n])
    bits = []
    for i, parent in enumerate(parents):
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
    paged = Paged(OPS, spec, [n])
    attend(OPS, paged, spec, qkv, [(0, 0, first)])
    out = attend(OPS, paged, spec, qkv, [(0, first, n)], masks=np.array(bits, np.uint64))
    allowed = causal(n)
    for i, word in enumerate(bits):
        visible = [*range(first), *(first + j for j in range(len(parents)) if word >> j & 1)]
        allowed[first + i] = np.isin(np.arange(n), visible[-(spec.window or n) :])  # a window counts what is visible
    expected = dense(replace(spec, window=None), *qkv[0], allowed)
    np.testing.assert_allclose(out, expected[first:], rtol=0, atol=2e-6)
    path = [*range(first), first + 0, first + 1, first + 3, first + 5]
    chain = [tuple(a[path] for a in qkv[0])]
    alone = attend(OPS, Paged(OPS, spec, [len(path)]), spec, chain, [(0, 0, len(path))])
    np.testing.assert_array_equal(out[[0, 1, 3, 5]], alone[first:])


def test_full_masks_are_causal():
    spec = SPECS["all"]
    qkv = random_qkv(spec, [20])
    plain = attend(OPS, Paged(OPS, spec, [20]), spec, qkv, [(0, 0, 20)])
    masks = np.array([(1 << (i + 1)) - 1 for i in range(20)], np.uint64)
    np.testing.assert_array_equal(attend(OPS, Paged(OPS, spec, [20]), spec, qkv, [(0, 0, 20)], masks=masks), plain)


def test_large_scores_stay_finite():
    spec = AttnSpec(1, 1, 4, 1.0)
    q, k, v = (a * 1e3 for a in random_qkv(spec, [8])[0])
    out = attend(OPS, Paged(OPS, spec, [8]), spec, [(q, k, v)], [(0, 0, 8)])
    np.testing.assert_allclose(out, dense(spec, q, k, v, causal(8)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_move_reads_before_it_writes(dtype):
    pool = OPS.empty((3, 2, 4, 5), dtype)
    pool[:] = rand(3, 2, 4, 5)
    before = OPS.numpy(pool).copy()
    src, dst = np.array([1, 2, 3, 11], np.int64), np.array([0, 1, 2, 3], np.int64)
    OPS.move(pool, src, dst)
    flat, old = (a.transpose(0, 2, 1, 3).reshape(12, 2, 5) for a in (pool, before))
    np.testing.assert_array_equal(flat[dst], old[src])
    np.testing.assert_array_equal(flat[4:], old[4:])
    OPS.numpy(pool)[0, 0, 0, 0] = 7
    assert pool[0, 0, 0, 0] == 7, "numpy() writes through"
