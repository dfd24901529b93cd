"""Counting: known models by hand formula, and what each kind of operation is charged."""

from __future__ import annotations

import numpy as np
import pytest
from ops_cases import FORMATS

from paceline import models
from paceline.core.kvcache import KVCache, make_groups
from paceline.core.specs import KV, AttnSpec, Window
from paceline.ops import RESCORED, Experts, Rope, formats
from paceline.ops.adapters import LowRank
from paceline.ops.count import ACT_FLOPS, Cost, CountOps, Shape, step
from paceline.ops.packed import LANES

D, FF, L, H, KVH, V = 64, 160, 3, 4, 2, 1000
DIM = D // H
RAW = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": KVH,
    "vocab_size": V,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def counted(text: str = "bf16", **raw):
    """A model on CountOps with weights that are not there."""
    config = models.read(RAW | raw)
    ops, net = CountOps(), models.get(config.model_type).Net
    weights = {
        name: np.broadcast_to(np.float32(1), p.shape)
        if p.kind == "vector"
        else formats.placeholder(formats.parse("f32" if p.kind == "router" else text), p.shape)
        for name, p in net.params(config).items()
    }
    return net(config, ops, weights, 128), ops


def llama_flops(rows: int, wanted: int, seen: int) -> int:
    """rows computed, of which `wanted` reach the head; `seen` cache entries attended to over all rows, per layer."""
    matrices = D * (D + 2 * KVH * DIM) + D * D + 3 * D * FF
    small = 2 * 4 * D + 3 * (D + KVH * DIM) + (ACT_FLOPS["silu"] + 1) * FF + 2 * D  # norms, rope, gated, residuals
    return L * (rows * (2 * matrices + small) + seen * H * (4 * DIM + 4)) + wanted * (4 * D + 2 * D * V)


@pytest.mark.parametrize(
    ("new", "cached", "seen"),
    [([1], [0], 1), ([10], [0], 55), ([1, 1, 1], [9, 99, 0], 10 + 100 + 1), ([4, 1], [6, 20], 7 + 8 + 9 + 10 + 21)],
)
def test_flops_of_a_llama(new, cached, seen):
    model, ops = counted()
    logits = model.forward(ops.begin(step(model.config.states, new, cached)))
    assert logits.shape == (len(new), V)
    assert ops.ledger.total().flops == llama_flops(sum(new), len(new), seen)


@pytest.mark.parametrize("text", FORMATS)
def test_weight_bytes_are_those_of_the_packed_model(text):
    model, ops = counted(text, tie_word_embeddings=False)
    model.forward(ops.begin(step(model.config.states, [1], [0])))
    packed = {n: formats.nbytes(w) for n, w in model.w.items() if not isinstance(w, np.ndarray)}
    vectors = sum(4 * w.size for w in model.w.values() if isinstance(w, np.ndarray))
    embedding = packed.pop("embed") // (-(-V // LANES) * LANES)  # one row of it
    assert ops.ledger.total().weights == sum(packed.values()) + vectors + embedding


def test_kv_bytes_and_windows():
    spec = AttnSpec(H, KVH, DIM, 1.0, window=8)
    entry = 2 * KVH * DIM
    for kv_dtype, itemsize in (("bfloat16", 2), ("float32", 4), ("int8", 1 + 4 / DIM)):
        ops = CountOps(kv_dtype)
        batch = step([Window(KVH, DIM, 8), KV(KVH, DIM)], [4, 1], [20, 2])
        q, k = Shape(5, H * DIM), Shape(5, KVH * DIM)
        ops.attention(q, k, k, ops.begin(batch), 0, spec)
        ops.attention(q, k, k, batch, 1, AttnSpec(H, KVH, DIM, 1.0, softcap=3.0))
        windowed, full = (e.cost for e in ops.ledger.entries)
        assert windowed.kv_read == entry * itemsize * (8 + 3 + 3)
        assert windowed.flops == H * (4 * DIM + 4) * (4 * 8 + 3)
        assert full.kv_read == entry * itemsize * (24 + 3)
        assert full.flops == H * (4 * DIM + 7) * (21 + 22 + 23 + 24 + 3)
        assert windowed.kv_written == full.kv_written == entry * itemsize * 5
        assert windowed.read == 4 * 5 * (H + 2 * KVH) * DIM
        assert windowed.written == 4 * 5 * H * DIM


def test_tree_rows_see_their_ancestors_only():
    ops, batch = CountOps(), step([KV(KVH, DIM)], [3], [10])
    batch.mask, batch.tail = np.array([1, 3, 5], np.uint64), np.array([10], np.int32)
    ops.attention(Shape(3, H * DIM), Shape(3, KVH * DIM), Shape(3, KVH * DIM), batch, 0, AttnSpec(H, KVH, DIM, 1.0))
    assert ops.ledger.total().flops == H * (4 * DIM + 4) * (11 + 12 + 12)


