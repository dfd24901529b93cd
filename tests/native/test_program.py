"""The recorder and the program executor: compiled functions give the bits of eager calls; misuse is an error, never a crash."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import pack

from paceline import _native
from paceline.core.batch import Batch, GroupBatch
from paceline.core.errors import ConfigError
from paceline.core.specs import KV, AttnSpec, KVGroup
from paceline.ops import Rope
from paceline.ops.native import ISA_VARIABLE, NativeOps, bind_weight, choose_isa, why_not
from paceline.ops.packed import Packed
from paceline.ops.record import plan

D, FF, VOCAB = 48, 80, 37


@pytest.fixture(scope="module")
def best() -> NativeOps:
    return NativeOps(n_threads=2)


def matrix(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def batch(tokens: list[int], want: list[int] | None = None) -> Batch:
    ids = np.array(tokens, np.int32)
    n = len(tokens)
    want_rows = np.array([n - 1] if want is None else want, np.int32)
    return Batch(ids, np.arange(n, dtype=np.int32), np.array([0, n], np.int32), want_rows, [], [])


class Mlp:
    """Norm, gated MLP and residual, with a split and a bias: enough to use every kind of register."""

    def __init__(self, ops: NativeOps, fmt: str = "bf16"):
        self.ops = ops
        self.norm = matrix(1, D)
        self.gate_up, self.down = pack(matrix(2, 2 * FF, D), fmt)[0], pack(matrix(3, D, FF), fmt)[0]
        self.bias = matrix(4, 2 * FF)

    def __call__(self, x, b):
        o = self.ops
        h = o.linear(o.rms_norm(x, self.norm, 1e-5), self.gate_up, self.bias)
        gate, up = o.split(h, [FF, FF])
        both = o.add(o.act(gate, "silu"), up)
        return o.add(x, o.linear(both, self.down))


def test_compiled_is_eager_for_any_number_of_rows(ops):
    net = Mlp(ops)
    run = ops.compile(net, (D,))
    for n in (1, 7, 64, 2, 300):
        x, b = matrix(n, n, D), ops.begin(batch([0] * n))
        assert np.array_equal(np.asarray(run(x, b)), np.asarray(net(x, b)))


def test_compiled_parts_make_a_larger_program(best):
    first, second = (best.compile(Mlp(best, fmt), (D,)) for fmt in ("bf16", "int8"))
    w = pack(matrix(3, VOCAB, D), "f32")[0]
    whole = best.compile(lambda x, b: best.linear(best.wanted(second(first(x, b), b), b), w), (D,))
    x, b = matrix(1, 9, D), best.begin(batch([0] * 9, [2, 8]))
    assert np.array_equal(np.asarray(whole(x, b)), np.asarray(best.linear(best.wanted(second(first(x, b), b), b), w)))


def test_results_outlive_later_calls(best):
    run = best.compile(Mlp(best), (D,))
    x = matrix(1, 5, D)
    first = run(x, None)
    copy = np.asarray(first).copy()
    for _ in range(3):
        run(matrix(9, 50, D), None)
    assert np.array_equal(np.asarray(first), copy)


def test_chained_buffers_and_numpy_agree(best):
    run = best.compile(Mlp(best), (D,))
    x = matrix(1, 5, D)
    assert np.array_equal(np.asarray(run(run(x, None), None)), np.asarray(run(np.asarray(run(x, None)), None)))


def test_inputs_views_and_repeats_as_results(best):
    def fn(x, y, b):
        s = best.add(x, y)
        left, right = best.split(s, [16, 32])
        return x, s, s, right, left

    x, y = matrix(1, 3, D), matrix(2, 3, D)
    out = [np.asarray(o) for o in best.compile(fn, (D, D))(x, y, None)]
    s = x + y
    for got, want in zip(out, (x, s, s, s[:, 16:], s[:, :16]), strict=True):
        assert np.array_equal(got, want)


def test_wanted_rows_inside_a_program(best):
    w, _ = pack(matrix(3, VOCAB, D), "f32")
    run = best.compile(lambda x, b: best.linear(best.wanted(x, b), w), (D,))
    x = matrix(1, 6, D)
    b = best.begin(batch([0] * 6, [1, 4, 5]))
    assert np.array_equal(np.asarray(run(x, b)), np.asarray(best.linear(x[[1, 4, 5]].copy(), w)))
    assert np.asarray(run(x, best.begin(batch([0] * 6, [])))).shape == (0, VOCAB)


def test_mixing_all_rows_with_wanted_ones_is_refused(best):
    with pytest.raises(AssertionError, match="mixes all rows"):
        best.compile(lambda x, b: best.add(x, best.wanted(x, b)), (D,))


def test_two_python_threads_share_one_device(best):
    run = best.compile(Mlp(best), (D,))
    inputs = [matrix(i, 1 + i, D) for i in range(8)]
    want = [np.asarray(run(x, None)).copy() for x in inputs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            i = int(rng.integers(8))
            if not np.array_equal(np.asarray(run(inputs[i], None)), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12), st.integers(0, 6)), max_size=30))
@settings(deadline=None)
def test_plan_never_lets_living_registers_overlap(items):
    life = [(i, 16 * size, first, first + more) for i, (size, first, more) in enumerate(items)]
    places, width = plan(life)
    for i, size, first, last in life:
        assert 0 <= places[i] <= width - size
        for j, size2, first2, last2 in life[:i]:
            apart = last < first2 or last2 < first or places[i] + size <= places[j] or places[j] + size2 <= places[i]
            assert apart, (i, j)


def test_plan_reuses_space():
    assert plan([(0, 16, 0, 1), (1, 16, 1, 2), (2, 16, 2, 3), (3, 16, 3, 4)])[1] == 32


# ---- misuse ----


def test_wrong_inputs(best):
    run = best.compile(Mlp(best), (D,))
    for bad in (matrix(1, 3, D + 1), matrix(1, D), matrix(1, 3, D).astype(np.float64), matrix(1, D, 3).T, [[1.0] * D]):
        with pytest.raises((ValueError, TypeError)):
            run(bad, None)
    with pytest.raises(ValueError, match="takes 1 inputs"):
        run(matrix(1, 3, D), matrix(1, 3, D), None)
    with pytest.raises(ValueError, match="shape"):
        run(matrix(1, 3, D), best.begin(batch([0, 0])))


def test_ids_and_positions_out_of_range(best):
    table, _ = pack(matrix(1, VOCAB, D), "f32")
    for token in (-1, VOCAB, 1 << 30):
        with pytest.raises(ValueError, match=f"id {token} is outside"):
            best.embed(best.begin(batch([0, token])), table)
    rope = Rope(8, np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="position 4 is outside"):
        best.rope(matrix(1, 5, 16), best.begin(batch([0] * 5)), rope, 8)


def test_a_program_that_needs_a_step_says_so(best):
    table, _ = pack(matrix(1, VOCAB, D), "f32")
    run = best.compile(lambda b: best.embed(b, table), ())
    with pytest.raises(ValueError, match="needs a step"):
        run(None)


def paged(n: int, **changes) -> Batch:
    """n rows of one sequence in pages of 4."""
    k, v = (np.zeros((3, 2, 4, 8), np.float32) for _ in "kv")
    parts = {
        "slots": np.arange(n, dtype=np.int64),
        "tables": np.array([[0, 1, -1]], np.int32),
        "lens": np.array([n], np.int32),
    }
    group = GroupBatch(KVGroup(0, KV(2, 8), (0,), (0, 1), 4), **(parts | changes), k=[k], v=[v])
    b = batch([0] * n)
    b.groups, b.of_layer = [group], [[0]]
    return b


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": np.array([0, 12], np.int64)},
        {"slots": np.array([-1, 0], np.int64)},
        {"slots": np.array([0], np.int64)},
        {"tables": np.array([[0, 3, -1]], np.int32)},
        {"tables": np.array([[0, -2, -1]], np.int32)},
        {"lens": np.array([1], np.int32)},
        {"lens": np.array([13], np.int32)},
        {"lens": np.array([2, 2], np.int32)},
    ],
    ids=str,
)
def test_a_batch_that_points_outside_its_pools_is_refused(best, changes):
    best.begin(paged(2))
    with pytest.raises(ValueError):
        best.begin(paged(2, **changes))


def test_a_batch_of_the_wrong_types_is_refused(best):
    with pytest.raises(TypeError):
        best.begin(paged(2, slots=np.arange(2, dtype=np.int32)))
    b = batch([1, 2])
    b.cu_rows = np.array([0, 3], np.int32)
    with pytest.raises(ValueError, match="cu_rows"):
        best.begin(b)
    b = batch([1, 2], [2])
    with pytest.raises(ValueError, match="want"):
        best.begin(b)


def test_attention_refuses_pools_of_another_shape(best):
    b = best.begin(paged(2))
    x = matrix(1, 2, 32)
    with pytest.raises(ValueError, match="no KV for this layer"):
        best.attention(x[:, :16].copy(), x[:, :16].copy(), x[:, :16].copy(), b, 1, AttnSpec(2, 2, 8, 1.0))
    with pytest.raises(ValueError, match="another head dimension"):
        best.attention(x, x, x, b, 0, AttnSpec(2, 2, 16, 1.0))
    with pytest.raises(ValueError, match="do not hold all"):
        best.attention(x, x, x, b, 0, AttnSpec(4, 4, 8, 1.0))


def test_pools_are_bound_again_when_they_change(best):
    first, second = paged(2), paged(2)
    x, spec = matrix(1, 2, 16), AttnSpec(2, 2, 8, 1.0)
    for b in (first, second, first):
        best.attention(x, x, x, best.begin(b), 0, spec)
    for b in (first, second):
        assert np.array_equal(b.groups[0].k[0][0, :, :2], x.reshape(2, 2, 8).transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "int3"}, "format = 'int3'"),
        ({"group": 48}, "group = 48"),
        ({"scales": None}, "scales: none"),
        ({"scales": np.ones((1, 1, 16), np.float16)}, "scales: 16 float16"),
        ({"data": np.zeros((2, 1, 8, 16, 4), np.int8)}, "int8, needs"),
        ({"data": np.zeros((1, 1, 8, 16, 4), np.uint8)}, "needs 1024 uint8"),
        ({"mins": np.ones(3, np.float16)}, "mins: 3 float16"),
        ({"shape": (20, 0)}, "at least 1"),
    ],
)
def test_weights_the_kernels_cannot_take(best, change, reason):
    good = pack(matrix(1, 20, 60), "int4g", 32, True)[0]
    assert why_not(good) is None
    fields = {f: getattr(good, f) for f in ("format", "shape", "data", "scales", "mins", "group", "factors")}
    bad = Packed(**(fields | change))
    assert reason in (best.why_not(bad) or "")
    with pytest.raises(ConfigError, match="native weight"):
        bind_weight(bad)
    with pytest.raises(ConfigError):
        best.compile(lambda x, b: best.linear(x, bad), (60,))


def test_memory_mapped_read_only_weights(best, tmp_path):
    w, _ = pack(matrix(1, 32, 64), "bf16")
    np.asarray(w.data).view(np.uint16).tofile(tmp_path / "w")
    mapped = np.memmap(tmp_path / "w", np.uint16, "r", shape=w.data.shape)
    x = matrix(2, 3, 64)
    same = Packed("bf16", (32, 64), mapped)
    assert np.array_equal(np.asarray(best.linear(x, same)), np.asarray(best.linear(x, w)))


def test_isa_choice(monkeypatch):
    known = dict(_native.instruction_sets())
    usable = [n for n, p in known.items() if not p]
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert choose_isa() == [n for n in usable if n != "amx_emulated"][-1]
    monkeypatch.setenv(ISA_VARIABLE, "generic")
    assert choose_isa() == "generic"
    assert choose_isa(usable[-1]) == usable[-1]
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(ConfigError, match=r"PACELINE_ISA = 'sse9'.*available here: generic"):
        choose_isa()
    monkeypatch.setattr(_native, "instruction_sets", lambda: [("generic", ""), ("amx", "the CPU has no AMX")])
    with pytest.raises(ConfigError, match="isa = 'amx': the CPU has no AMX; available here: generic"):
        choose_isa("amx")


def test_number_of_threads():
    assert NativeOps(isa="generic", n_threads=3).n_threads == 3
    with pytest.raises(ConfigError, match="n_threads = 0"):
        NativeOps(n_threads=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_buffers(best, dtype):
    a = best.empty((3, 2, 5), dtype)
    assert a.shape == (3, 2, 5)
    assert str(a.dtype) == dtype
    assert a.ctypes.data % 64 == 0
    a[...] = 1
    assert a.flags.writeable
    big = best.empty((1 << 20, 2), "float32")
    assert big.ctypes.data % (1 << 21) == 0


def test_buffers_speak_dlpack():
    b = _native.Buffer([2, 3], "float32")
    np.asarray(b)[...] = [[1, 2, 3], [4, 5, 6]]
    assert np.array_equal(np.from_dlpack(b), np.asarray(b))
    with pytest.raises(ValueError, match="known are"):
        _native.Buffer([2], "complex64")
    with pytest.raises(ValueError, match="negative or too large"):
        _native.Buffer([-1, 4], "float32")
    with pytest.raises((ValueError, MemoryError)):
        _native.Buffer([1 << 40, 1 << 20], "float32")


def test_profile_counts_instructions_while_it_is_on():
    ops = NativeOps(n_threads=1)
    run = ops.compile(Mlp(ops), (D,))
    x = matrix(1, 5, D)
    busy = ops.device.busy
    run(x, None)
    assert ops.device.busy > busy
    assert ops.device.profile(True) == []
    for _ in range(3):
        run(x, None)
    ops.sample(matrix(2, 1, VOCAB), *(np.zeros(1) for _ in range(5)))
    spent = {name: (calls, seconds) for name, calls, seconds in ops.device.profile(False)}
    assert {name: calls for name, (calls, _) in spent.items()} == {
        f"linear {2 * FF}x{D} bf16": 3,
        "act": 3,
        "add": 3,
        f"linear {D}x{FF} bf16": 3,
        "sample": 1,
    }  # fmt: skip    the norm and the last sum are fused into the linears
    assert all(seconds > 0 for _, seconds in spent.values())
    assert sum(seconds for _, seconds in spent.values()) < ops.device.busy - busy
    run(x, None)
    assert ops.device.profile(False) == []
