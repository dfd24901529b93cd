"""Norms, rotation, activations, gathers and expert mixtures of every instruction set against float64."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from weights import FORMATS, pack

from paceline.core.batch import Batch
from paceline.ops import Experts, Rope

WIDTHS = [1, 7, 16, 63, 64, 65, 200, 576]
SPECIAL = np.array(
    [0, -0.0, 1e-30, -1e-30, 0.624, 0.626, 1, -1, 9, -9, 30, -30, 88, -88, 100, -100, 1e4, -1e4, 3e38, -3e38],
    np.float32,
)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(scale)


def step(ops, tokens=(), positions=None, want=()):
    a = np.array(tokens, np.int32)
    p = a if positions is None else np.array(positions, np.int32)
    return ops.begin(Batch(a, p, np.array([0, len(a)], np.int32), np.array(want, np.int32), [], []))


def each_row_alone(fn, *xs: np.ndarray) -> None:
    """The batch gives the bits that each row gives alone."""
    whole = np.array(fn(*xs))
    for r in (0, len(xs[0]) // 2, len(xs[0]) - 1):
        assert np.array(fn(*[x[r : r + 1] for x in xs]))[0].tobytes() == whole[r].tobytes()


# ---- norms ----


@pytest.mark.parametrize("n", WIDTHS)
def test_rms_norm(ops, n):
    x, w = normal(1, 33, 3 * n, scale=4), normal(2, n)
    for offset in (0.0, 1.0):
        runs = x.astype(np.float64).reshape(33, 3, n)
        want = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + 1e-5) * (offset + w.astype(np.float64))
        got = np.asarray(ops.rms_norm(x, w, 1e-5, offset=offset))
        np.testing.assert_allclose(got, want.reshape(33, -1), rtol=1e-6, atol=1e-7)
    each_row_alone(lambda a: ops.rms_norm(a, w, 1e-5), x)


@pytest.mark.parametrize("n", WIDTHS)
def test_layer_norm(ops, n):
    x, w, b = normal(1, 33, n, scale=4) + 10, normal(2, n), normal(3, n)
    e = x.astype(np.float64)
    want = (e - e.mean(-1, keepdims=True)) / np.sqrt(e.var(-1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(np.asarray(ops.layer_norm(x, w, None, 1e-5)), want, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(np.asarray(ops.layer_norm(x, w, b, 1e-5)), want + b, rtol=2e-6, atol=1e-5)
    each_row_alone(lambda a: ops.layer_norm(a, w, b, 1e-5), x)


# ---- rotation ----


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "dim"), [(8, 8), (64, 64), (80, 32), (6, 2), (128, 96)])
def test_rope_is_the_plain_formula(ops, head_dim, dim, interleaved):
    angles = np.arange(50)[:, None] * 0.7 ** np.arange(dim // 2)
    rope = Rope(dim, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), interleaved)
    x, positions = normal(1, 9, 3 * head_dim), [0, 49, 7, 7, 12, 3, 30, 1, 2]
    batch = step(ops, positions)
    got = np.asarray(ops.rope(x, batch, rope, head_dim)).reshape(9, 3, head_dim)
    heads, cos, sin = x.reshape(9, 3, head_dim), rope.cos[positions][:, None], rope.sin[positions][:, None]
    at = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
    a, b = heads[..., at[0]], heads[..., at[1]]
    assert np.array_equal(got[..., at[0]], a * cos - b * sin)  # float32, two products and a sum: no fused multiply-add
    assert np.array_equal(got[..., at[1]], b * cos + a * sin)
    assert np.array_equal(got[..., dim:], heads[..., dim:])


# ---- lane by lane ----


def exact_act(x: np.ndarray, kind: str) -> np.ndarray:
    e = x.astype(np.float64)
    with np.errstate(over="ignore"):
        if kind == "silu":
            return e / (1 + np.exp(-e))
        if kind == "gelu":
            return np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in e.ravel()]).reshape(e.shape)
        if kind == "gelu_tanh":
            return e / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (e + 0.044715 * e**3)))
        return np.maximum(e, 0)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(ops, kind):
    """Relative error, also where the result is tiny. The cubic inside gelu_tanh takes four roundings: the exponential
    turns them into as many half units in the last place times the exponent."""
    grid = np.concatenate([np.linspace(-9, 30, 5001, dtype=np.float32), normal(1, 2000, scale=1e-3), SPECIAL])[:, None]
    got, want = np.asarray(ops.act(grid, kind)), exact_act(grid, kind)
    exponent = 1.6 * np.minimum(1e3, np.abs(grid + 0.044715 * grid.astype(np.float64) ** 3))
    allowed = 1e-6 + (4 * 2**-24 * exponent if kind == "gelu_tanh" else 0.0)
    assert np.all(np.abs(got - want) <= np.abs(want) * allowed + 2e-37)  # what is subnormal may become 0
    assert np.isnan(np.asarray(ops.act(np.full((1, 3), np.nan, np.float32), kind))).all()
    for n in WIDTHS:
        x = normal(n, 70, 2 * n)
        y = np.asarray(ops.gated(x, kind))
        np.testing.assert_allclose(y, exact_act(x[:, :n], kind) * x[:, n:], rtol=3e-6, atol=1e-9)
        assert y[3:4].tobytes() == np.asarray(ops.gated(x[3:4], kind)).tobytes()


def test_tanh(ops):
    """softcap with cap 1 is the hyperbolic tangent: at most 4e-7 off, relatively."""
    x = np.concatenate([np.linspace(-12, 12, 20001, dtype=np.float32), normal(1, 5000, scale=1e-3), SPECIAL])[:, None]
    np.testing.assert_allclose(np.asarray(ops.softcap(x, 1.0)), np.tanh(x.astype(np.float64)), rtol=4e-7, atol=0)
    np.testing.assert_allclose(
        np.asarray(ops.softcap(x, 30.0)), 30 * np.tanh(x.astype(np.float64) / 30), rtol=6e-7, atol=1e-44
    )


@pytest.mark.parametrize("n", WIDTHS)
def test_plain_arithmetic_is_exact(ops, n):
    x, y = normal(1, 40, n), normal(2, 40, n)
    assert np.array_equal(np.asarray(ops.add(x, y)), x + y)
    assert np.array_equal(np.asarray(ops.scale(x, 0.3)), x * np.float32(0.3))


def test_strided_views(ops):
    """Ops on the parts of a split, inside one program, see only their own columns."""
    sizes, w, x = (33, 7, 64), normal(9, 7), normal(1, 20, 104)

    def fn(a, batch):
        p, q, r = ops.split(a, sizes)
        return (
            ops.act(p, "silu"),
            ops.rms_norm(q, w, 1e-6),
            ops.gated(r, "gelu"),
            ops.add(p, p),
            ops.layer_norm(r, normal(8, 64), None, 1e-5),
        )

    got = [np.asarray(y) for y in ops.compile(fn, (104,))(x, step(ops, [0] * 20))]
    p, q, r = (np.ascontiguousarray(a) for a in np.split(x, [33, 40], axis=1))
    want = [
        ops.act(p, "silu"),
        ops.rms_norm(q, w, 1e-6),
        ops.gated(r, "gelu"),
        ops.add(p, p),
        ops.layer_norm(r, normal(8, 64), None, 1e-5),
    ]
    for a, b in zip(got, want, strict=True):
        assert a.tobytes() == np.asarray(b).tobytes()


# ---- gathers ----


@pytest.mark.parametrize(("fmt", "group", "mins"), FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (40, 200)])
def test_embed(ops, fmt, group, mins, shape):
    packed, _ = pack(normal(1, *shape), fmt, group, mins)
    ids = np.random.default_rng(2).integers(0, shape[0], 25)
    got = np.asarray(ops.embed(step(ops, ids), packed))
    assert np.array_equal(got, plain_rows(packed)[ids])
    assert np.array_equal(np.asarray(ops.embed(step(ops, [0] * 25, ids), packed, by="positions")), got)


def plain_rows(p) -> np.ndarray:
    """Dequantised (n_out, n_in) float32, straight from the layout in ops/packed.py."""
    n, k = p.shape
    out, data = np.empty((n, k), np.float32), p.data.reshape(-1)
    padded = data.size * (2 if p.format.startswith("int4") else 1) // (-(-n // 16) * 16)
    for r in range(n):
        nb, lane = divmod(r, 16)
        for c in range(k):
            if p.format.startswith("int4"):
                byte = int(data[nb * padded * 8 + c // 64 * 512 + c % 32 // 4 * 64 + lane * 4 + c % 4])
                q = np.float32((byte & 15 if c % 64 < 32 else byte >> 4) - (8 if p.mins is None else 0))
            else:
                per = {"f32": 1, "f16": 2, "bf16": 2, "int8": 4}[p.format]
                q = data[nb * padded * 16 + c // per * 16 * per + lane * per + c % per]
                q = np.float32(q.view(ml_dtypes.bfloat16) if q.dtype == np.uint16 and p.format == "bf16" else q)
            if p.scales is not None:
                g = c // p.group if p.group else 0
                if p.factors is not None:
                    q, g = q * np.float32(p.factors[nb, g, lane]), 0
                q = np.float32(p.scales[nb, g, lane]) * q
                q = q + np.float32(p.mins[nb, g, lane]) if p.mins is not None else q
            out[r, c] = q
    return out


def test_wanted_rows(ops):
    x = normal(1, 12, 37)
    assert np.array_equal(np.asarray(ops.wanted(x, step(ops, [0] * 12, want=[0, 5, 11]))), x[[0, 5, 11]])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_move_reads_everything_first(ops, dtype):
    rng = np.random.default_rng(1)
    pool = rng.standard_normal((6, 3, 8, 5)).astype(dtype)
    src = rng.permutation(48)[:20]
    dst = np.concatenate(
        [src[1:10], rng.permutation(np.setdiff1d(np.arange(48), src[1:10]))[:11]]
    )  # a shift that overlaps
    want = pool.transpose(0, 2, 1, 3).reshape(48, 3, 5).copy()
    want[dst] = want[src]
    ops.move(pool, src, dst)
    assert pool.transpose(0, 2, 1, 3).reshape(48, 3, 5).tobytes() == want.tobytes()


# ---- experts ----


@pytest.mark.parametrize(
    ("n_experts", "n_active", "normalise"), [(4, 2, True), (20, 3, False), (1, 1, True), (5, 5, True)]
)
def test_moe(ops, n_experts, n_active, normalise):
    d, d_ff, n_rows = 24, 40, 30
    up = [normal(10 + e, 2 * d_ff, d) for e in range(n_experts)]
    down = [normal(50 + e, d, d_ff) for e in range(n_experts)]
    experts = Experts(
        [pack(w, "f32", 0, False)[0] for w in up],
        [pack(w, "f32", 0, False)[0] for w in down],
        n_active,
        "silu",
        normalise,
    )
    x, router = normal(1, n_rows, d), normal(2, n_rows, n_experts, scale=2)
    router[3] = 1.0  # ties: the lower ids
    want = np.zeros((n_rows, d))
    for r in range(n_rows):
        p = np.exp(router[r].astype(np.float64) - router[r].max())
        p /= p.sum()
        chosen = np.argsort(-p, kind="stable")[:n_active]
        for e in chosen:
            h = up[e].astype(np.float64) @ x[r]
            y = down[e].astype(np.float64) @ (exact_act(h[:d_ff], "silu") * h[d_ff:])
            want[r] += p[e] / (p[chosen].sum() if normalise else 1) * y
    np.testing.assert_allclose(np.asarray(ops.moe(x, router, experts)), want, rtol=2e-5, atol=2e-4)
    each_row_alone(lambda a, b: ops.moe(a, b, experts), x, router)


def test_moe_row_of_nan_stays_alone(ops):
    experts = Experts(
        [pack(normal(e, 16, 8), "bf16", 0, False)[0] for e in range(4)],
        [pack(normal(9 + e, 8, 8), "bf16", 0, False)[0] for e in range(4)],
        2,
        "gelu",
        True,
    )
    x, router = normal(1, 5, 8), normal(2, 5, 4)
    clean = np.array(ops.moe(x, router, experts))
    x[2], router[2] = np.nan, np.nan
    got = np.asarray(ops.moe(x, router, experts))
    assert np.isnan(got[2]).all()
    assert np.delete(got, 2, 0).tobytes() == np.delete(clean, 2, 0).tobytes()
