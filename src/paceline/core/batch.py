"""One step over ragged rows: explicit, unpadded, built once per step and passed down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.core.specs import KVGroup

MAX_TREE = 64  # draft rows of one sequence in one step: one bit each in `Batch.mask`


@dataclass
class GroupBatch:
    """One KV group's view of a step.

    slots:  int64 (n_rows,)            slot (page * page_size + offset) that each row's K and V are written to
    tables: int32 (n_seqs, max_pages)  page ids in index order; -1 where there is no page (beyond the end, or behind a window)
    lens:   int32 (n_seqs,)            entries of the sequence in this group, this step's rows included
    k, v:   one pool per layer of the group, in the order of `group.layers`:
            (n_pages, len(group.heads), page_size, dim), float32, float16 or bfloat16 (the backend's array type); int8: `core/entries.py`

    Row r of sequence s has index `lens[s] - n_rows_of_s + (r - cu_rows[s])`.
    """

    group: KVGroup
    slots: np.ndarray
    tables: np.ndarray
    lens: np.ndarray
    k: list[Any]
    v: list[Any]


@dataclass
class Batch:
    """What one forward pass computes.

    tokens:    int32 (n_rows,)     token ids
    positions: int32 (n_rows,)     place in the text
    cu_rows:   int32 (n_seqs + 1,) rows of sequence s are cu_rows[s]:cu_rows[s+1]
    want:      int32 (n_want,)     rows whose logits are needed, ascending
    groups:    every KV group's tables and pools
    of_layer:  for each layer the indices into `groups` that hold its KV heads
    mask:      uint64 (n_rows,) or None. When given, a row attends to all indices below `tail[s]`, and to index tail[s] + j
               exactly when bit j is set (draft trees: ancestors and itself), in this order: the row computes what it would if
               its visible entries lay side by side. A window counts the visible entries, the row's own last. None: causal.
    tail:      int32 (n_seqs,) or None, given together with mask
    adapters:  what `Ops.adapter` gave for the adapters of this step, each once
    adapter_of: int32 (n_seqs,) into them, -1: none; None: no sequence has one
    """

    tokens: np.ndarray
    positions: np.ndarray
    cu_rows: np.ndarray
    want: np.ndarray
    groups: list[GroupBatch]
    of_layer: list[list[int]]
    mask: np.ndarray | None = None
    tail: np.ndarray | None = None
    adapters: list[Any] = field(default_factory=list)
    adapter_of: np.ndarray | None = None
    taps: dict[str, Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def n_seqs(self) -> int:
        return int(self.cu_rows.shape[0]) - 1