def test_layers_and_ops_add_up():
    model, ops = counted()
    model.forward(ops.begin(step(model.config.states, [5, 2], [0, 7], want="all")))
    ledger = ops.ledger
    assert set(ledger.by_layer()) == {None, 0, 1, 2}
    assert ledger.by_layer()[0] == ledger.by_layer()[1] == ledger.by_layer()[2]
    for parts in (ledger.by_layer(), ledger.by_op(), ledger.by_name()):
        assert sum(parts.values(), Cost()) == ledger.total()
    by_op = ledger.by_op()
    assert by_op["linear"].flops == 7 * 2 * (L * (D * (2 * D + 2 * KVH * DIM) + 3 * D * FF) + D * V)
    assert by_op["add"].bytes == 2 * L * 3 * 4 * 7 * D
    assert by_op["wanted"].flops == 0
    assert ledger.total().bytes == sum(e.cost.bytes for e in ledger.entries)


def test_experts_expected_to_be_reached():
    gate_up = [formats.placeholder(formats.parse("int8"), (2 * FF, D))] * 8
    down = [formats.placeholder(formats.parse("int8"), (D, FF))] * 8
    experts, both = Experts(gate_up, down, 2, "silu", True), formats.nbytes(gate_up[0]) + formats.nbytes(down[0])

    def cost(rows: int) -> Cost:
        ops = CountOps()
        ops.moe(Shape(rows, D), Shape(rows, 8), experts)
        return ops.ledger.total()

    assert cost(1).weights == 2 * both
    assert cost(2).weights == pytest.approx((8 - 8 * 0.75**2) * both, abs=1)
    assert cost(10_000).weights == 8 * both
    one = 2 * 3 * D * FF + FF * (ACT_FLOPS["silu"] + 1)
    assert cost(7).flops == 7 * (2 * (one + 2 * D) + 4 * 8)


def test_other_ops():
    ops, x = CountOps(), Shape(3, 32)
    rope = Rope(8, np.zeros((4, 4)), np.zeros((4, 4)))
    ops.rope(x, None, rope, 16)
    ops.layer_norm(x, np.ones(32), np.ones(32), 1e-5)
    ops.linear(x, formats.placeholder(formats.parse("f32"), (16, 32)), np.ones(16))
    flops = [e.cost.flops for e in ops.ledger.entries]
    assert flops == [3 * 3 * 2 * 8, 7 * 96, 3 * 16 * 65]
    assert ops.ledger.entries[2].cost.weights == 16 * 32 * 4 + 16 * 4
    a, b = ops.split(x, (30, 2))
    assert (a, b) == (Shape(3, 30), Shape(3, 2))
    assert ops.numpy(x).shape == (3, 32)
    ids = ops.sample(np.zeros((3, 50)), *([np.zeros(3)] * 5))
    assert ids.tolist() == [0, 0, 0]
    assert [a.shape for a in ops.logprobs(np.zeros((3, 50)), ids, 4)] == [(3,), (3, 4), (3, 4)]
    with pytest.raises(AssertionError):
        ops.linear(x, formats.placeholder(formats.parse("f32"), (16, 31)))


def test_a_head_in_two_passes_reads_what_its_rows_choose():
    n_out, n_in = 2000, 64  # 125 blocks
    coarse, fine = (formats.placeholder(formats.parse(f), (n_out, n_in)) for f in ("int4", "int8"))
    small, large = formats.nbytes(coarse), formats.nbytes(fine)

    def cost(rows):
        ops = CountOps()
        assert ops.rescored(Shape(rows, n_in), coarse, fine) == Shape(rows, n_out)
        (entry,) = ops.ledger.entries
        assert entry.name == "rescored 2000x64 int4 int8"
        assert entry.cost.flops == rows * 2 * n_in * (n_out + RESCORED * LANES)
        return entry.cost.weights

    assert cost(1) == small + large * RESCORED // 125
    assert cost(2) == cost(99) == small + large


def test_a_cache_without_memory():
    """The engine's own cache runs on count ops, however large."""
    ops = CountOps()
    groups = make_groups([KV(8, 128)] * 4, page_size=32)
    cache = KVCache(groups, ops, "bfloat16", 1000)
    ops.move(cache.k[0][0], np.arange(3), np.arange(3))
    assert ops.ledger.total() == Cost(kv_read=3 * 8 * 128 * 2, kv_written=3 * 8 * 128 * 2)


def test_adapters_are_charged_by_the_rows_that_have_them():
    ops = CountOps()
    a, b = np.zeros((4, D), np.float32), np.zeros((30, 4), np.float32)
    sites = [[LowRank(a, b, 1.0), LowRank(a, b, 1.0, 30)]]
    batch = step([KV(1, 8)], [3, 2, 5], [0, 0, 0])
    y, x = Shape(10, 60), Shape(10, D)
    assert ops.adapt(y, x, batch, 0) == y
    assert not ops.ledger.entries
    batch.adapters, batch.adapter_of = [ops.adapter(sites), ops.adapter([[]])], np.array([0, -1, 1], np.int32)
    assert ops.adapt(y, x, batch, 0) == y
    (entry,) = ops.ledger.entries
    assert entry.cost.flops == 3 * 2 * (2 * 4 * (D + 30) + 4 + 30)
    assert entry.cost.weights == 2 * (a.nbytes + b.nbytes)
    assert (entry.cost.read, entry.cost.written) == (4 * (3 * 60 + 8 * D), 4 * 3 * 60)
