"""From shares to a `Batch`: the ragged rows of one step."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from paceline.core.adapters import Adapter
from paceline.core.batch import Batch, GroupBatch
from paceline.core.kvcache import KVCache, SeqKV
from paceline.core.scheduler import Share
from paceline.core.sequence import Sequence


def build(shares: Seq[Share], cache: KVCache, of_layer: list[list[int]]) -> Batch:
    """The batch of a step; rows of sequence s are its pending tokens, then its draft."""
    tokens: list[int] = []
    positions: list[int] = []
    want: list[int] = []
    cu_rows = [0]
    has_tree = False
    for share in shares:
        seq, at = share.seq, len(tokens)
        tokens += seq.tokens[seq.n_computed : seq.n_computed + share.n - share.n_draft]
        if share.n_draft:
            tokens += seq.draft.tokens.tolist()
            has_tree = has_tree or not seq.draft.is_chain
        positions += share.positions
        want += [at + r for r in share.want]
        cu_rows.append(at + share.n)
    if len(want) == len(tokens) == len(shares):  # decoding: one row each, all of them wanted
        cu, wanted = _one_row_each(len(want))
    else:
        cu, wanted = np.array(cu_rows, np.int32), np.array(want, np.int32)
    kvs = [s.seq.kv for s in shares]
    groups = [_group(shares, kvs, cache, g) for g in range(len(cache.groups))]
    mask, tail = _tree(shares, groups[0].lens, cu) if has_tree else (None, None)
    rows = np.array(tokens, np.int32), np.array(positions, np.int32)
    batch = Batch(*rows, cu, wanted, groups, of_layer, mask, tail)
    if any(s.seq.adapter is not None for s in shares):
        batch.adapters, batch.adapter_of = _adapters(shares)
    return batch


def _adapters(shares: Seq[Share]) -> tuple[list[Any], np.ndarray]:
    """The weights of the step's adapters, each once, and which of them each sequence has (-1: none)."""
    at: dict[Adapter, int] = {}
    of = [-1 if s.seq.adapter is None else at.setdefault(s.seq.adapter, len(at)) for s in shares]
    return [adapter.weights for adapter in at], np.array(of, np.int32)


@functools.lru_cache(maxsize=64)
def _one_row_each(n: int) -> tuple[np.ndarray, np.ndarray]:
    """`cu_rows` and `want` of n sequences."""
    return np.arange(n + 1, dtype=np.int32), np.arange(n, dtype=np.int32)


def _group(shares: Seq[Share], kvs: Seq[SeqKV], cache: KVCache, g: int) -> GroupBatch:
    tables, lens = cache.tables(kvs, g)
    slots: list[int] = []
    for share in shares:
        slots += share.slots[g]
    return GroupBatch(cache.groups[g], np.array(slots, np.int64), tables, lens, cache.k[g], cache.v[g])


def _tree(shares: Seq[Share], lens: np.ndarray, cu_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bit j of a row's mask: it sees index tail + j, where tail is the index of its sequence's first row of this step."""
    mask = np.empty(cu_rows[-1], np.uint64)
    tail = (lens - np.diff(cu_rows)).astype(np.int32)
    for share, at in zip(shares, cu_rows, strict=False):
        bits = tree_bits(share.seq, share.n - share.n_draft)
        mask[at : at + share.n] = bits
    return mask, tail


def tree_bits(seq: Sequence, n_real: int) -> np.ndarray:
    """uint64 (n_real + len(draft),): real rows see the rows before them, draft nodes all real rows and their ancestors."""
    bits = [(1 << (r + 1)) - 1 for r in range(n_real)]
    real = (1 << n_real) - 1
    for i, parent in enumerate(seq.draft.parents):
        above = bits[n_real + parent] if parent >= 0 else real
        bits.append(above | 1 << (n_real + i))
    return np.array(bits, np.uint64)
