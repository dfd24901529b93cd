"""From shares to a `Batch`: the ragged rows of one step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from paceline.core.batch import Batch, GroupBatch
from paceline.core.kvcache import KVCache
from paceline.core.scheduler import Share, positions_of
from paceline.core.sequence import Sequence


def wanted_rows(share: Share) -> range:
    """Rows of the share (counted from its first) whose logits somebody reads."""
    seq, n_real = share.seq, share.n - share.n_draft
    if seq.request.pool == "logits" or (seq.params.prompt_logprobs is not None and seq.n_computed < seq.n_prompt):
        return range(share.n)
    if seq.n_computed + n_real < len(seq.tokens) or not seq.request.generate:
        return range(0)
    return range(n_real - 1, share.n)


def build(shares: Seq[Share], cache: KVCache, of_layer: list[list[int]]) -> Batch:
    """The batch of a step; rows of sequence s are its pending tokens, then its draft."""
    cu_rows = np.zeros(len(shares) + 1, np.int32)
    np.cumsum([s.n for s in shares], out=cu_rows[1:])
    tokens = np.empty(cu_rows[-1], np.int32)
    positions = np.empty(cu_rows[-1], np.int32)
    want: list[int] = []
    for share, at in zip(shares, cu_rows, strict=False):
        seq, n_real = share.seq, share.n - share.n_draft
        tokens[at : at + n_real] = seq.tokens[seq.n_computed : seq.n_computed + n_real]
        tokens[at + n_real : at + share.n] = seq.draft.tokens
        positions[at : at + share.n] = positions_of(seq, n_real)
        want.extend(int(at) + r for r in wanted_rows(share))
    groups = [_group(shares, cache, g) for g in range(len(cache.groups))]
    mask, tail = (
        _tree(shares, groups[0].lens, cu_rows) if any(not s.seq.draft.is_chain for s in shares) else (None, None)
    )
    return Batch(tokens, positions, cu_rows, np.array(want, np.int32), groups, of_layer, mask, tail)


def _group(shares: Seq[Share], cache: KVCache, g: int) -> GroupBatch:
    tables, lens = cache.tables([s.seq.kv for s in shares], g)
    slots = np.concatenate([s.slots[g] for s in shares]) if len(shares) > 1 else shares[0].slots[g]
    return GroupBatch(cache.groups[g], slots, tables, lens, cache.k[g], cache.v[g])


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
