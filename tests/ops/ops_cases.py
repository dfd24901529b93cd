"""What the tests of ops share: formats under test, paged steps built by hand, and dense attention to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paceline.core import entries
from paceline.core.batch import Batch, GroupBatch
from paceline.core.specs import KV, AttnSpec, KVGroup

FORMATS = ["f32", "f16", "bf16", "int8:group=0", "int8:group=32", "int8:group=64", "int8:group=128"]
FORMATS += [f"int4g:group={g}{m}" for g in (32, 64, 128) for m in ("", ",mins")]
QUANTISED = [f for f in FORMATS if f.startswith("int")]


class Paged:
    """Sequences of one layer in pages: every head group has pools and scattered page tables of its own."""

    def __init__(
        self,
        ops: Any,
        spec: AttnSpec,
        lens: Sequence[int],
        heads: Sequence[Sequence[int]] | None = None,
        page_size: int = 4,
        dtype: str = "float32",
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        self.ops, self.lens, self.size = ops, lens, page_size
        self.groups, self.tables, self.pools = [], [], []
        for i, members in enumerate(heads or [range(spec.n_kv_heads)]):
            most = max(-(-n // page_size) for n in lens)
            n_pages = most * len(lens) + 3
            group = KVGroup(i, KV(spec.n_kv_heads, spec.dim), (0,), tuple(members), page_size)
            self.groups.append(group)
            self.tables.append(rng.permutation(n_pages)[: most * len(lens)].reshape(len(lens), most).astype(np.int32))
            shape = (n_pages, len(group.heads), page_size, entries.n_items(dtype, spec.dim))
            self.pools.append((ops.empty(shape, dtype), ops.empty(shape, dtype)))

    def batch(self, parts: Sequence[tuple[int, int, int]], masks: np.ndarray | None = None, forget: int = 0) -> Batch:
        """Rows lo .. hi of each (sequence, lo, hi). masks: one word per row, from each part's first row on.

        forget: so many leading pages of every table are released.
        """
        cu_rows = np.cumsum([0, *(hi - lo for _, lo, hi in parts)]).astype(np.int32)
        positions = np.concatenate([np.arange(lo, hi) for _, lo, hi in parts]).astype(np.int32)
        seqs = np.array([s for s, _, _ in parts])
        row_seq = np.repeat(seqs, [hi - lo for _, lo, hi in parts])
        lens = np.array([hi for _, _, hi in parts], np.int32)
        views = []
        for group, table, (k, v) in zip(self.groups, self.tables, self.pools, strict=True):
            slots = table[row_seq, positions // self.size].astype(np.int64) * self.size + positions % self.size
            visible = table[seqs].copy()
            visible[:, :forget] = -1
            views.append(GroupBatch(group, slots, visible, lens, [k], [v]))
        want = np.arange(cu_rows[-1], dtype=np.int32)
        tail = None if masks is None else np.array([lo for _, lo, _ in parts], np.int32)
        return Batch(np.zeros_like(positions), positions, cu_rows, want, views, [list(range(len(views)))], masks, tail)


def attend(
    ops: Any, paged: Paged, spec: AttnSpec, qkv: Sequence[tuple[np.ndarray, ...]], parts: Any, **kw: Any
) -> np.ndarray:
    """One step of attention: rows lo .. hi of each part, out of qkv[sequence]."""
    q, k, v = (np.concatenate([qkv[s][i][lo:hi] for s, lo, hi in parts]) for i in range(3))
    arrays = [ops.xp.asarray(a) for a in (q, k, v)]
    return ops.numpy(ops.attention(*arrays, ops.begin(paged.batch(parts, **kw)), 0, spec))


def random_qkv(spec: AttnSpec, lens: Sequence[int], seed: int = 1) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    widths = (spec.n_heads * spec.dim, spec.n_kv_heads * spec.dim, spec.n_kv_heads * spec.dim)
    return [tuple(rng.standard_normal((n, w)).astype(np.float32) for w in widths) for n in lens]


def dense(spec: AttnSpec, q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Attention in float64 with allowed (n, n) booleans, windows applied by index as well."""
    n = len(q)
    per = spec.n_heads // spec.n_kv_heads
    q3, k3, v3 = (a.astype(np.float64).reshape(n, -1, spec.dim) for a in (q, k, v))
    k3, v3 = (np.repeat(a, per, axis=1) for a in (k3, v3))
    s = np.einsum("ihd,jhd->hij", q3, k3) * spec.scale
    if spec.softcap is not None:
        s = spec.softcap * np.tanh(s / spec.softcap)
    if spec.window is not None:
        i, j = np.indices((n, n))
        allowed = allowed & (j > i - spec.window)
    s = np.where(allowed, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v3).reshape(n, -1)


def causal(n: int) -> np.ndarray:
    return np.tril(np.ones((n, n), bool))
