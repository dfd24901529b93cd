"""One tier of KV memory beyond the cache: where its blocks lie (`Store`), when it is asked, and what it has cost so far."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Set
from typing import Any, Protocol

SMOOTHING = 0.2  # weight of the newest measurement
PROBE = 16  # a tier that seems too slow is asked once in so many times, so that its estimate cannot stay wrong for ever

FETCH = ("measured", "always", "never")


class Store(Protocol):
    """Blocks by key. All methods may be called from several threads, and never raise for what a disk or a network may do.

    near:   `has` and `get` take less than a millisecond or so, and may be called by the thread that computes
    ahead:  worth reading in the background as soon as a request is queued
    pinned: keys that must not be given up for others; set by the owner
    """

    name: str
    near: bool
    ahead: bool
    pinned: Set[bytes]

    @property
    def accepts(self) -> bool:
        """Whether writing makes sense at present."""

    def has(self, key: bytes) -> bool:
        """Whether it is known to be here; asks no other machine."""

    def find(self, keys: list[bytes]) -> int:
        """How many of these keys, from the first on, are here."""

    def get(self, key: bytes, n_bytes: int) -> bytes | None:
        """A block, n_bytes long if it is sound; never more than one byte beyond is read."""

    def put(self, key: bytes, raw: bytes) -> list[tuple[bytes, bytes]]:
        """Keep a block; those (perhaps itself) that found no place for it."""

    def touch(self, key: bytes, index: int) -> None:
        """A block, `index` pages into its text, was used. Without those before it none is of use, so the later ones should go first."""

    def delete(self, key: bytes) -> bool:
        """Whether there was such a block."""

    def keys(self, owner: bytes | None) -> Iterable[bytes]:
        """All, or those that begin with `owner`."""

    def stats(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Tier:
    """A link of the `kv_tier` chain. fetch: measured (when that is quicker than computing), always, never; through: blocks are written
    as soon as their tokens are computed, not only when the cache gives them up."""

    def __init__(self, store: Store, fetch: str = "measured", through: bool = False):
        assert fetch in FETCH
        self.store, self.fetch, self.through = store, fetch, through
        self.seconds: float | None = None  # to get and check one block
        self._counts = dict.fromkeys(("n_hits", "n_misses", "n_put", "n_dropped", "n_corrupt", "n_declined"), 0)
        self._lock = threading.Lock()

    def count(self, name: str) -> int:
        with self._lock:
            self._counts[name] += 1
            return self._counts[name]

    def measured(self, seconds: float) -> None:
        """Note what a block took."""
        self.seconds = seconds if self.seconds is None else smooth(self.seconds, seconds)

    def is_worth(self, compute: float | None, load: float) -> bool:
        """Whether to fetch a block whose tokens take `compute` seconds to compute (None: not known yet)."""
        if self.fetch != "measured" or compute is None or self.seconds is None or self.seconds + load < compute:
            return self.fetch != "never"
        return self.count("n_declined") % PROBE == 0

    def stats(self, n_bytes: int) -> dict[str, Any]:
        """n_bytes: of one block."""
        speed = None if not self.seconds else n_bytes / self.seconds
        with self._lock:
            counts = dict(self._counts)
        return {**self.store.stats(), **counts, "seconds_per_block": self.seconds, "bytes_per_second": speed}


def smooth(old: float, new: float) -> float:
    """A running estimate with one more measurement."""
    return old + SMOOTHING * (new - old)
