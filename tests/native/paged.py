"""A paged KV cache in NumPy for the attention tests: every slot that is not in use holds NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import ml_dtypes
import numpy as np

from paceline.core import entries
from paceline.core.batch import Batch, GroupBatch
from paceline.core.specs import KV, AttnSpec, KVGroup

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


def blank(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Entries that are NaN; of int8 their scales are."""
    return np.full((*shape[:-1], entries.n_items(dtype, shape[-1])), -1 if dtype == "int8" else np.nan, DTYPES[dtype])


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """(..., dim) floats as a pool holds them."""
    return entries.encode(x, dtype) if dtype == "int8" else x.astype(DTYPES[dtype])


def read(pool: np.ndarray, dtype: str) -> np.ndarray:
    return entries.decode(pool, dtype)


@dataclass(frozen=True)
class Text:
    """Queries (n, n_heads * dim), keys and values (n, n_kv_heads * dim) of one sequence."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __getitem__(self, rows: slice | list[int]) -> Text:
        return Text(self.q[rows], self.k[rows], self.v[rows])

    def __len__(self) -> int:
        return len(self.q)


def text(seed: int, n: int, spec: AttnSpec) -> Text:
    rng = np.random.default_rng(seed)
    kv = spec.n_kv_heads * spec.dim
    return Text(*(rng.standard_normal((n, m), dtype=np.float32) for m in (spec.n_heads * spec.dim, kv, kv)))


class Cache:
    """One layer's pools and the pages of each sequence; `heads` and `page_sizes` name one group each."""

    def __init__(
        self,
        spec: AttnSpec,
        n_slots: int,
        page_sizes: Sequence[int] = (16,),
        dtype: str = "float32",
        heads: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ):
        self.spec, self.rng = spec, np.random.default_rng(seed)
        heads = heads or [range(spec.n_kv_heads)]
        kv = KV(spec.n_kv_heads, spec.dim)
        self.groups = [
            KVGroup(i, kv, (0,), tuple(h), p) for i, (h, p) in enumerate(zip(heads, page_sizes, strict=True))
        ]
        shapes = [(-(-n_slots // g.page_size) + 64, len(g.heads), g.page_size, spec.dim) for g in self.groups]
        self.k = [blank(s, dtype) for s in shapes]
        self.v = [blank(s, dtype) for s in shapes]
        self.free = [list(self.rng.permutation(s[0])) for s in shapes]
        self.pages: list[dict[int, list[int]]] = [{} for _ in shapes]
        self.lens: dict[int, int] = {}

    def slot(self, g: int, seq: int, index: int) -> int:
        size, pages = self.groups[g].page_size, self.pages[g].setdefault(seq, [])
        while len(pages) <= index // size:
            pages.append(int(self.free[g].pop()))
        return pages[index // size] * size + index % size

    def step(
        self, ops, parts: Sequence[tuple[int, Text]], masks: Sequence[Sequence[int]] | None = None
    ) -> list[np.ndarray]:
        """The next rows of some sequences; returns what each attended to. `masks`: one list of ints per part."""
        start = [self.lens.get(s, 0) for s, _ in parts]
        for s, rows in parts:
            self.lens[s] = self.lens.get(s, 0) + len(rows)
        n_rows = [len(rows) for _, rows in parts]
        cu = np.concatenate([[0], np.cumsum(n_rows)]).astype(np.int32)
        groups = [self._group(g, parts, start) for g in range(len(self.groups))]
        zeros = np.zeros(cu[-1], np.int32)
        mask = None if masks is None else np.array([b for m in masks for b in m], np.uint64)
        tail = None if masks is None else np.array(start, np.int32)
        batch = Batch(zeros, zeros, cu, np.zeros(0, np.int32), groups, [list(range(len(groups)))], mask, tail)
        q, k, v = (np.concatenate([getattr(t, f) for _, t in parts]) for f in ("q", "k", "v"))
        out = np.array(ops.attention(q, k, v, ops.begin(batch), 0, self.spec))
        return [out[a:b] for a, b in pairwise(cu)]

    def _group(self, g: int, parts: Sequence[tuple[int, Text]], start: Sequence[int]) -> GroupBatch:
        slots = np.array(
            [self.slot(g, s, i) for (s, t), at in zip(parts, start, strict=True) for i in range(at, at + len(t))],
            np.int64,
        )
        n_pages = max(len(self.pages[g][s]) for s, _ in parts)
        tables = np.full((len(parts), n_pages), -1, np.int32)
        for row, (s, _) in zip(tables, parts, strict=True):
            row[: len(self.pages[g][s])] = self.pages[g][s]
        lens = np.array([self.lens[s] for s, _ in parts], np.int32)
        return GroupBatch(self.groups[g], slots, tables, lens, [self.k[g]], [self.v[g]])

    def drop(self, seq: int, n: int) -> None:
        """Forget the last n entries (their slots are poisoned again)."""
        self.lens[seq] -= n
        for g in range(len(self.groups)):
            for i in range(self.lens[seq], self.lens[seq] + n):
                page, at = divmod(self.slot(g, seq, i), self.groups[g].page_size)
                poison = -1 if self.k[g].dtype == np.int8 else np.nan
                self.k[g][page, :, at] = self.v[g][page, :, at] = poison


def exact(
    t: Text, spec: AttnSpec, dtype: str, rows: Sequence[int] | None = None, seen=None, pairs: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 attention of rows over the text's entries as the pool stores them; `seen(row)` gives their indices.

    Returns it and how far the values lie from it in the weighted mean: what relative errors of the weights are multiplied by.
    pairs: queries are first rounded as the kernels for pairs of bfloat16 do, with the factor of the scores in base 2.
    """
    k, v = (read(stored(a.reshape(len(t), spec.n_kv_heads, spec.dim), dtype), dtype) for a in (t.k, t.v))
    q = t.q.astype(np.float64)
    if pairs:
        k, v = (a.astype(DTYPES["bfloat16"]) for a in (k, v))
        factor = np.float32(spec.scale / spec.softcap if spec.softcap else spec.scale * np.log2(np.e))
        q = (t.q * factor).astype(DTYPES["bfloat16"]).astype(np.float64) / factor
    k, v, q = k.astype(np.float64), v.astype(np.float64), q.reshape(len(t), spec.n_kv_heads, -1, spec.dim)
    out, spread = np.empty_like(q), np.empty_like(q)
    for r in range(len(t)) if rows is None else rows:
        at = seen(r) if seen else np.arange(max(0, r + 1 - (spec.window or r + 1)), r + 1)
        s = np.einsum("hgd,nhd->hgn", q[r], k[at]) * spec.scale
        if spec.softcap:
            s = spec.softcap * np.tanh(s / spec.softcap)
        w = np.exp(s - s.max(-1, keepdims=True))
        w /= w.sum(-1, keepdims=True)
        out[r] = np.einsum("hgn,nhd->hgd", w, v[at])
        for d in range(spec.dim):
            spread[r, ..., d] = (w * abs(v[at][..., d].T[:, None] - out[r, ..., d, None])).sum(-1)
    take = slice(None) if rows is None else list(rows)
    return out.reshape(len(t), -1)[take], spread.reshape(len(t), -1)[take]
