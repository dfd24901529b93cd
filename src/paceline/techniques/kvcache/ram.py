"""A tier of KV blocks in main memory, beside the cache.

The cache is sized for what runs together; what it gives up costs a copy of its bytes to keep, and a copy and a checksum to bring back,
a few hundredths of computing it. Least recently used blocks go on to the next tier. LMCache, arXiv:2510.09665, local CPU backend.
Figures: `python benchmarks/kv_tiers.py`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

from paceline.core.technique import Fact, Manifest, Technique, tune
from paceline.core.tier import FETCH, Tier
from paceline.techniques.parts.prefixes import why_no_prefix

MIB = 1 << 20


class RamStore:
    """Blocks in a dictionary of at most `n_bytes` bytes."""

    name = "ram"
    near = True
    ahead = False
    accepts = True

    def __init__(self, n_bytes: int):
        self.capacity = n_bytes
        self.pinned: Set[bytes] = frozenset()
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()  # least recently used first
        self._n_bytes = 0
        self._lock = threading.Lock()

    def has(self, key: bytes) -> bool:
        return key in self._blocks

    def find(self, keys: list[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))

    def get(self, key: bytes, n_bytes: int) -> bytes | None:
        return self._blocks.get(key)

    def touch(self, key: bytes, index: int) -> None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def put(self, key: bytes, raw: bytes) -> list[tuple[bytes, bytes]]:
        with self._lock:
            gone = self._make_room(len(raw) - len(self._blocks.get(key, b"")))
            if gone is None:
                return [(key, raw)]
            self._n_bytes += len(raw) - len(self._blocks.pop(key, b""))
            self._blocks[key] = raw
            return gone

    def _make_room(self, n_bytes: int) -> list[tuple[bytes, bytes]] | None:
        """What must go for so many bytes more; None, with nothing changed, when too much of it is pinned."""
        excess = self._n_bytes + n_bytes - self.capacity
        gone: list[bytes] = []
        for key, raw in self._blocks.items():
            if excess <= 0:
                break
            if key not in self.pinned:
                gone.append(key)
                excess -= len(raw)
        if excess > 0:
            return None
        pairs = [(key, self._blocks.pop(key)) for key in gone]
        self._n_bytes -= sum(len(raw) for _, raw in pairs)
        return pairs

    def delete(self, key: bytes) -> bool:
        with self._lock:
            raw = self._blocks.pop(key, None)
            self._n_bytes -= len(raw or b"")
            return raw is not None

    def keys(self, owner: bytes | None) -> Iterable[bytes]:
        with self._lock:
            return [key for key in self._blocks if key.startswith(owner or b"")]

    def stats(self) -> dict[str, Any]:
        return {"n_blocks": len(self._blocks), "n_bytes": self._n_bytes, "capacity": self.capacity}

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._n_bytes = 0


@dataclass(frozen=True)
class Ram(Technique):
    size_mib: int = tune(1024, 1, 1 << 24, log=True, help="MiB that blocks may take, beside the KV cache")
    fetch: str = tune(
        "measured", choices=FETCH, help="bring blocks back when that is quicker than computing, always or never"
    )

    def manifest(self) -> Manifest:
        return Manifest(frozenset({"kv_tier"}), needs=frozenset({Fact.PREFIX_PURE}), paper="2510.09665")

    def why_not(self, context: Any) -> str | None:
        left = context.machine.memory - context.peak_bytes
        if self.size_mib * MIB > left:
            return (
                f"size_mib = {self.size_mib}: {max(0, left) // MIB} MiB are left beside model and cache; ask for less"
            )
        return why_no_prefix(context)

    def build(self, context: Any) -> Tier:
        return Tier(RamStore(self.size_mib * MIB), self.fetch)
