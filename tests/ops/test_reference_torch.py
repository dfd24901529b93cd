"""The reference ops against torch: its functions as a second opinion, its tensors as the arrays they run on."""

from __future__ import annotations

import numpy as np
import pytest
from ops_cases import FORMATS, Paged, attend, causal, random_qkv
from test_reference_ops import SPECS, moe_case, pack, rand, rope_of

from paceline.core.specs import AttnSpec
from paceline.ops.reference import ReferenceOps

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional
OPS = ReferenceOps()


@pytest.fixture(scope="module")
def on_torch() -> ReferenceOps:
    return ReferenceOps(xp=torch, device="cpu")


def t(a: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(a))


# ---------------------------------------------------------------- torch's functions


def test_norms_and_activations():
    x, w, b = rand(5, 48) * 3, rand(48, seed=1), rand(48, seed=2)
    close = {"rtol": 0, "atol": 2e-6}
    np.testing.assert_allclose(OPS.rms_norm(x, w, 1e-5), F.rms_norm(t(x), (48,), t(w), 1e-5), **close)
    np.testing.assert_allclose(OPS.layer_norm(x, w, b, 1e-5), F.layer_norm(t(x), (48,), t(w), t(b), 1e-5), **close)
    np.testing.assert_allclose(OPS.layer_norm(x, w, None, 1e-5), F.layer_norm(t(x), (48,), t(w), None, 1e-5), **close)
    for kind, fn in {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}.items():
        np.testing.assert_allclose(OPS.act(x, kind), fn(t(x)), **close)
    np.testing.assert_allclose(OPS.act(x, "gelu_tanh"), F.gelu(t(x), approximate="tanh"), **close)
    np.testing.assert_allclose(OPS.softcap(x, 2.0), torch.tanh(t(x) / 2) * 2, **close)


@pytest.mark.parametrize("name", ["plain", "gqa", "mqa", "window"])
def test_attention(name):
    spec = SPECS[name]
    n = 19
    ((q, k, v),) = qkv = random_qkv(spec, [n])
    heads = [t(a.reshape(n, -1, spec.dim).transpose(1, 0, 2))[None] for a in (q, k, v)]
    allowed = causal(n)
    if spec.window:
        allowed &= np.subtract.outer(np.arange(n), np.arange(n)) < spec.window
    expected = F.scaled_dot_product_attention(*heads, attn_mask=t(allowed), scale=spec.scale, enable_gqa=True)
    out = attend(OPS, Paged(OPS, spec, [n]), spec, qkv, [(0, 0, n)])
    np.testing.assert_allclose(out, expected[0].permute(1, 0, 2).reshape(n, -1), rtol=0, atol=2e-6)


# ---------------------------------------------------------------- torch's tensors


def same(on_torch: ReferenceOps, got, expected: np.ndarray) -> None:
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(on_torch.numpy(got), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", FORMATS)
def test_linear_on_tensors(on_torch, text):
    x, w, b = rand(4, 100), pack(text, 33, 100), rand(33)
    same(on_torch, on_torch.linear(t(x), w, b), OPS.linear(x, w, b))
    w.data.flags.writeable = False  # as a mapped file's
    cached = ReferenceOps(xp=torch, cache_bytes=1 << 20)
    for _ in range(2):
        same(on_torch, cached.linear(t(x), w, b), OPS.linear(x, w, b))


def test_a_head_in_two_passes_on_tensors(on_torch):
    x, coarse, fine = rand(4, 100), pack("int4", 1500, 100), pack("int8:group=32", 1500, 100)
    same(on_torch, on_torch.rescored(t(x), coarse, fine), OPS.rescored(x, coarse, fine))


def test_small_ops_on_tensors(on_torch):
    x = rand(4, 16)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        same(on_torch, on_torch.act(t(x), kind), OPS.act(x, kind))
        same(on_torch, on_torch.gated(t(x), kind), OPS.gated(x, kind))
    w = rand(8)
    same(on_torch, on_torch.rms_norm(t(x), w, 1e-5, offset=1), OPS.rms_norm(x, w, 1e-5, offset=1))
    w = rand(16)
    same(on_torch, on_torch.layer_norm(t(x), w, w, 1e-5), OPS.layer_norm(x, w, w, 1e-5))
    same(on_torch, on_torch.scale(on_torch.add(t(x), t(x)), 0.3), x * 2 * np.float32(0.3))
    same(on_torch, on_torch.softcap(t(x), 0.5), OPS.softcap(x, 0.5))
    batch = Paged(OPS, AttnSpec(2, 2, 8, 1.0), [9]).batch([(0, 5, 9)])
    batch.tokens[:], batch.want = [3, 1, 1, 0], np.array([1, 2], np.int32)
    ours, theirs = OPS.begin(batch), on_torch.begin(batch)
    for interleaved in (False, True):
        table = rope_of(9, 6, interleaved)
        same(on_torch, on_torch.rope(t(x), theirs, table, 8), OPS.rope(x, ours, table, 8))
    table = pack("int4", 5, 16)
    same(on_torch, on_torch.embed(theirs, table), OPS.embed(ours, table))
    same(on_torch, on_torch.wanted(t(x), theirs), OPS.wanted(x, ours))


def test_moe_on_tensors(on_torch):
    x, router, experts = moe_case(6)
    same(on_torch, on_torch.moe(t(x), t(router), experts), OPS.moe(x, router, experts))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["gqa", "all"])
def test_attention_on_tensors(on_torch, name, dtype):
    spec, lens = SPECS[name], [11, 4]
    qkv = random_qkv(spec, lens)
    steps = [[(0, 0, 5), (1, 0, 4)], [(0, 5, 11)]]
    ours, theirs = (Paged(o, spec, lens, dtype=dtype) for o in (OPS, on_torch))
    for parts in steps:
        got, expected = attend(on_torch, theirs, spec, qkv, parts), attend(OPS, ours, spec, qkv, parts)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    masks = np.array([1, 3, 5], np.uint64)
    got = attend(on_torch, theirs, spec, qkv, [(0, 8, 11)], masks=masks)
    np.testing.assert_allclose(got, attend(OPS, ours, spec, qkv, [(0, 8, 11)], masks=masks), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(on_torch.numpy(theirs.pools[0][0]), OPS.numpy(ours.pools[0][0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pools_on_tensors(on_torch, dtype):
    pool = on_torch.empty((3, 2, 4, 5), dtype)
    view = on_torch.numpy(pool)
    view[:] = rand(3, 2, 4, 5)
    before = view.copy()
    on_torch.move(pool, np.array([1, 2], np.int64), np.array([0, 1], np.int64))
    np.testing.assert_array_equal(on_torch.numpy(pool)[0, :, :2], before[0, :, 1:3])


def test_rows_stand_alone_on_tensors(on_torch):
    x = rand(6, 100)
    for text in FORMATS:
        w = pack(text, 40, 100)
        whole = on_torch.numpy(on_torch.linear(t(x), w))
        for r in range(6):
            np.testing.assert_array_equal(on_torch.numpy(on_torch.linear(t(x[r : r + 1]), w))[0], whole[r])
