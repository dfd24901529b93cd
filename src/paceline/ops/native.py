"""Ops on the native CPU core: eager calls run a one-instruction program, `compile` traces a whole function into one.

Activations outside programs are native buffers (np.asarray(x) is a view of one); NumPy float32 matrices are taken as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paceline import _native
from paceline.core import entries
from paceline.core.batch import Batch, GroupBatch
from paceline.core.errors import ConfigError
from paceline.core.specs import AttnSpec
from paceline.ops import Array, Experts, Rope, formats
from paceline.ops.adapters import LowRank, Sites, tiled
from paceline.ops.packed import Packed
from paceline.ops.record import Recorder, Reg

ISA_VARIABLE = "PACELINE_ISA"
_SMALL_PAGES = 4 << 20  # of each KV pool: a short conversation must not take a huge page in each of a hundred pools
_EAGER_PROGRAMS = 512  # one-instruction programs kept; they hold their weights
_FLOATS = ("f32", "f16", "bf16")
_GROUPS = {"int8": (0, 32, 64, 128), "int4": (32,), "int4g": (32, 64, 128)}


def choose_isa(isa: str | None = None) -> str:
    """The instruction set to run on: `isa`, else $PACELINE_ISA, else the best one here.

    Raises ConfigError when what was asked for cannot run on this machine.
    """
    known = dict(_native.instruction_sets())
    usable = [name for name, problem in known.items() if not problem]
    field, wanted = ("isa", isa) if isa else (ISA_VARIABLE, os.environ.get(ISA_VARIABLE))
    if not wanted:
        return next(name for name in reversed(usable) if not name.endswith("_emulated"))  # those are for tests
    if wanted not in known:
        raise ConfigError(f"{field} = {wanted!r}: unknown; available here: {', '.join(usable)}")
    if known[wanted]:
        raise ConfigError(f"{field} = {wanted!r}: {known[wanted]}; available here: {', '.join(usable)}")
    return wanted


class NativeOps:
    """The whole Ops protocol on compiled kernels. One instance has its own threads and scratch memory."""

    name = "native"

    def __init__(self, isa: str | None = None, n_threads: int | None = None):
        if n_threads is not None and not 1 <= n_threads <= 1024:
            raise ConfigError(f"n_threads = {n_threads}: must be from 1 to 1024")
        self.isa = choose_isa(isa)
        self.device = _native.Device(self.isa, n_threads or _native.usable_threads())
        self.n_threads: int = self.device.n_threads
        self._eager: dict[tuple[Any, ...], tuple[_native.Program, tuple[Any, ...]]] = {}
        self._pools: dict[int, tuple[list[Any], list[Any], _native.Pools]] = {}
        self._layers: tuple[Any, np.ndarray, np.ndarray] | None = None
        self._self_test()

    def _self_test(self) -> None:
        """Small integers through the instructions that differ most between machines; about a millisecond."""
        x = (np.arange(8 * 64, dtype=np.float32).reshape(8, 64) * 7) % 255 - 127
        x[:, 0] = 127  # the largest: integers then quantise to themselves
        want = x @ x.T
        for fmt in ("int8", "bf16"):
            w = self.pack(x, fmt, 0)
            for n in (1, 8):
                if not np.array_equal(np.asarray(self.linear(x[:n], w)), want[:n]):
                    raise ConfigError(
                        f"isa = {self.isa!r}: wrong results in the self-test on this machine; choose another with {ISA_VARIABLE}"
                    )
        self._eager.clear()

    # ---- weights and memory ----

    def why_not(self, w: Packed) -> str | None:
        """Why the kernels cannot take `w`, or None."""
        return why_not(w)

    def pack(self, w: np.ndarray, fmt: str, group: int | None = None, mins: bool = False) -> Packed:
        """`formats.get(fmt).pack(w, group, mins)` with the same bits, by native code.

        w: (n_out, n_in) float32, float16 or bfloat16. Raises CheckpointError for NaN, infinity and values out of range.
        """
        form = formats.get(fmt)
        if form.why_not(w.shape, group, mins) or not w.flags.c_contiguous or str(w.dtype) not in entries.FLOATS:
            return form.pack(w, group, mins)  # which copies what is strided and says what is wrong
        group = form.default_group if group is None else group
        out = {k: _new(shape, str(dtype)) for k, (shape, dtype) in form.arrays(w.shape, group, mins).items()}
        rest = [_raw(out[name]) if name in out else None for name in ("scales", "mins", "factors")]
        if self.device.pack(_raw(w), str(w.dtype), form.name, group, _raw(out["data"]), *rest):
            return form.pack(w, group, mins)
        return Packed(form.name, w.shape, out["data"], out.get("scales"), out.get("mins"), group, out.get("factors"))

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An uninitialised, aligned array, for a KV pool: memory is taken as it is touched, in small pages at its beginning."""
        return _new(shape, dtype, _SMALL_PAGES)

    def move(self, pool: np.ndarray, src: np.ndarray, dst: np.ndarray) -> None:
        self.device.move(_raw(pool), np.ascontiguousarray(src, np.int64), np.ascontiguousarray(dst, np.int64))

    def adapter(self, sites: Sites) -> _native.Adapter:
        return _native.Adapter([_site(updates) for updates in sites])

    # ---- one step ----

    def begin(self, batch: Batch) -> _native.Step:
        groups = [(self._pools_of(g), g.slots, g.tables, g.lens) for g in batch.groups]
        cu_layer, layer_at = self._layer_map(batch)
        rows = (batch.tokens, batch.positions, batch.cu_rows, batch.want)
        extra = (batch.mask, batch.tail, batch.adapters, batch.adapter_of)
        return _native.Step(*rows, groups, cu_layer, layer_at, *extra)

    def _pools_of(self, g: GroupBatch) -> _native.Pools:
        """Bound once per group, and again when its lists of arrays are other ones."""
        known = self._pools.get(g.group.id)
        if known is not None and known[0] is g.k and known[1] is g.v:
            return known[2]
        dtype = str(g.k[0].dtype)
        if dtype not in entries.KINDS:
            raise ConfigError(f"kv dtype = {dtype}: the native kernels take {', '.join(entries.KINDS)}")
        pools = _native.Pools([_raw(a) for a in g.k], [_raw(a) for a in g.v], list(g.group.heads), dtype)
        self._pools[g.group.id] = (g.k, g.v, pools)
        return pools

    def _layer_map(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Where each layer's KV lives: (group, place within the group's layers), flat with offsets."""
        if self._layers is None or self._layers[0] is not batch.of_layer:
            at = [
                [(g, batch.groups[g].group.layers.index(layer)) for g in gs] for layer, gs in enumerate(batch.of_layer)
            ]
            cu = np.cumsum([0, *map(len, at)]).astype(np.int32)
            flat = np.array([pair for pairs in at for pair in pairs], np.int32).reshape(-1, 2)
            self._layers = (batch.of_layer, cu, flat)
        return self._layers[1], self._layers[2]

    def compile(self, fn: Callable[..., Any], n_in: tuple[int, ...]) -> Callable[..., Any]:
        """Trace `fn(*arrays, batch)` into one native program. ConfigError for what the kernels cannot do.

        Within another trace the result is `fn` itself, so that compiled parts make a larger program.
        """
        recorder = Recorder()
        result = fn(*[recorder.input(n) for n in n_in], recorder)
        results = [result] if isinstance(result, Reg) else list(result)
        run = recorder.finish(self.device, results).run

        def call(*args: Any) -> Any:
            return fn(*args) if isinstance(args[0], Reg | Recorder) else run(args[-1], *args[:-1])

        return call

    def numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    # ---- activations ----

    def _apply(
        self,
        op: str,
        ins: tuple[Array, ...],
        cols: int,
        args: tuple[Any, ...] = (),
        batch: Any = None,
        wanted: bool | None = None,
        in_place: bool = False,
    ) -> Array:
        """Record the op when tracing; otherwise run it as a program of its own."""
        recorder = batch if isinstance(batch, Recorder) else next((x.recorder for x in ins if isinstance(x, Reg)), None)
        if recorder is not None:
            return recorder.call(op, ins, cols, _lower(args), wanted, in_place)
        key = (
            op,
            cols,
            *(x.shape[1] for x in ins),
            *(a if isinstance(a, int | float | str | None) else id(a) for a in args),
        )
        known = self._eager.get(key)
        if known is None:
            if len(self._eager) >= _EAGER_PROGRAMS:
                self._eager.clear()
            recorder = Recorder()
            inputs = [recorder.input(x.shape[1]) for x in ins]
            out = recorder.call(op, inputs, cols, _lower(args), wanted, in_place)
            known = self._eager[key] = (
                recorder.finish(self.device, [out]),
                args,
            )  # args live on, so their ids stay theirs
        return known[0].run(batch, *[_matrix(x) for x in ins])

    def embed(self, batch: Any, table: Packed, *, by: str = "tokens") -> Array:
        assert by in ("tokens", "positions")
        return self._apply("embed", (), table.shape[1], (table, by == "positions"), batch)

    def linear(self, x: Array, w: Packed, bias: np.ndarray | None = None) -> Array:
        return self._apply("linear", (x,), w.shape[0], (w, bias))

    def rescored(self, x: Array, coarse: Packed, fine: Packed) -> Array:
        return self._apply("rescored", (x,), fine.shape[0], (coarse, fine, None, 0.0, 0.0))

    def adapt(self, y: Array, x: Array, batch: Any, site: int) -> Array:
        return self._apply("adapt", (y, x), y.shape[1], (site,), batch, in_place=True)

    def rms_norm(self, x: Array, weight: np.ndarray, eps: float, *, offset: float = 0.0) -> Array:
        return self._apply("rms_norm", (x,), x.shape[1], (weight, float(eps), float(offset)))

    def layer_norm(self, x: Array, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Array:
        return self._apply("layer_norm", (x,), x.shape[1], (weight, bias, float(eps)))

    def rope(self, x: Array, batch: Any, rope: Rope, head_dim: int) -> Array:
        return self._apply("rope", (x,), x.shape[1], (rope.cos, rope.sin, rope.dim, head_dim, rope.interleaved), batch)

    def attention(self, q: Array, k: Array, v: Array, batch: Any, layer: int, spec: AttnSpec) -> Array:
        args = (
            layer,
            spec.n_heads,
            spec.n_kv_heads,
            spec.dim,
            float(spec.scale),
            spec.window or 0,
            float(spec.softcap or 0.0),
        )
        return self._apply("attention", (q, k, v), q.shape[1], args, batch)

    def act(self, x: Array, kind: str) -> Array:
        return self._apply("act", (x,), x.shape[1], (kind,))

    def gated(self, x: Array, kind: str) -> Array:
        return self._apply("gated", (x,), x.shape[1] // 2, (kind,))

    def add(self, x: Array, y: Array) -> Array:
        return self._apply("add", (x, y), x.shape[1])

    def scale(self, x: Array, s: float) -> Array:
        return self._apply("scale", (x,), x.shape[1], (float(s),))

    def softcap(self, x: Array, cap: float) -> Array:
        return self._apply("softcap", (x,), x.shape[1], (float(cap),))

    def split(self, x: Array, sizes: Sequence[int]) -> Sequence[Array]:
        ends = np.cumsum(sizes).tolist()
        assert ends[-1] == x.shape[1], f"split: sizes {list(sizes)} of {x.shape[1]} columns"
        if isinstance(x, Reg):
            return [x.columns(end - n, n) for n, end in zip(sizes, ends, strict=True)]
        return np.split(np.asarray(x), ends[:-1], axis=1)

    def moe(self, x: Array, router: Array, experts: Experts) -> Array:
        args = (experts.gate_up, experts.down, experts.n_active, experts.kind, experts.normalise)
        return self._apply("moe", (x, router), x.shape[1], args)

    def wanted(self, x: Array, batch: Any) -> Array:
        return self._apply("wanted", (x,), x.shape[1], (), batch, wanted=True)

    # ---- choosing tokens ----

    def sample(self, logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray,
               min_p: np.ndarray, u: np.ndarray) -> np.ndarray:  # fmt: skip
        try:  # converting what needs no conversion is not free
            return self.device.sample(logits, temperature, top_k, top_p, min_p, u)
        except TypeError:
            f32 = np.float32
        return self.device.sample(
            np.ascontiguousarray(logits, f32), np.ascontiguousarray(temperature, f32), np.ascontiguousarray(top_k, np.int32),
            np.ascontiguousarray(top_p, f32), np.ascontiguousarray(min_p, f32), np.ascontiguousarray(u, np.float64),
        )  # fmt: skip

    def logprobs(self, logits: np.ndarray, ids: np.ndarray, n_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.device.logprobs(
            np.ascontiguousarray(logits, np.float32), np.ascontiguousarray(ids, np.int64), n_top
        )


# ---- what crosses the border ----


def why_not(w: Packed) -> str | None:
    """Why the kernels cannot take `w` (see ops/packed.py for what they expect), or None."""
    if w.format in _FLOATS:
        if w.group or any(a is not None for a in (w.scales, w.mins, w.factors)):
            return f"format {w.format}: takes neither group, scales, mins nor factors"
    elif w.format not in _GROUPS:
        return f"format = {w.format!r}: kernels exist for {', '.join([*_FLOATS, *_GROUPS])}"
    elif w.group not in _GROUPS[w.format]:
        return f"format {w.format}: group = {w.group}, kernels exist for {', '.join(map(str, _GROUPS[w.format]))}"
    if problem := formats.get(w.format).why_not(w.shape, w.group, w.mins is not None):
        return problem
    wanted = formats.spec(w).arrays(w.shape)
    for name, a in (("data", w.data), ("scales", w.scales), ("mins", w.mins), ("factors", w.factors)):
        if name not in wanted:
            if a is not None:
                return f"format {w.format}: has no {name}"
            continue
        shape, dtype = wanted[name]
        size, kinds = math.prod(shape), {str(dtype), "uint16" if dtype.itemsize == 2 and name == "data" else str(dtype)}
        if a is None or a.size != size or str(a.dtype) not in kinds:
            return f"{name}: {'none' if a is None else f'{a.size} {a.dtype}'}, needs {size} {dtype}"
        if not a.flags.c_contiguous:
            return f"{name}: must be contiguous"
    return None


def _new(shape: tuple[int, ...], dtype: str, n_small: int = 0) -> np.ndarray:
    """An uninitialised, aligned array; in huge pages when large, but for its first n_small bytes."""
    array = np.asarray(_native.Buffer(list(shape), dtype, n_small))
    return array.view(_bfloat16()) if dtype == "bfloat16" else array


def _site(updates: Sequence[LowRank]) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, int, int]]]:
    """The updates of a site as csrc/kernels/adapt.cpp takes them: A's below each other, a scale per rank, (B, col, n) each."""
    if not updates:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.float32), []
    dtype = np.result_type(*(m.dtype for u in updates for m in (u.a, u.b)))
    a = np.concatenate([np.asarray(u.a, dtype) for u in updates])
    scale = np.concatenate([np.full(len(u.a), u.scale, np.float32) for u in updates])
    return _raw(a), scale, [(_raw(tiled(np.asarray(u.b, dtype))), u.col, len(u.b)) for u in updates]


def bind_weight(w: Packed) -> _native.Weight:
    """The native view of `w`. ConfigError where the kernels cannot take it."""
    problem = why_not(w)
    if problem:
        raise ConfigError(f"native weight of shape {w.shape}: {problem}")
    rest = [None if a is None else _raw(a) for a in (w.scales, w.mins, w.factors)]
    return _native.Weight(w.format, *w.shape, w.group, _raw(w.data), *rest)


def _lower(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_lower_one(a) for a in args)


def _lower_one(a: Any) -> Any:
    if isinstance(a, Packed):
        return bind_weight(a)
    if isinstance(a, list | tuple):
        return [bind_weight(w) for w in a]
    if isinstance(a, np.ndarray):
        return np.ascontiguousarray(a, np.float32)
    return a


def _matrix(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32) if isinstance(x, np.ndarray) else x


def _raw(a: np.ndarray) -> np.ndarray:
    """16-bit floats as uint16, which is how they cross into C++."""
    return a.view(np.uint16) if a.dtype.itemsize == 2 else a


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16
