"""`Ops` that compute nothing and write down what each operation would cost: the same model program, counted.

Arrays are shapes; weights may be placeholders (`formats.placeholder`). Conventions:
- additions, multiplications, divisions, exp, tanh and sqrt are one FLOP each; quantising activations is not counted;
- a matrix is read once per call, whatever the number of rows; an expert once if any row goes to it (see `moe`);
- every operation reads its inputs and writes its output (no fusion); splits are views and free;
- a sequence's keys and values within its rows' windows are read once per layer, as a flash-style kernel does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np

from paceline.core import entries
from paceline.core.batch import Batch, GroupBatch
from paceline.core.kvcache import make_groups, of_layer
from paceline.core.specs import AttnSpec, StateSpec
from paceline.ops import RESCORED, Experts, Rope, formats, visible
from paceline.ops.adapters import Sites
from paceline.ops.packed import LANES, Packed

ACT_FLOPS = {"silu": 4, "gelu": 5, "gelu_tanh": 9, "relu": 1}  # for one number


@dataclass(frozen=True)
class Shape:
    """A float32 activation matrix without its numbers."""

    rows: int
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def nbytes(self) -> int:
        return 4 * self.size


@dataclass(frozen=True)
class Pool:
    """A KV pool (n_pages, n_heads, page_size, dim) without its numbers."""

    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class Cost:
    """FLOPs, and bytes by what they are: weights, activations read and written, KV cache read and written."""

    flops: int = 0
    weights: int = 0
    read: int = 0
    written: int = 0
    kv_read: int = 0
    kv_written: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.read + self.written + self.kv_read + self.kv_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Entry:
    """One operation of the program; `layer` is known inside a compiled function that attends.

    name: what the native core's profile calls it, "add" or "linear 960x576 int4".
    """

    op: str
    layer: int | None
    cost: Cost
    name: str


@dataclass
class Ledger:
    """Every operation in order."""

    entries: list[Entry] = field(default_factory=list)

    def total(self) -> Cost:
        return sum((e.cost for e in self.entries), Cost())

    def by_op(self) -> dict[str, Cost]:
        return self._sums(lambda e: e.op)

    def by_name(self) -> dict[str, Cost]:
        return self._sums(lambda e: e.name)

    def by_layer(self) -> dict[int | None, Cost]:
        """None: embedding, final norm and head."""
        return self._sums(lambda e: e.layer)

    def _sums(self, key: Callable[[Entry], Any]) -> dict[Any, Cost]:
        out: dict[Any, Cost] = {}
        for e in self.entries:
            out[key(e)] = out.get(key(e), Cost()) + e.cost
        return out


class CountOps:
    """Ops on shapes. kv_dtype: how KV entries are stored where a batch brings no pools (see `step`)."""

    name = "count"

    def __init__(self, kv_dtype: str = "bfloat16"):
        self.ledger = Ledger()
        self._kv_dtype = kv_dtype

    def _record(self, op: str, out: Shape, *ins: Shape, layer: int | None = None, name: str = "", **cost: int) -> Shape:
        read = sum(x.nbytes for x in ins)
        self.ledger.entries.append(Entry(op, layer, Cost(read=read, written=out.nbytes, **cost), name or op))
        return out

    def pack(self, w: np.ndarray, fmt: str, group: int | None = None, mins: bool = False) -> Packed:
        return formats.pack(w, fmt, group, mins)

    def why_not(self, w: Packed) -> str | None:
        known = formats.names()
        return None if w.format in known else f"format {w.format!r} is unknown; there are {', '.join(known)}"

    def adapter(self, sites: Sites) -> Sites:
        return sites

    # memory and steps

    def empty(self, shape: tuple[int, ...], dtype: str) -> Pool:
        return Pool(tuple(shape), entries.FLOATS.get(dtype, 1))

    def move(self, pool: Pool, src: np.ndarray, dst: np.ndarray) -> None:
        n = len(src) * pool.shape[1] * pool.shape[3] * pool.itemsize
        self.ledger.entries.append(Entry("move", None, Cost(kv_read=n, kv_written=n), "move"))

    def begin(self, batch: Batch) -> Batch:
        return batch

    def compile(self, fn: Callable[..., Any], n_in: tuple[int, ...]) -> Callable[..., Any]:
        """`fn`, whose entries all get the layer that its attention names."""

        def run(*args: Any) -> Any:
            entries, start = self.ledger.entries, len(self.ledger.entries)
            out = fn(*args)
            layer = next((e.layer for e in entries[start:] if e.layer is not None), None)
            entries[start:] = [replace(e, layer=layer) for e in entries[start:]]
            return out

        return run

    def numpy(self, x: Shape | Pool) -> np.ndarray:
        """Zeros of its shape, read-only and without memory behind them."""
        return np.broadcast_to(np.float32(0), x.shape)

    def wanted(self, x: Shape, batch: Batch) -> Shape:
        part = Shape(len(batch.want), x.cols)
        return self._record("wanted", part, part)

    # activations

    def embed(self, batch: Batch, table: Packed, *, by: str = "tokens") -> Shape:
        padded = -(-table.shape[0] // LANES) * LANES
        out = Shape(batch.n_rows, table.shape[1])
        return self._record("embed", out, weights=formats.nbytes(table) * batch.n_rows // padded)

    def linear(self, x: Shape, w: Packed, bias: np.ndarray | None = None) -> Shape:
        n_out, n_in = w.shape
        assert x.cols == n_in, f"{x.cols} columns meet a matrix of {n_in} inputs"
        flops = x.rows * n_out * (2 * n_in + (bias is not None))
        weights = formats.nbytes(w) + (4 * n_out if bias is not None else 0)
        name = f"linear {n_out}x{n_in} {w.format}"
        return self._record("linear", Shape(x.rows, n_out), x, name=name, flops=flops, weights=weights)

    def adapt(self, y: Shape, x: Shape, batch: Batch, site: int) -> Shape:
        """Each row's own updates; an adapter's matrices are read once for all of its rows, and rows without one are not touched."""
        if batch.adapter_of is None:
            return y
        flops = weights = touched = 0
        rows = np.diff(batch.cu_rows)
        for i, sites in enumerate(batch.adapters):
            n = int(rows[batch.adapter_of == i].sum())
            for u in sites[site]:
                flops += n * (2 * (u.a.size + u.b.size) + len(u.a) + len(u.b))
                weights += u.a.nbytes + u.b.nbytes
                touched += 4 * n * len(u.b)
        read = touched + 4 * x.cols * int(rows[batch.adapter_of >= 0].sum())
        self.ledger.entries.append(Entry("adapt", None, Cost(flops, weights, read, touched), "adapt"))
        return y

    def rescored(self, x: Shape, coarse: Packed, fine: Packed) -> Shape:
        """The fine blocks of different rows count as different ones, as long as there are so many."""
        assert coarse.shape == fine.shape == (fine.shape[0], x.cols), f"{coarse.shape}, {fine.shape}, {x.cols} columns"
        n_out, n_in = fine.shape
        n_blocks = -(-n_out // LANES)
        chosen = min(RESCORED, n_blocks)
        flops = 2 * x.rows * n_in * (n_out + min(chosen * LANES, n_out))
        weights = formats.nbytes(coarse) + formats.nbytes(fine) * min(x.rows * chosen, n_blocks) // n_blocks
        name = f"rescored {n_out}x{n_in} {coarse.format} {fine.format}"
        return self._record("rescored", Shape(x.rows, n_out), x, name=name, flops=flops, weights=weights)

    def rms_norm(self, x: Shape, weight: np.ndarray, eps: float, *, offset: float = 0.0) -> Shape:
        return self._record("rms_norm", x, x, flops=4 * x.size, weights=4 * len(weight))

    def layer_norm(self, x: Shape, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Shape:
        vectors = 1 if bias is None else 2
        return self._record("layer_norm", x, x, flops=(5 + vectors) * x.size, weights=4 * vectors * len(weight))

    def rope(self, x: Shape, batch: Batch, rope: Rope, head_dim: int) -> Shape:
        return self._record("rope", x, x, flops=3 * x.rows * (x.cols // head_dim) * rope.dim)

    def attention(self, q: Shape, k: Shape, v: Shape, batch: Batch, layer: int, spec: AttnSpec) -> Shape:
        flops = kv_read = kv_written = 0
        each = 4 * spec.dim + 4 + (3 if spec.softcap is not None else 0)  # q.k and p.v; scale, subtract, exp, sum
        for g in batch.of_layer[layer]:
            group = batch.groups[g]
            n_heads = len(group.group.heads)
            n_seen = int(visible.n_seen(batch, group, spec.window).sum())
            flops += n_seen * n_heads * (spec.n_heads // spec.n_kv_heads) * each
            entry = 2 * n_heads * self._entry_bytes(group, layer, spec.dim)
            kv_read += entry * _entries(batch, group, spec.window)
            kv_written += entry * batch.n_rows
        return self._record("attention", q, q, k, v, layer=layer, flops=flops, kv_read=kv_read, kv_written=kv_written)

    def _entry_bytes(self, group: GroupBatch, layer: int, dim: int) -> int:
        if not group.k:
            return entries.n_bytes(self._kv_dtype, dim)
        pool = group.k[group.group.layers.index(layer)]
        return int(pool.shape[3]) * int(pool.itemsize)

    def act(self, x: Shape, kind: str) -> Shape:
        return self._record("act", x, x, flops=ACT_FLOPS[kind] * x.size)

    def gated(self, x: Shape, kind: str) -> Shape:
        out = Shape(x.rows, x.cols // 2)
        return self._record("gated", out, x, flops=(ACT_FLOPS[kind] + 1) * out.size)

    def add(self, x: Shape, y: Shape) -> Shape:
        assert x == y, f"{x} and {y} do not add"
        return self._record("add", x, x, y, flops=x.size)

    def scale(self, x: Shape, s: float) -> Shape:
        return self._record("scale", x, x, flops=x.size)

    def softcap(self, x: Shape, cap: float) -> Shape:
        return self._record("softcap", x, x, flops=3 * x.size)

    def split(self, x: Shape, sizes: Sequence[int]) -> Sequence[Shape]:
        assert sum(sizes) == x.cols, f"{x.cols} columns do not split into {sizes}"
        return [Shape(x.rows, n) for n in sizes]

    def moe(self, x: Shape, router: Shape, experts: Experts) -> Shape:
        """Weights read: those of the experts that rows choosing uniformly are expected to reach, all experts alike."""
        n, active = len(experts.gate_up), experts.n_active
        gate_up, down = experts.gate_up[0], experts.down[0]
        d_ff = down.shape[1]
        one = 2 * math.prod(gate_up.shape) + d_ff * (ACT_FLOPS[experts.kind] + 1) + 2 * math.prod(down.shape)
        reached = n * (1 - (1 - active / n) ** x.rows)
        flops = x.rows * (active * (one + 2 * x.cols) + 4 * n)
        weights = round(reached * (formats.nbytes(gate_up) + formats.nbytes(down)))
        return self._record("moe", x, x, router, flops=flops, weights=weights)

    # choosing tokens

    def sample(
        self,
        logits: np.ndarray,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        min_p: np.ndarray,
        u: np.ndarray,
    ) -> np.ndarray:
        """Token 0 for every row."""
        rows = Shape(*logits.shape)
        self._record("sample", Shape(rows.rows, 1), rows, flops=4 * rows.size)
        return np.zeros(rows.rows, np.int64)

    def logprobs(self, logits: np.ndarray, ids: np.ndarray, n_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = Shape(*logits.shape)
        self._record("logprobs", Shape(rows.rows, 1 + n_top), rows, flops=4 * rows.size)
        shape = (rows.rows, n_top)
        return np.zeros(rows.rows, np.float32), np.zeros(shape, np.int64), np.zeros(shape, np.float32)


def _entries(batch: Batch, group: GroupBatch, window: int | None) -> int:
    """Cache entries that the rows of each sequence see together, over all sequences."""
    index = visible.row_indices(batch, group)
    starts = visible.first_seen(index, window)
    total = 0
    for s in range(batch.n_seqs):
        lo, hi = int(batch.cu_rows[s]), int(batch.cu_rows[s + 1])
        if lo < hi:
            total += int(group.lens[s]) - int(starts[lo:hi].min())
    return total


def step(states: Sequence[StateSpec], new: Sequence[int], cached: Sequence[int], want: str = "last") -> Batch:
    """A batch to be counted: sequence s computes new[s] tokens after cached[s] that it has; nothing is allocated.

    states: one per layer. want: rows whose logits are needed, "last" of each sequence, "all" or "none".
    """
    groups = make_groups(states, page_size=32)
    cu_rows = np.cumsum([0, *new]).astype(np.int32)
    lens = np.array(new, np.int32) + np.array(cached, np.int32)
    positions = np.concatenate([np.arange(c, c + n) for n, c in zip(new, cached, strict=True)]).astype(np.int32)
    wanted = {"last": cu_rows[1:] - 1, "all": np.arange(cu_rows[-1]), "none": np.empty(0)}[want]
    rows = np.zeros(cu_rows[-1], np.int64)
    no_pages = np.full((len(lens), 0), -1, np.int32)
    views = [GroupBatch(g, rows, no_pages, lens, [], []) for g in groups]
    return Batch(rows.astype(np.int32), positions, cu_rows, wanted.astype(np.int32), views, of_layer(groups))
