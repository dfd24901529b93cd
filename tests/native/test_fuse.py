"""Fused programs: the bits of the unfused ones, and only what nobody else reads is fused."""

from __future__ import annotations

import numpy as np
import pytest
from weights import pack

from paceline.ops import record
from paceline.ops.record import Recorder

D, FF = 48, 80
FORMATS = [("f32", 0), ("f16", 0), ("bf16", 0), ("int8", 0), ("int8", 32), ("int4", 32), ("int4g", 64)]


def matrix(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Block:
    """Everything that fuses: norm and bias into gate_up, gate into down, the residual after it; a head on a part of the columns."""

    def __init__(self, ops, fmt: str, group: int):
        self.ops, self.norm, self.bias = ops, matrix(1, D), matrix(4, 2 * FF)
        self.gate_up = pack(matrix(2, 2 * FF, D), fmt, group)[0]
        self.down, self.half = pack(matrix(3, D, FF), fmt, group)[0], pack(matrix(5, 32, D), fmt, group)[0]

    def __call__(self, x, b):
        o = self.ops
        h = o.linear(o.rms_norm(x, self.norm, 1e-5, offset=1.0), self.gate_up, self.bias)
        x = o.add(x, o.linear(o.gated(h, "silu"), self.down))
        h = o.linear(x, self.gate_up)
        x = o.add(o.linear(o.gated(h, "gelu"), self.down), x)
        n = o.rms_norm(x, self.norm, 1e-6)  # read twice: stays
        return o.add(o.linear(n, self.half), o.linear(n, self.half)), x


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_same_bits(ops, monkeypatch, fmt, group):
    net = Block(ops, fmt, group)
    fused = ops.compile(net, (D,))
    monkeypatch.setattr(record, "fuse", lambda calls, widths, kept: calls)
    plain = ops.compile(net, (D,))
    for n in (1, 2, 5, 17, 70):
        x = matrix(n, n, D)
        for a, b in zip(fused(x, None), plain(x, None), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_same_bits_of_long_gates(ops, monkeypatch, fmt, group):
    """More k's than a chunk of the blocked kernels, and more rows than are few."""
    k, n_ff = 2080, 112
    weight, norm = pack(matrix(1, 2 * n_ff, k), fmt, group)[0], matrix(2, k)

    def net(x, b):
        return ops.gated(ops.linear(ops.rms_norm(x, norm, 1e-5), weight), "gelu_tanh")

    fused = ops.compile(net, (k,))
    monkeypatch.setattr(record, "fuse", lambda calls, widths, kept: calls)
    plain = ops.compile(net, (k,))
    for n in (1, 3, 20, 75):
        x = matrix(n, n, k)
        assert np.asarray(fused(x, None)).tobytes() == np.asarray(plain(x, None)).tobytes()


@pytest.mark.parametrize("n_out", [1500, 33000])
def test_same_bits_of_a_head(ops, monkeypatch, n_out):
    w, norm = matrix(1, n_out, D), matrix(2, D)
    coarse, fine = pack(w, "int4", 32)[0], pack(w, "int8", 32)[0]

    def net(x, b):
        return ops.rescored(ops.rms_norm(x, norm, 1e-5, offset=1.0), coarse, fine)

    fused = ops.compile(net, (D,))
    monkeypatch.setattr(record, "fuse", lambda calls, widths, kept: calls)
    plain = ops.compile(net, (D,))
    for n in (1, 3, 20, 75):
        x = matrix(n, n, D)
        assert np.asarray(fused(x, None)).tobytes() == np.asarray(plain(x, None)).tobytes()


def ops_of(recorder: Recorder, *kept) -> list[str]:
    return [c.op for c in record.fuse(recorder.calls, recorder.widths, {r.id for r in kept})]


def test_what_is_fused_and_what_is_not():
    weight, norm = object(), np.ones(D, np.float32)

    def trace(build) -> list[str]:
        r = Recorder()
        return ops_of(r, *build(r, r.input(D)))

    linear = lambda r, x: r.call("linear", (x,), D, (weight, None))  # noqa: E731
    normed = lambda r, x: r.call("rms_norm", (x,), D, (norm, 1e-5, 0.0))  # noqa: E731
    assert trace(lambda r, x: [linear(r, x)]) == ["linear"]
    assert trace(lambda r, x: [linear(r, normed(r, x))]) == ["fused_linear"]
    rescored = lambda r, x: r.call("rescored", (x,), D, (weight, weight, None, 0.0, 0.0))  # noqa: E731
    assert trace(lambda r, x: [rescored(r, normed(r, x))]) == ["rescored"]
    assert trace(lambda r, x: [r.call("add", (x, rescored(r, x)), D)]) == ["rescored", "add"]
    assert trace(lambda r, x: [r.call("add", (x, linear(r, x)), D)]) == ["fused_linear"]
    assert trace(lambda r, x: [r.call("add", (linear(r, x), x), D)]) == ["fused_linear"]

    def gate(r, x, n_ff):
        return [r.call("gated", (r.call("linear", (x,), 2 * n_ff, (weight, None)),), n_ff, ("silu",))]

    def gate_and_more(r, x):
        h = r.call("linear", (x,), 2 * D, (weight, None))
        return [r.call("gated", (h,), D, ("silu",)), h]

    assert trace(lambda r, x: gate(r, x, 48)) == ["fused_linear"]
    assert trace(lambda r, x: gate(r, x, 40)) == ["linear", "gated"]  # no whole blocks
    assert trace(gate_and_more) == ["linear", "gated"]

    def norm_is_kept(r, x):
        n = normed(r, x)
        return [linear(r, n), n]

    def product_is_kept(r, x):
        y = linear(r, x)
        return [r.call("add", (x, y), D), y]

    def by_head(r, x):
        return [linear(r, r.call("rms_norm", (x,), D, (norm[: D // 2], 1e-5, 0.0)))]

    def part_of_a_norm(r, x):
        return [r.call("linear", (normed(r, x).columns(0, 16),), D, (weight, None))]

    def twice_the_same(r, x):
        y = linear(r, x)
        return [r.call("add", (y, y), D)]

    assert trace(norm_is_kept) == ["rms_norm", "linear"]
    assert trace(product_is_kept) == ["linear", "add"]
    assert trace(by_head) == ["rms_norm", "linear"]
    assert trace(part_of_a_norm) == ["rms_norm", "linear"]
    assert trace(twice_the_same) == ["linear", "add"]
    both = lambda r, x: [r.call("add", (linear(r, x), linear(r, x)), D)]  # noqa: E731
    assert trace(both) == ["linear", "fused_linear"]
