"""`Ops` written against the array API: on NumPy the oracle, on torch tensors the plain GPU backend.

Rows are independent by construction, so that a sequence has the same bits alone, in a batch or in chunks:
- plain numbers: one matrix-vector product per row. A matrix-matrix product would be faster, but BLAS chooses its
  kernels, and with them the order of summation, by the number of rows; here each row's call is the same whatever the
  other rows are.
- quantised weights: a product of integers small enough that float32 is exact in any order, then elementwise work.
- attention: products and softmax for one row at a time, over exactly the entries that it sees.
`invariant=False` takes one matrix product for all rows of plain numbers instead (breaks BATCH_INVARIANT).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import numpy as numpy_xp

from paceline.core import entries
from paceline.core.batch import Batch, GroupBatch
from paceline.core.errors import ConfigError
from paceline.core.specs import AttnSpec
from paceline.ops import RESCORED, Array, Experts, Rope, formats, sampling, visible
from paceline.ops.adapters import LowRank, Sites
from paceline.ops.packed import LANES, Packed

_PIECE = 1 << 24  # elements of a matrix that are unpacked at a time
_EXACT = 1024  # products of two int8 whose sum float32 holds exactly


@dataclass
class Bound:
    """A step bound to this backend: the batch, and what is derived from it once for all layers."""

    batch: Batch
    derived: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[..., Any], *args: Any) -> Any:
        if key not in self.derived:
            self.derived[key] = make(*args)
        return self.derived[key]


@dataclass(frozen=True)
class _Sight:
    """What rows lo .. hi of a sequence see of a group: entries at (pages, offsets), and which of them each row sees."""

    lo: int
    hi: int
    pages: Array
    offsets: Array
    entries: list[Any]


class _Cache:
    """The most recently used unpacked weights, at most `max_bytes`. Items hold their `Packed`: its id stays its own."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.items: OrderedDict[tuple[int, int], tuple[Packed, Any, int]] = OrderedDict()

    def get(self, w: Packed, part: int, make: Callable[[], Any], n_bytes: int) -> Any:
        key = (id(w), part)
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key][1]
        made = make()
        if n_bytes <= self.max_bytes:
            self.items[key] = (w, made, n_bytes)
            self.n_bytes += n_bytes
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self.items.popitem(last=False)[1][2]
        return made


