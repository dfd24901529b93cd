"""One tier of KV memory beyond the cache: where its blocks lie (`Store`), when it is asked, and what it has cost so far."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Set
from statistics import median
from typing import Any, Protocol

N_RECENT = 5  # measurements whose median is the estimate: one slow read says nothing
N_ENOUGH = 3  # of them, before there is an estimate
PROBE = 16  # after so many declined blocks a tier that seems too slow is tried again,
BURST = 4  # for so many blocks: enough to turn the median

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
        self._recent: deque[float] = deque(maxlen=N_RECENT)  # seconds to get and check one block
        self._n_probes = 0  # left of a burst
        self._counts = dict.fromkeys(("n_hits", "n_misses", "n_put", "n_dropped", "n_corrupt", "n_declined"), 0)
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def measured(self, seconds: float) -> None:
        """Note what a block took."""
        with self._lock:
            self._recent.append(seconds)

    @property
    def seconds(self) -> float | None:
        """What getting and checking a block takes; None until there are enough measurements."""
        with self._lock:
            return median(self._recent) if len(self._recent) >= N_ENOUGH else None

    def is_worth(self, compute: float | None, load: float) -> bool:
        """Whether to fetch a block: its tokens take `compute` seconds to compute (None: not known), its bytes `load` to put in place."""
        if self.fetch != "measured" or compute is None or (known := self.seconds) is None or known + load < compute:
            return self.fetch != "never"
        with self._lock:
            if self._n_probes == 0:
                self._counts["n_declined"] += 1
                if self._counts["n_declined"] % PROBE:
                    return False
                self._n_probes = BURST
            self._n_probes -= 1
            return True

    def stats(self, n_bytes: int) -> dict[str, Any]:
        """n_bytes: of one block."""
        seconds = self.seconds
        speed = n_bytes / seconds if seconds else None
        with self._lock:
            counts = dict(self._counts)
        return {**self.store.stats(), **counts, "seconds_per_block": seconds, "bytes_per_second": speed}
