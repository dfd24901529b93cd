"""What a layer keeps per token, and which layers keep it together.

Position, index and slot are three things: the place in the text, the place in a sequence's cache, the place in memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KV:
    """Keys and values of every token: `heads` KV heads of `dim` floats each."""

    heads: int
    dim: int


@dataclass(frozen=True)
class Window:
    """As `KV`, but a row at position p attends to positions in (p - size, p] only."""

    heads: int
    dim: int
    size: int


StateSpec = KV | Window


@dataclass(frozen=True)
class AttnSpec:
    """How one layer attends.

    n_heads query heads share n_kv_heads key/value heads in order (query head h reads KV head
    h // (n_heads // n_kv_heads)); scores are `scale * q.k`, then `softcap * tanh(s / softcap)` when softcap is set;
    `window` limits a row at index i to indices in (i - window, i].
    """

    n_heads: int
    n_kv_heads: int
    dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class KVGroup:
    """Layers (and optionally a subset of their KV heads) that share page tables.

    `heads` are the KV heads of each of `layers` that live in this group, ascending; by default all of them.
    """

    id: int
    spec: StateSpec
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    page_size: int
