"""Which cache entries each row of a step attends to (core/batch.py), for the interpreters that are not compiled."""

from __future__ import annotations

import numpy as np

from paceline.core.batch import Batch, GroupBatch


def row_seqs(batch: Batch) -> np.ndarray:
    """int64 (n_rows,): the sequence of each row."""
    return np.repeat(np.arange(batch.n_seqs), np.diff(batch.cu_rows))


def row_indices(batch: Batch, group: GroupBatch) -> np.ndarray:
    """int64 (n_rows,): each row's own index in the group."""
    n_rows = np.diff(batch.cu_rows)
    first = group.lens.astype(np.int64) - n_rows - batch.cu_rows[:-1]
    return np.repeat(first, n_rows) + np.arange(batch.n_rows)


def first_seen(index: np.ndarray, window: int | None) -> np.ndarray:
    """The lowest index within a row's window."""
    return np.zeros_like(index) if window is None else np.maximum(index - window + 1, 0)


def seen(batch: Batch, row: int, seq: int, index: int, window: int | None) -> np.ndarray:
    """int64, ascending: the indices that one row attends to."""
    if batch.mask is None or batch.tail is None:
        return np.arange(0 if window is None else max(index - window + 1, 0), index + 1)
    tail, bits = int(batch.tail[seq]), int(batch.mask[row])
    above = tail + np.array([j for j in range(bits.bit_length()) if bits >> j & 1], np.int64)
    n_seen = tail + len(above)
    start = 0 if window is None else max(n_seen - window, 0)
    return np.concatenate([np.arange(start, tail), above[max(0, start - tail) :]])


def n_seen(batch: Batch, group: GroupBatch, window: int | None) -> np.ndarray:
    """int64 (n_rows,): how many indices each row attends to."""
    index = row_indices(batch, group)
    if batch.mask is None:
        return index + 1 - first_seen(index, window)
    seqs = row_seqs(batch)
    return np.array([len(seen(batch, r, int(seqs[r]), int(i), window)) for r, i in enumerate(index)], np.int64)