class ReferenceOps:
    """Ops on arrays of `xp` (None: NumPy; or the torch module) on `device`, computing in `dtype` (float32 or float64).

    cache_bytes: how much memory unpacked weights may take; with 0 each use unpacks anew, a bounded piece at a time.
    Raises ConfigError for another array library or dtype.
    """

    def __init__(
        self, xp: Any = None, device: Any = None, dtype: str = "float32", cache_bytes: int = 0, invariant: bool = True
    ):
        self.xp: Any = _namespace(xp)
        self.name = "reference" if self.xp is numpy_xp else "torch"
        if dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype = {dtype!r}: the reference computes in float32 or float64")
        self.device, self.dtype, self.invariant = device, getattr(self.xp, dtype), invariant
        self._bf16 = getattr(self.xp, "bfloat16", ml_dtypes.bfloat16)
        self._cache = _Cache(cache_bytes)

    def pack(self, w: np.ndarray, fmt: str, group: int | None = None, mins: bool = False) -> Packed:
        return formats.pack(w, fmt, group, mins)

    def why_not(self, w: Packed) -> str | None:
        known = formats.names()
        return None if w.format in known else f"format {w.format!r} is unknown; there are {', '.join(known)}"

    # ---------------------------------------------------------------- memory

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        known = {"float32": self.xp.float32, "float16": self.xp.float16, "bfloat16": self._bf16, "int8": self.xp.int8}
        return self.xp.zeros(shape, dtype=known[dtype], device=self.device)

    def move(self, pool: Array, src: np.ndarray, dst: np.ndarray) -> None:
        size = pool.shape[2]
        moved = pool[self._index(src // size), :, self._index(src % size)]  # a copy: all are read before any is written
        pool[self._index(dst // size), :, self._index(dst % size)] = moved

    def adapter(self, sites: Sites) -> list[list[LowRank]]:
        return [[replace(u, a=self._array(u.a), b=self._array(u.b)) for u in updates] for updates in sites]

    def numpy(self, x: Array) -> np.ndarray:
        if isinstance(x, np.ndarray):
            return x
        if x.dtype == self._bf16:
            return x.detach().view(self.xp.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        out: np.ndarray = x.detach().cpu().numpy()
        return out

    # ---------------------------------------------------------------- a step

    def begin(self, batch: Batch) -> Bound:
        return Bound(batch)

    def compile(self, fn: Callable[..., Any], n_in: tuple[int, ...]) -> Callable[..., Any]:
        return fn

    def wanted(self, x: Array, batch: Bound) -> Array:
        return x[self._index(batch.batch.want)]

    # ---------------------------------------------------------------- matrices

    def embed(self, batch: Bound, table: Packed, *, by: str = "tokens") -> Array:
        ids = np.asarray(getattr(batch.batch, by), np.int64)
        return self._array(formats.get(table.format).rows(table, ids))

    def linear(self, x: Array, w: Packed, bias: np.ndarray | None = None) -> Array:
        product = self._quantised if formats.get(w.format).quantised else self._plain
        if w.format == "bf16":
            x = self._as(self._as(x, self._bf16), self.dtype)
        pieces = [product(x, w, i, piece) for i, piece in enumerate(_pieces(w))]
        y = pieces[0] if len(pieces) == 1 else self.xp.concat(pieces, axis=1)
        return y if bias is None else y + self._array(bias)

    def adapt(self, y: Array, x: Array, batch: Bound, site: int) -> Array:
        b = batch.batch
        if b.adapter_of is None:
            return y
        for s, which in enumerate(b.adapter_of.tolist()):
            for u in b.adapters[which][site] if which >= 0 else ():
                n = u.b.shape[0]
                for r in range(int(b.cu_rows[s]), int(b.cu_rows[s + 1])):
                    y[r, u.col : u.col + n] += u.b @ ((u.a @ x[r]) * u.scale)
        return y

    def rescored(self, x: Array, coarse: Packed, fine: Packed) -> Array:
        n_rows, n_out = x.shape[0], fine.shape[0]
        n_blocks = -(-n_out // LANES)
        if n_blocks <= RESCORED:
            return self.linear(x, fine)
        y = self.linear(x, coarse)
        blocks = self.xp.full((n_rows, n_blocks * LANES), -math.inf, dtype=self.dtype, device=self.device)
        blocks[:, :n_out] = y
        blocks = self.numpy(self.xp.reshape(blocks, (n_rows, n_blocks, LANES)))
        best = np.where(np.isnan(blocks), np.inf, blocks).max(axis=2)
        chosen = np.argsort(-best, axis=1, kind="stable")[:, :RESCORED]
        again = np.zeros((n_rows, n_blocks), bool)
        np.put_along_axis(again, chosen, True, axis=1)
        mask = self.xp.asarray(np.repeat(again, LANES, axis=1)[:, :n_out], device=self.device)
        return self.xp.where(mask, self.linear(x, fine), y)

    def _plain(self, x: Array, w: Packed, i: int, piece: Packed) -> Array:
        """x W^T for plain numbers."""

        def make() -> Array:
            return self._array(formats.get(w.format).unpack(piece))

        matrix = self._cache.get(w, i, make, math.prod(piece.shape) * self._itemsize)
        if not self.invariant:
            return x @ matrix.T
        y = self.xp.empty((x.shape[0], piece.shape[0]), dtype=self.dtype, device=self.device)
        for r in range(x.shape[0]):
            y[r] = matrix @ x[r]
        return y

    def _quantised(self, x: Array, w: Packed, i: int, piece: Packed) -> Array:
        """Sum over groups of scale_x * (scale_w * (q_x . q_w) + min_w * sum(q_x)), in the order of the groups."""
        xp = self.xp
        q, scales, mins = self._cache.get(w, i, lambda: self._codes(piece), math.prod(piece.shape) * 4)
        n_groups, _, size = q.shape
        q_x, scale_x = self._quantise(x, n_groups, size)
        y = xp.zeros((x.shape[0], piece.shape[0]), dtype=self.dtype, device=self.device)
        for g in range(n_groups):
            term = self._exact(q_x[:, g], q[g]) * scales[g]
            if mins is not None:
                term = term + self._as(xp.sum(q_x[:, g], axis=-1, keepdims=True), self.dtype) * mins[g]
            y = y + term * scale_x[:, g : g + 1]
        return y

    def _quantise(self, x: Array, n_groups: int, size: int) -> tuple[Array, Array]:
        """Symmetric int8 by row and group: codes float32 (n_rows, n_groups, size) and scales (n_rows, n_groups)."""
        xp, n_rows = self.xp, x.shape[0]
        if n_groups * size > x.shape[1]:
            pad = xp.zeros((n_rows, n_groups * size - x.shape[1]), dtype=x.dtype, device=self.device)
            x = xp.concat([x, pad], axis=1)
        x = xp.reshape(x, (n_rows, n_groups, size))
        scale = xp.max(xp.abs(x), axis=-1) / 127
        scale = xp.where(scale == 0, xp.ones_like(scale), scale)
        codes = xp.clip(xp.round(x * (1 / scale)[:, :, None]), -127, 127)
        return self._as(codes, xp.float32), scale

    def _exact(self, a: Array, b: Array) -> Array:
        """a b^T for integers in [-127, 127] as float32, exact up to the last rounding to the compute dtype."""
        if a.shape[1] <= _EXACT:
            return self._as(a @ b.T, self.dtype)
        total = self.xp.zeros((a.shape[0], b.shape[0]), dtype=self.xp.float64, device=self.device)
        for lo in range(0, a.shape[1], _EXACT):
            total = total + self._as(a[:, lo : lo + _EXACT] @ b[:, lo : lo + _EXACT].T, self.xp.float64)
        return self._as(total, self.dtype)

    def _codes(self, p: Packed) -> tuple[Array, Array, Array | None]:
        """q float32 (n_groups, n_out, group), scales and mins (n_groups, n_out); padding k's have code 0."""
        c = formats.get(p.format).codes(p)
        n_out, n_in = c.q.shape
        size = c.group or n_in
        n_groups = -(-n_in // size)
        q = np.zeros((n_out, n_groups * size), np.float32)
        q[:, :n_in] = c.q
        if c.bits == 4 and c.mins is None:
            q[:, :n_in] -= 8
        grouped = np.ascontiguousarray(q.reshape(n_out, n_groups, size).transpose(1, 0, 2))
        q_xp = self.xp.asarray(grouped, device=self.device)
        return q_xp, self._array(c.scales.T), None if c.mins is None else self._array(c.mins.T)

    # ---------------------------------------------------------------- norms, rotation, elementwise

    def rms_norm(self, x: Array, weight: np.ndarray, eps: float, *, offset: float = 0.0) -> Array:
        xp = self.xp
        runs = xp.reshape(x, (-1, len(weight)))
        runs = runs / xp.sqrt(xp.mean(runs * runs, axis=-1, keepdims=True) + eps) * (self._array(weight) + offset)
        return xp.reshape(runs, x.shape)

    def layer_norm(self, x: Array, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Array:
        xp = self.xp
        x = x - xp.mean(x, axis=-1, keepdims=True)
        y = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * self._array(weight)
        return y if bias is None else y + self._array(bias)

    def rope(self, x: Array, batch: Bound, rope: Rope, head_dim: int) -> Array:
        xp, at = self.xp, batch.batch.positions

        def make() -> tuple[Array, Array]:
            return self._array(rope.cos[at][:, None]), self._array(rope.sin[at][:, None])

        cos, sin = batch.once(("rope", id(rope)), make)
        heads = xp.reshape(x, (x.shape[0], -1, head_dim))
        turned, rest = heads[:, :, : rope.dim], heads[:, :, rope.dim :]
        half = rope.dim // 2
        if rope.interleaved:
            a, b = turned[:, :, 0::2], turned[:, :, 1::2]
        else:
            a, b = turned[:, :, :half], turned[:, :, half:]
        parts = [a * cos - b * sin, b * cos + a * sin]
        turned = xp.reshape(xp.stack(parts, axis=-1), turned.shape) if rope.interleaved else xp.concat(parts, axis=-1)
        return xp.reshape(xp.concat([turned, rest], axis=-1), x.shape)

    def act(self, x: Array, kind: str) -> Array:
        xp = self.xp
        with np.errstate(over="ignore"):  # exp(-x) and x^3 may reach infinity: the limits are right
            if kind == "silu":
                return x / (1 + xp.exp(-x))
            if kind == "gelu_tanh":
                return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
            if kind == "gelu":
                return 0.5 * x * (1 + self._erf(x * math.sqrt(0.5)))
            assert kind == "relu", kind
            return xp.where(x < 0, xp.zeros_like(x), x)

    def gated(self, x: Array, kind: str) -> Array:
        n = x.shape[1] // 2
        return self.act(x[:, :n], kind) * x[:, n:]

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def scale(self, x: Array, s: float) -> Array:
        return x * s

    def softcap(self, x: Array, cap: float) -> Array:
        return cap * self.xp.tanh(x / cap)

    def split(self, x: Array, sizes: Sequence[int]) -> Sequence[Array]:
        ends = np.cumsum(sizes)
        return [x[:, end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]

    # ---------------------------------------------------------------- attention

    def attention(self, q: Array, k: Array, v: Array, batch: Bound, layer: int, spec: AttnSpec) -> Array:
        xp, b = self.xp, batch.batch
        n_rows, per = b.n_rows, spec.n_heads // spec.n_kv_heads
        q = xp.reshape(q, (n_rows, spec.n_kv_heads, per, spec.dim))
        k, v = (xp.reshape(a, (n_rows, spec.n_kv_heads, spec.dim)) for a in (k, v))
        out = xp.zeros(q.shape, dtype=self.dtype, device=self.device)
        for g in b.of_layer[layer]:
            group = b.groups[g]
            at, heads = group.group.layers.index(layer), self._index(np.array(group.group.heads))
            self._write(group, group.k[at], k[:, heads])
            self._write(group, group.v[at], v[:, heads])
            for sight in batch.once(("sights", g, spec.window), self._sights, b, group, spec.window):
                keys, values = (self._read(pool[at], sight) for pool in (group.k, group.v))
                for r, seen in zip(range(sight.lo, sight.hi), sight.entries, strict=True):
                    out[r, heads] = self._attend(q[r, heads], keys[:, seen], values[:, seen], spec)
        return xp.reshape(out, (n_rows, spec.n_heads * spec.dim))

    def _attend(self, q: Array, k: Array, v: Array, spec: AttnSpec) -> Array:
        """One row: q (heads, per, dim), k and v (heads, n, dim) of the entries it sees -> (heads, per, dim)."""
        xp = self.xp
        s = (q @ xp.permute_dims(k, (0, 2, 1))) * spec.scale
        if spec.softcap is not None:
            s = spec.softcap * xp.tanh(s / spec.softcap)
        e = xp.exp(s - xp.max(s, axis=-1, keepdims=True))
        return (e @ v) / xp.sum(e, axis=-1, keepdims=True)

    def _write(self, group: GroupBatch, pool: Array, rows: Array) -> None:
        """rows (n_rows, heads, dim) to the rows' slots."""
        size = group.group.page_size
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float16: infinity, as in every backend
            items = entries.encode(rows, "int8", self.xp) if pool.dtype == self.xp.int8 else self._as(rows, pool.dtype)
        pool[self._index(group.slots // size), :, self._index(group.slots % size)] = items

    def _sights(self, batch: Batch, group: GroupBatch, window: int | None) -> list[_Sight]:
        """One for each sequence that has rows."""
        index, size, out = visible.row_indices(batch, group), group.group.page_size, []
        for s in range(batch.n_seqs):
            lo, hi = int(batch.cu_rows[s]), int(batch.cu_rows[s + 1])
            if lo == hi:
                continue
            start = int(visible.first_seen(index[lo:hi], window).min())
            seen = np.arange(start, int(group.lens[s]))
            pages = group.tables[s, seen // size]
            assert (pages >= 0).all(), "a row sees an entry whose page was released"
            own = [_run(visible.seen(batch, r, s, int(index[r]), window) - start) for r in range(lo, hi)]
            out.append(_Sight(lo, hi, self._index(pages), self._index(seen % size), own))
        return out

    def _read(self, pool: Array, sight: _Sight) -> Array:
        """The entries in sight, (heads, n, dim) in the compute dtype."""
        items = pool[sight.pages, :, sight.offsets]
        if pool.dtype == self.xp.int8:
            items = entries.decode(items, "int8", self.xp)
        return self._as(self.xp.permute_dims(items, (1, 0, 2)), self.dtype)

    # ---------------------------------------------------------------- experts

    def moe(self, x: Array, router: Array, experts: Experts) -> Array:
        xp = self.xp
        ids, weights = _route(self.numpy(router), experts.n_active, experts.normalise)
        found = xp.zeros((*ids.shape, x.shape[1]), dtype=self.dtype, device=self.device)
        for e in np.unique(ids).tolist():
            rows, places = (self._index(a) for a in np.nonzero(ids == e))
            hidden = self.gated(self.linear(x[rows], experts.gate_up[e]), experts.kind)
            found[rows, places] = self.linear(hidden, experts.down[e])
        share = self._array(weights)
        y = found[:, 0] * share[:, :1]
        for j in range(1, experts.n_active):
            y = y + found[:, j] * share[:, j : j + 1]
        return y

    # ---------------------------------------------------------------- choosing tokens

    def sample(
        self,
        logits: np.ndarray,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        min_p: np.ndarray,
        u: np.ndarray,
    ) -> np.ndarray:
        return sampling.sample(logits, temperature, top_k, top_p, min_p, u)

    def logprobs(self, logits: np.ndarray, ids: np.ndarray, n_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return sampling.logprobs(logits, ids, n_top)

    # ---------------------------------------------------------------- arrays

    @property
    def _itemsize(self) -> int:
        return 4 if self.dtype == self.xp.float32 else 8

    def _as(self, x: Array, dtype: Any) -> Array:
        return self.xp.astype(x, dtype, copy=False)

    def _array(self, a: np.ndarray) -> Array:
        """Numbers from the host in the compute dtype."""
        if self.device is None and isinstance(a, np.ndarray) and self.name == "reference":
            return a.astype(self.dtype, copy=False)
        a = np.ascontiguousarray(a, np.float32)
        return self.xp.asarray(a if a.flags.writeable else a.copy(), dtype=self.dtype, device=self.device)

    def _index(self, a: np.ndarray) -> Array:
        """Indices from the host, for indexing the backend's arrays."""
        a = a.astype(np.int64, copy=False)
        return a if self.name == "reference" else self.xp.asarray(a, device=self.device)

    def _erf(self, x: Array) -> Array:
        if self.name == "torch":
            return self.xp.erf(x)
        return np.asarray(_ERF(x), x.dtype)  # NumPy has none; correct to the last bit matters more here than speed


_ERF = np.frompyfunc(math.erf, 1, 1)


def _namespace(xp: Any) -> Any:
    name = "numpy" if xp is None else xp.__name__.rpartition(".")[2]
    if name == "numpy":
        return numpy_xp
    if name == "torch":
        from array_api_compat import torch as torch_xp

        return torch_xp
    raise ConfigError(f"xp = {name}: the reference ops run on numpy or torch")


def _pieces(w: Packed) -> Iterator[Packed]:
    """The matrix by blocks of outputs, each small enough to be unpacked. A fixed cut: it shapes the products."""
    step = max(1, _PIECE // (w.shape[1] * LANES))
    n_blocks = -(-w.shape[0] // LANES)
    if step >= n_blocks:
        yield w
        return
    for lo in range(0, n_blocks, step):
        at = slice(lo, lo + step)
        n_out = min(w.shape[0] - lo * LANES, step * LANES)
        scales, mins, factors = (None if a is None else a[at] for a in (w.scales, w.mins, w.factors))
        yield Packed(w.format, (n_out, w.shape[1]), w.data[at], scales, mins, w.group, factors)


def _run(index: np.ndarray) -> np.ndarray | slice:
    """Consecutive indices as a slice."""
    lo, hi = int(index[0]), int(index[-1]) + 1
    return slice(lo, hi) if hi - lo == len(index) else index


def _route(logits: np.ndarray, n_active: int, normalise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Experts int64 (n_rows, n_active) in descending order of weight (ties: lower id), and their weights."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :n_active]
    weights = np.take_along_axis(p, ids, axis=1)
    return ids, weights / weights.sum(axis=1, keepdims=True) if normalise else weights
