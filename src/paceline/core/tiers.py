"""KV beyond memory: pages that the cache gives up go to tiers (RAM, disk, another machine) and come back instead of being computed.

    prefix index --added, dropping--> Tiers --blocks--> tier 0 --what it gives up--> tier 1 ...
    scheduler    --prefetch, ready, restore--> Tiers --pages--> KVCache.load, then the prefix index as usual

A page's bytes are copied by the thread that computes; hashing, writing and spilling is done by one thread in the background, reading
ahead from tiers that are not at hand by another. Both have bounds, beyond which blocks are dropped and counted: a tier may lose
anything at any time and costs no more than the time to compute it. The idea, and the calls lookup, pin, move and clear: LMCache,
arXiv:2510.09665. When loading is quicker than computing is measured, not assumed.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from paceline.core import blocks
from paceline.core.blocks import BlockError, Link
from paceline.core.errors import ConfigError, RequestError
from paceline.core.kvcache import KVCache
from paceline.core.readahead import Job, ReadAhead
from paceline.core.sequence import Sequence
from paceline.core.tier import Tier

PENDING_BYTES = 256 << 20  # copied, not yet written
MEASURED_ROWS = 16  # steps of fewer rows say little about the cost of one more
FADING = 0.9  # what a step weighs less than the next
MAX_PINNED = 1 << 17  # blocks

log = logging.getLogger(__name__)


@dataclass
class _Pending:
    payload: np.ndarray
    n_jobs: int = 0


class Tiers:
    """The `kv_tier` chain at work. All methods belong to the engine's thread; futures are for whoever waits elsewhere.

    identity: stands for everything beside tokens and the cache's layout that decides the bits of a token's state. Raises ConfigError when
    the cache's pools cannot be written from the host.
    """

    def __init__(self, cache: KVCache, tiers: Seq[Tier], identity: bytes):
        self.cache, self.tiers = cache, list(tiers)
        self.page_size = cache.groups[0].page_size
        self.n_payload = cache.block_bytes
        self.n_block = blocks.size(self.page_size, self.n_payload)
        layout = f"{cache.dtype} {self.page_size} {[(g.spec, g.layers, g.heads) for g in cache.groups]}"
        self.space = hashlib.sha256(identity + layout.encode()).digest()
        pool = cache.k[0][0][:1]
        if not np.may_share_memory(cache.memory.numpy(pool), cache.memory.numpy(pool)):
            raise ConfigError(
                "kv_tier: the KV cache lies in a device's memory; tiers need backend = native or reference"
            )
        self.pinned: set[bytes] = set()
        for tier in self.tiers:
            tier.store.pinned = self.pinned
        self._ahead = [t for t in self.tiers if t.store.ahead and t.fetch != "never"]
        self._near = [t for t in self.tiers if t.store.near and t.fetch != "never"]
        self._through = tuple(i for i, t in enumerate(self.tiers) if t.through)
        self._links: dict[int, Link] = {}  # of the pages in the prefix index, by their id in group 0
        self._resident: set[bytes] = set()  # their keys
        self._pending: dict[bytes, _Pending] = {}
        self._n_pending = 0  # bytes
        self._lock = threading.Lock()  # of both
        self._jobs: dict[
            int, tuple[int, Job]
        ] = {}  # by sequence: how often it had been preempted, and what is read for it
        self._computed = (0.0, 0.0)  # rows and seconds of recent steps, the older ones weighing less
        self._load_seconds = 0.0  # of a block, last time
        self._counts = dict.fromkeys(("n_offered", "n_restored", "n_restored_tokens", "n_queue_full", "n_lost"), 0)
        self._writer = ThreadPoolExecutor(1, "kv-tier-write")  # which finishes what it has before the process ends
        self._reader = ReadAhead(lambda link: self._get(link, self._ahead), self._at_hand, self.n_block)

    # ---- told by the prefix index (its `Watcher`)

    def added(self, before: int, tokens: Seq[int], pages: Seq[Seq[int]], salt: str) -> None:
        size = self.page_size
        link = self._links[before] if before >= 0 else None
        for i, page in enumerate(pages[0]):
            part = tokens[i * size : (i + 1) * size]
            link = blocks.first(self.space, salt, part) if link is None else link.next(part)
            self._links[page] = link
            self._resident.add(link.key)
            if self._through:
                self._offer(link, [held[i] for held in pages], self._through)

    def dropping(self, pages: Seq[int]) -> None:
        link = self._links.pop(pages[0])
        self._resident.discard(link.key)
        target = next((i for i, t in enumerate(self.tiers) if t.store.accepts), None)
        if target is not None:
            self._offer(link, pages, (target,))

    def cleared(self) -> None:
        self._links.clear()
        self._resident.clear()

    def _offer(self, link: Link, pages: Seq[int], targets: tuple[int, ...]) -> None:
        """Copy a page and have it written to those of these tiers that lack it."""
        stores = [(i, self.tiers[i].store) for i in targets]
        targets = tuple(i for i, store in stores if store.accepts and not store.has(link.key))
        if not targets:
            return
        with self._lock:
            pending = self._pending.get(link.key)
            if pending is not None:
                pending.n_jobs += 1
            elif self._n_pending + self.n_payload > PENDING_BYTES:
                self._counts["n_queue_full"] += 1
                return
        if pending is None:
            pending = _Pending(self.cache.dump(pages), 1)
            with self._lock:
                self._pending[link.key] = pending
                self._n_pending += self.n_payload
        self._counts["n_offered"] += 1
        self._writer.submit(self._write, link, pending, targets)

    def _write(self, link: Link, pending: _Pending, targets: tuple[int, ...]) -> None:
        try:
            raw = blocks.encode(self.space, link, pending.payload)
            for i in targets:
                self._put(i, link.key, raw)
                self.tiers[i].store.touch(link.key, link.index)
        except Exception:  # a fault of ours must not end the thread unseen
            log.exception("a block could not be written to a KV tier")
        finally:
            with self._lock:
                pending.n_jobs -= 1
                if not pending.n_jobs:
                    del self._pending[link.key]
                    self._n_pending -= self.n_payload

    def _put(self, at: int, key: bytes, raw: bytes) -> bool:
        """Into tier `at`, what that gives up into the next. Whether the block itself stayed anywhere."""
        todo, stayed = [(at, key, raw)], False
        while todo:
            i, k, block = todo.pop()
            if i == len(self.tiers):
                self._counts["n_lost"] += 1
                continue
            tier = self.tiers[i]
            if not tier.store.has(k):
                gone = tier.store.put(k, block)
                refused = any(g == k for g, _ in gone)
                tier.count("n_dropped" if refused else "n_put")
                todo += [(i + 1, *g) for g in gone]
                if refused:
                    continue
            stayed = stayed or k == key
        return stayed

    # ---- asked by the scheduler

    def prefetch(self, seq: Sequence) -> None:
        """Begin to read what a queued sequence may need."""
        if self._ahead:
            self._job(seq)

    def ready(self, seq: Sequence, idle: bool) -> bool:
        """Whether `restore` need not wait; idle: there is nothing else to do, so wait a little here."""
        if not self._ahead:
            return True
        return self._reader.ready(self._job(seq), idle)

    def restore(self, seq: Sequence) -> bool:
        """Append what the tiers hold of a sequence's next full pages to its cache, a row being left to compute; whether there was any."""
        n_pages = seq.kv.lens[0] // self.page_size
        room = min(pool.n_free + pool.n_idle for pool in self.cache.pools)
        _, job = self._jobs.get(seq.id, (0, None))
        links = job.links if job is not None else self._chain(seq)
        links = links[n_pages : n_pages + room]
        found: list[Any] = []
        for link in links:
            payload = self._take(link, job)
            if payload is None:
                break
            found.append(payload)
        if job is not None:
            self._reader.release(job)
        if not found:
            return False
        start = perf_counter()
        if not self.cache.load(seq.kv, found):
            return False
        self._load_seconds = (perf_counter() - start) / len(found)
        for link in reversed(links[: len(found)]):
            for tier in self._near:
                tier.store.touch(link.key, link.index)
        self._counts["n_restored"] += len(found)
        self._counts["n_restored_tokens"] += len(found) * self.page_size
        return True

    def forget(self, seq: Sequence) -> None:
        """The sequence is gone."""
        _, job = self._jobs.pop(seq.id, (0, None))
        if job is not None:
            self._reader.release(job)

    def computed(self, n_rows: int, seconds: float) -> None:
        """What a step took."""
        if n_rows >= MEASURED_ROWS:
            rows, total = self._computed
            self._computed = (FADING * rows + n_rows, FADING * total + seconds)

    @property
    def _row_seconds(self) -> float | None:
        rows, seconds = self._computed
        return seconds / rows if rows else None

    def _chain(self, seq: Sequence) -> list[Link]:
        return list(blocks.chain(self.space, seq.salt, seq.tokens[:-1], self.page_size))

    def _job(self, seq: Sequence) -> Job:
        """What is read for a sequence, from now on if it is not yet."""
        epoch, job = self._jobs.get(seq.id, (0, None))
        if job is None or epoch != seq.n_preempted:
            self.forget(seq)
            links = self._chain(seq)
            missing = next((x.key for x in links if x.key not in self._resident), None)
            worth = missing is not None and any(not t.store.near or t.store.has(missing) for t in self._ahead)
            job = self._reader.start(links, worth)
            self._jobs[seq.id] = (seq.n_preempted, job)
        return job

    def _at_hand(self, key: bytes) -> bool:
        """Whether it is in memory already, the cache's or ours."""
        if key in self._resident or key in self._pending:
            return True
        return any(t.store.has(key) for t in self._near if not t.store.ahead)

    def _take(self, link: Link, job: Job | None) -> Any:
        """The bytes of a page, from wherever they are at hand; None when they are not."""
        with self._lock:
            pending = self._pending.get(link.key)
        if pending is not None:
            return pending.payload
        arrived = None if job is None else self._reader.arrived(job, link.key)
        return self._get(link, self._near) if arrived is None else arrived

    def _get(self, link: Link, tiers: Seq[Tier]) -> memoryview | None:
        """A block of one of these tiers, read and checked; one that fails the check is deleted."""
        per_row = self._row_seconds
        compute = None if per_row is None else per_row * self.page_size
        for tier in tiers:
            if not tier.is_worth(compute, self._load_seconds):
                continue
            start = perf_counter()
            raw = tier.store.get(link.key, self.n_block)
            if raw is None:
                tier.count("n_misses")
                continue
            try:
                payload = blocks.decode(self.space, link, raw, self.n_payload)
            except BlockError as e:
                tier.count("n_corrupt")
                tier.store.delete(link.key)
                log.warning("KV tier %s: a block was unusable and is dropped: %s", tier.store.name, e)
                continue
            tier.count("n_hits")
            tier.measured(perf_counter() - start)
            return payload
        return None

    # ---- control

    def lookup(self, tokens: Seq[int], salt: str = "") -> Future[dict[str, int]]:
        """For the cache and each tier, how many tokens from the beginning it holds (whole pages)."""
        keys = self._keys(tokens, salt)
        n_cache = next((i for i, key in enumerate(keys) if key not in self._resident), len(keys))

        def look() -> dict[str, int]:
            return {"cache": n_cache * self.page_size} | {
                t.store.name: t.store.find(keys) * self.page_size for t in self.tiers
            }

        return self._reader.submit(look)

    def pin(self, tokens: Seq[int], salt: str = "") -> int:
        """Keep the blocks of a text, those here and those to come, until `unpin`, through limits of size and age; how many tokens that
        covers. Lasts as long as this process. Raises RequestError when too much would be pinned."""
        keys = self._keys(tokens, salt)
        if len(self.pinned | set(keys)) > MAX_PINNED:
            raise RequestError(f"pin: more than {MAX_PINNED} blocks would be pinned; unpin others first")
        self.pinned.update(keys)
        return len(keys) * self.page_size

    def unpin(self, tokens: Seq[int], salt: str = "") -> int:
        """Undo `pin`; how many tokens had been pinned."""
        keys = self._keys(tokens, salt)
        n = sum(key in self.pinned for key in keys)
        self.pinned.difference_update(keys)
        return n * self.page_size

    def move(self, tokens: Seq[int], source: str, target: str, salt: str = "") -> Future[int]:
        """Carry a text's blocks from one tier to another; how many tokens were moved. Raises RequestError for unknown tiers."""
        a, b = self._index("from", source), self._index("to", target)
        keys = self._keys(tokens, salt) if a != b else []

        def carry() -> int:
            n = 0
            for key in keys:
                raw = self.tiers[a].store.get(key, self.n_block)
                if raw is not None and self._put(b, key, raw) and self.tiers[b].store.has(key):
                    n += self.tiers[a].store.delete(key)
            return n * self.page_size

        return self._writer.submit(carry)

    def clear(self, tier: str | None = None, salt: str | None = None) -> Future[int]:
        """Delete the blocks of one tier or all, of one identity or all, of this model or any other; how many. What the cache itself holds
        stays there, and comes here when it is given up. Raises RequestError for an unknown tier."""
        chosen = self.tiers if tier is None else [self.tiers[self._index("tier", tier)]]
        owner = None if salt is None else blocks.owner(self.space, salt)
        self._drop_jobs()

        def delete() -> int:
            return sum(t.store.delete(key) for t in chosen for key in list(t.store.keys(owner)))

        return self._writer.submit(delete)

    def stats(self) -> dict[str, Any]:
        """Plain data: what was offered, restored, dropped; per tier its blocks, bytes, hits, misses, speed."""
        per_row = self._row_seconds
        return {
            **self._counts,
            "block_bytes": self.n_block,
            "block_tokens": self.page_size,
            "pending_bytes": self._n_pending,
            "staged_bytes": self._reader.n_staged,
            "n_pinned": len(self.pinned),
            "computed_tokens_per_second": 1 / per_row if per_row else None,
            "tiers": {t.store.name: t.stats(self.n_block) for t in self.tiers},
        }

    def flush(self) -> None:
        """Wait until everything offered so far is written."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is pending and let go of the stores. Safe to call twice."""
        self._drop_jobs()
        self._writer.shutdown()
        self._reader.close()
        for tier in self.tiers:
            tier.store.close()

    def _drop_jobs(self) -> None:
        for _, job in self._jobs.values():
            self._reader.release(job)
        self._jobs.clear()

    def _keys(self, tokens: Seq[int], salt: str) -> list[bytes]:
        return [link.key for link in blocks.chain(self.space, salt, tokens, self.page_size)]

    def _index(self, what: str, name: str) -> int:
        names = [t.store.name for t in self.tiers]
        if name not in names:
            raise RequestError(f"{what} = {name!r}: must be one of the tiers {', '.join(names)}")
        return names.index(name)
