"""The paged KV cache: six verbs (reserve, settle, fork, keep, put, free) and a view.

Position is an entry's place in the text, index its place in the sequence's cache, slot its place in memory:
slot = table[index // page_size] * page_size + index % page_size. Page tables belong to a *group*: layers, and
optionally a subset of their heads, that retain the same entries. Pages are shared between sequences and with the prefix
index, and copied before they are written (copy on write). Paging: PagedAttention, arXiv:2309.06180, section 4.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paceline.core import entries
from paceline.core.errors import ConfigError
from paceline.core.pages import PagePool
from paceline.core.specs import KVGroup, StateSpec, Window

PURE = sys.maxsize


class Memory(Protocol):
    """What the cache asks of a backend (`Ops` provides it)."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any: ...

    def move(self, pool: Any, src: np.ndarray, dst: np.ndarray) -> None:
        """Copy entries src -> dst (int64 slots), all heads, as if all were read before any is written."""

    def numpy(self, x: Any) -> np.ndarray:
        """A pool as a NumPy array (ml_dtypes.bfloat16 included); where its memory is the host's, a view."""


@dataclass(slots=True, eq=False)
class SeqKV:
    """One sequence's part of the cache. Changed by `KVCache` only; lists have one element per group.

    tables:     int32 page ids in index order, -1 beyond n_pages and where `trim` has released a page
    n_pages:    pages in index order, released ones included: ceil(lens / page_size)
    first:      pages released from the front by `trim`
    lens:       entries, reserved rows and released ones included
    n_reserved: rows reserved and not yet settled, at the end of every group
    pure:       entries below this index are exactly the state of the text's first tokens in every group
    n_indexed:  entries already offered to the prefix index
    """

    tables: list[np.ndarray]
    n_pages: list[int]
    first: list[int]
    lens: list[int]
    n_reserved: int = 0
    pure: int = PURE
    n_indexed: int = 0

    def pages(self, group: int) -> list[int]:
        """The pages this sequence holds in a group, in index order."""
        held: list[int] = self.tables[group][self.first[group] : self.n_pages[group]].tolist()
        return held


def make_groups(
    states: Sequence[StateSpec], page_size: int, head_split: int | None = None, layer_split: int | None = None
) -> list[KVGroup]:
    """Layers of equal spec together, in order of first appearance.

    head_split and layer_split: at most so many heads or layers in one group (None: all), so that they can retain
    different entries. Raises ConfigError when one of the sizes is not positive.
    """
    for name, size in (("page_size", page_size), ("head_split", head_split), ("layer_split", layer_split)):
        if size is not None and size < 1:
            raise ConfigError(f"{name} = {size!r}: must be at least 1")
    groups: list[KVGroup] = []
    for spec in dict.fromkeys(states):
        for layers in _chunks([i for i, s in enumerate(states) if s == spec], layer_split):
            groups += [
                KVGroup(len(groups) + j, spec, layers, heads, page_size)
                for j, heads in enumerate(_chunks(list(range(spec.heads)), head_split))
            ]
    return groups


def _chunks(items: list[int], size: int | None) -> list[tuple[int, ...]]:
    size = size or len(items)
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]


def of_layer(groups: Sequence[KVGroup]) -> list[list[int]]:
    """For each layer the indices into `groups` that hold its heads."""
    n_layers = 1 + max((layer for g in groups for layer in g.layers), default=-1)
    return [[i for i, g in enumerate(groups) if layer in g.layers] for layer in range(n_layers)]


def page_bytes(group: KVGroup, dtype: str) -> int:
    """Bytes that one page takes over all layers of its group, keys, values and positions."""
    entry = 2 * len(group.layers) * len(group.heads) * entries.n_bytes(dtype, group.spec.dim)
    return group.page_size * (entry + 4)


class KVCache:
    """Pools of pages for every group, and the verbs that change what sequences keep in them.

    k[g][i], v[g][i]: pool of the i-th layer of group g, a backend array (n_pages, heads, page_size, n_items) of `dtype`, `core/entries.py`
    positions[g]:     int32 (n_pages, page_size) place in the text of every entry
    evict:            set by a prefix index: frees n of the pages of a group that only it holds, and returns n

    Raises ConfigError for an unknown dtype or a number of pages below 1.
    """

    def __init__(self, groups: Sequence[KVGroup], memory: Memory, dtype: str, n_pages: int | Sequence[int]):
        if dtype not in entries.KINDS:
            raise ConfigError(f"kv dtype = {dtype!r}: must be one of {', '.join(entries.KINDS)}")
        counts = [n_pages] * len(groups) if isinstance(n_pages, int) else list(n_pages)
        if len(counts) != len(groups) or min(counts, default=1) < 1:
            raise ConfigError(f"n_pages = {n_pages!r}: must be at least 1, for each of the {len(groups)} KV groups")
        self.groups = list(groups)
        self.dtype = dtype
        self.memory = memory
        self.pools = [PagePool(n) for n in counts]
        self.evict: Callable[[int, int], int] | None = None
        self.k: list[list[Any]] = []
        self.v: list[list[Any]] = []
        for g, n in zip(self.groups, counts, strict=True):
            shape = (n, len(g.heads), g.page_size, entries.n_items(dtype, g.spec.dim))
            self.k.append([memory.empty(shape, dtype) for _ in g.layers])
            self.v.append([memory.empty(shape, dtype) for _ in g.layers])
        self.positions = [np.full((n, g.page_size), -1, np.int32) for g, n in zip(self.groups, counts, strict=True)]
        self._flat = [p.reshape(-1) for p in self.positions]
        self._sizes = [g.page_size for g in self.groups]
        self.has_windows = any(isinstance(g.spec, Window) for g in self.groups)

    # handles

    def new(self) -> SeqKV:
        """An empty sequence."""
        n = len(self.groups)
        return SeqKV([np.full(8, -1, np.int32) for _ in range(n)], [0] * n, [0] * n, [0] * n)

    def adopt(self, pages: Sequence[Sequence[int]], n: int) -> SeqKV:
        """A sequence whose first n entries lie in these full pages (per group), shared with their present holders."""
        kv = self.new()
        for g, held in enumerate(pages):
            assert len(held) * self._sizes[g] == n
            self.pools[g].share(held)
            self._append(kv, g, held)
            kv.lens[g] = n
        kv.n_indexed = n
        return kv

    def fork(self, kv: SeqKV) -> SeqKV:
        """A second sequence with the same entries; pages are shared until one of the two writes to them."""
        assert not kv.n_reserved
        for g, pool in enumerate(self.pools):
            pool.share(kv.pages(g))
        return SeqKV([t.copy() for t in kv.tables], kv.n_pages[:], kv.first[:], kv.lens[:], 0, kv.pure, kv.n_indexed)

    def free(self, kv: SeqKV) -> None:
        """Give all pages back; the handle is then empty and as new. Allowed at any moment, reserved rows or not."""
        for g, pool in enumerate(self.pools):
            pool.release(kv.pages(g))
            kv.tables[g].fill(-1)
            kv.n_pages[g] = kv.first[g] = kv.lens[g] = 0
        kv.n_reserved = kv.n_indexed = 0
        kv.pure = PURE

    # the step: reserve, tables, settle

    def reserve(self, kv: SeqKV, positions: Sequence[int] | np.ndarray) -> list[Sequence[int]] | None:
        """Room for one row per position at the end of every group.

        Returns the rows' slots per group; None, with the sequence unchanged, when a group lacks pages even if the prefix
        index gives up all that only it holds.
        """
        assert not kv.n_reserved, "settle the rows of the last step first"
        n = len(positions)
        if n == 1 and (room := self._reserve_next(kv, int(positions[0]))) is not None:
            return room
        short: list[int] = []
        needs: list[tuple[int, int]] = []
        for g, size in enumerate(self._sizes):
            length = kv.lens[g]
            n_short = -(-(length + n) // size) - kv.n_pages[g]
            n_copy = n > 0 and length % size > 0 and self._is_shared(g, kv.tables[g][length // size])
            short.append(n_short)
            if n_short or n_copy:
                needs.append((g, n_short + n_copy))
        if needs and not self._room(needs):
            return None
        slots: list[Sequence[int]] = []
        for g, size in enumerate(self._sizes):
            length = kv.lens[g]
            if n and length % size and self._is_shared(g, kv.tables[g][length // size]):
                self._own(kv, g, [length // size])
            if short[g]:
                self._append(kv, g, self.pools[g].take(short[g]))
            found = self._slots(kv, g, np.arange(length, length + n))
            self._flat[g][found] = positions
            slots.append(found.tolist())
            kv.lens[g] = length + n
        kv.n_reserved = n
        return slots

    def _reserve_next(self, kv: SeqKV, position: int) -> list[Sequence[int]] | None:
        """One more row where that needs neither a new page nor a copy in any group: nearly always, when decoding."""
        slots: list[Sequence[int]] = []
        for size, length, table, pool in zip(self._sizes, kv.lens, kv.tables, self.pools, strict=True):
            offset = length % size
            if not offset:
                return None
            page = table.item(length // size)
            if pool.refs[page] > 1:
                return None
            slots.append((page * size + offset,))
        for g, (slot,) in enumerate(slots):
            self._flat[g][slot] = position
            kv.lens[g] += 1
        kv.n_reserved = 1
        return slots

    def settle(self, kv: SeqKV, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Of the rows last reserved keep `rows` (ascending; None: all), closed up in this order, and drop the rest.

        Keeping all is free; a prefix only truncates; scattered rows (an accepted path of a draft tree) are moved.
        """
        n = kv.n_reserved
        kv.n_reserved = 0
        if rows is None or (len(rows) == n and (n == 0 or rows[n - 1] == n - 1)):
            return
        n_kept = len(rows)
        rows = np.asarray(rows, np.int64)
        _assert_ascending(rows, 0, n)
        stay = _n_in_place(rows)
        for g in range(len(self.groups)):
            base = kv.lens[g] - n
            if stay < n_kept:  # rows just reserved lie in pages of this sequence alone: nothing to copy first
                to = np.arange(base + stay, base + n_kept)
                self._move(g, self._slots(kv, g, base + rows[stay:]), self._slots(kv, g, to))
            self._truncate(kv, g, base + n_kept)

    def tables(self, kvs: Sequence[SeqKV], group: int) -> tuple[np.ndarray, np.ndarray]:
        """Page tables int32 (n_seqs, max_pages), -1 where there is no page, and lengths int32 (n_seqs,).

        They hold until the cache changes.
        """
        if len(kvs) == 1:
            (kv,) = kvs
            return kv.tables[group][None, : kv.n_pages[group] or 1], np.array([kv.lens[group]], np.int32)
        counts = [kv.n_pages[group] for kv in kvs]
        out = np.full((len(counts), max(counts, default=1) or 1), -1, np.int32)
        for i, n in enumerate(counts):
            out[i, :n] = kvs[i].tables[group][:n]
        return out, np.array([kv.lens[group] for kv in kvs], np.int32)

    # retention

    def keep(self, kv: SeqKV, group: int, index: Sequence[int] | np.ndarray) -> bool:
        """Of a group's entries only those at these ascending indices stay; they become entries 0, 1, 2, ...

        Pages that become empty are released. Shared pages stay as they are for their other holders: what is kept of
        them is copied, if need be to new pages. False, with nothing changed, when those are lacking. Entries released
        by `trim` cannot be kept; keeping all others changes nothing.
        """
        assert not kv.n_reserved
        size, pool, length, first = self._sizes[group], self.pools[group], kv.lens[group], kv.first[group]
        index = np.asarray(index, np.int64)
        _assert_ascending(index, first * size, length)
        n, stay = len(index), _n_in_place(index)
        if n == length - first * size:
            return True
        n_pages = -(-n // size)
        start = n_pages if stay == n else stay // size  # the first page whose content changes
        old = [p for p in kv.tables[group][start : kv.n_pages[group]].tolist() if p >= 0]
        shared = [p for p in old if pool.refs[p] > 1]
        own = [p for p in old if pool.refs[p] == 1]
        n_new = n_pages - start
        n_fresh = max(0, n_new - len(own))
        if not self._room([(group, n_fresh)]):
            return False
        src = self._slots(kv, group, index[start * size :])
        kv.tables[group][start : kv.n_pages[group]] = -1
        kv.n_pages[group] = start
        self._append(kv, group, own[:n_new] + pool.take(n_fresh))
        self._move(group, src, self._slots(kv, group, np.arange(start * size, n)))
        pool.release(own[n_new:] + shared)
        kv.lens[group] = n
        kv.first[group] = min(first, start)
        kv.pure = min(kv.pure, stay)
        return True

    def put(
        self, kv: SeqKV, group: int, index: Sequence[int] | np.ndarray, k: Sequence[np.ndarray], v: Sequence[np.ndarray]
    ) -> bool:
        """Rewrite the entries at these ascending indices (merging, restoring); their positions stay.

        k, v: for each layer of the group, in the order of `group.layers`, float (n, heads, dim). Shared pages are
        copied first; False, with nothing changed, when there are no pages for that.
        """
        assert not kv.n_reserved
        size = self._sizes[group]
        index = np.asarray(index, np.int64)
        _assert_ascending(index, kv.first[group] * size, kv.lens[group])
        if not len(index):
            return True
        touched = np.unique(index // size).tolist()
        shared = [p for p in touched if self._is_shared(group, kv.tables[group][p])]
        if not self._room([(group, len(shared))]):
            return False
        self._own(kv, group, shared)
        page, offset = np.divmod(self._slots(kv, group, index), size)
        for i in range(len(self.groups[group].layers)):
            for pool, values in ((self.k[group][i], k[i]), (self.v[group][i], v[i])):
                host = self.memory.numpy(pool)
                assert np.may_share_memory(host, self.memory.numpy(pool)), "these pools cannot be written from the host"
                host[page, :, offset] = entries.encode(np.asarray(values), self.dtype)
        kv.pure = min(kv.pure, int(index[0]))
        return True

    def trim(self, kv: SeqKV) -> None:
        """Release the pages of window groups that no later row can see; indices and lengths stay as they are."""
        assert not kv.n_reserved
        for g, group in enumerate(self.groups):
            if isinstance(group.spec, Window):
                # the next row has index `len` and sees (len - window, len]
                n_behind = max(0, kv.lens[g] - group.spec.size + 1) // self._sizes[g]
                if n_behind > kv.first[g]:
                    self.pools[g].release(kv.tables[g][kv.first[g] : n_behind].tolist())
                    kv.tables[g][kv.first[g] : n_behind] = -1
                    kv.first[g] = n_behind

    def view(self, kv: SeqKV, group: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A layer's settled entries in one group: k, v float32 (n, heads, dim) and positions int32 (n,), read-only.

        The first row is index `kv.first[group] * page_size`: entries released by `trim` are not there.
        """
        size = self._sizes[group]
        i = self.groups[group].layers.index(layer)
        index = np.arange(kv.first[group] * size, kv.lens[group] - kv.n_reserved)
        slots = self._slots(kv, group, index)
        page, offset = np.divmod(slots, size)
        out = [
            entries.decode(self.memory.numpy(self.k[group][i])[page, :, offset], self.dtype),
            entries.decode(self.memory.numpy(self.v[group][i])[page, :, offset], self.dtype),
            self._flat[group][slots],
        ]
        for a in out:
            a.flags.writeable = False
        return out[0], out[1], out[2]

    # whole pages as bytes: what tiers beyond memory keep (`core/tiers.py`)

    @property
    def block_bytes(self) -> int:
        """Bytes of one page in every group, as `dump` gives them."""
        return sum(page_bytes(g, self.dtype) - 4 * g.page_size for g in self.groups)

    def dump(self, pages: Sequence[int]) -> np.ndarray:
        """uint8 (block_bytes,): the entries of one full page per group as they lie in the pools, positions left out."""
        out, at = np.empty(self.block_bytes, np.uint8), 0
        for g, page in enumerate(pages):
            for pool in (*self.k[g], *self.v[g]):
                raw = self.memory.numpy(pool[page]).reshape(-1).view(np.uint8)
                out[at : at + len(raw)] = raw
                at += len(raw)
        assert at == len(out)
        return out

    def load(self, kv: SeqKV, blocks: Sequence[Any]) -> bool:
        """Append full pages that `dump` gave, the exact state of the text's next tokens, to a sequence of full pages.

        blocks: buffers of `block_bytes`. False, with nothing changed, when there are no pages for them.
        """
        n, start = len(blocks), kv.lens[0]
        size = self._sizes[0]
        assert not kv.n_reserved
        assert start % size == 0
        assert kv.pure >= start
        assert all(length == start for length in kv.lens)
        if not self._room([(g, n) for g in range(len(self.groups))]):
            return False
        at = 0
        for g in range(len(self.groups)):
            pages = self.pools[g].take(n)
            self._append(kv, g, pages)
            kv.lens[g] = start + n * size
            self.positions[g][pages] = np.arange(start, start + n * size, dtype=np.int32).reshape(n, size)
            for pool in (*self.k[g], *self.v[g]):
                for page, block in zip(pages, blocks, strict=True):
                    raw = self.memory.numpy(pool[page]).reshape(-1).view(np.uint8)  # a view: the pools are the host's
                    raw[:] = np.frombuffer(block, np.uint8, len(raw), at)
                at += len(raw)
        return True

    # upkeep

    def check_integrity(self, kvs: Iterable[SeqKV], held: Sequence[Iterable[int]] = ()) -> None:
        """Assert that these sequences, and `held` (per group the pages of the prefix index), together hold every used
        page, as often as it is counted."""
        kvs = list(kvs)
        for g, pool in enumerate(self.pools):
            pool.check_integrity([p for kv in kvs for p in kv.pages(g)] + list(held[g] if held else ()))
            for kv in kvs:
                assert kv.n_pages[g] == -(-kv.lens[g] // self._sizes[g]), "pages and length differ"
                assert (kv.tables[g][: kv.first[g]] == -1).all(), "a released page is still in the table"
                assert (kv.tables[g][kv.n_pages[g] :] == -1).all(), "a page beyond the end"

    def stats(self) -> list[dict[str, int]]:
        """Per group: pages in all, free, used, with several holders, held by the prefix index alone, most used."""
        names = ("n_pages", "n_free", "n_used", "n_shared", "n_idle", "peak")
        return [{name: getattr(pool, name) for name in names} for pool in self.pools]

    # within

    def _is_shared(self, group: int, page: Any) -> bool:
        return self.pools[group].refs[page] > 1

    def _room(self, needs: Sequence[tuple[int, int]]) -> bool:
        """Whether so many pages can be had in each of these groups; if so they are free from now on."""
        for g, n in needs:
            if n > self.pools[g].n_free + (self.pools[g].n_idle if self.evict is not None else 0):
                return False
        for g, n in needs:
            n_lacking = n - self.pools[g].n_free
            if n_lacking > 0 and self.evict is not None:
                self.evict(n_lacking, g)
        assert all(self.pools[g].n_free >= n for g, n in needs)
        return True

    def _slots(self, kv: SeqKV, group: int, index: np.ndarray) -> np.ndarray:
        """int64 slots of entries."""
        page, offset = np.divmod(index, self._sizes[group])
        slots: np.ndarray = kv.tables[group][page].astype(np.int64) * self._sizes[group] + offset
        return slots

    def _append(self, kv: SeqKV, group: int, pages: Sequence[int]) -> None:
        n = kv.n_pages[group]
        table = kv.tables[group]
        if n + len(pages) > len(table):
            kv.tables[group] = np.full(max(2 * len(table), n + len(pages)), -1, np.int32)
            kv.tables[group][:n] = table[:n]
        kv.tables[group][n : n + len(pages)] = pages
        kv.n_pages[group] = n + len(pages)

    def _truncate(self, kv: SeqKV, group: int, length: int) -> None:
        n = -(-length // self._sizes[group])
        if n < kv.n_pages[group]:
            self.pools[group].release(kv.tables[group][n : kv.n_pages[group]].tolist())
            kv.tables[group][n : kv.n_pages[group]] = -1
            kv.n_pages[group] = n
        kv.lens[group] = length

    def _own(self, kv: SeqKV, group: int, at: list[int]) -> None:
        """Copy on write: the shared pages at these places of the table are replaced by private copies."""
        if not at:
            return
        size, pool, length = self._sizes[group], self.pools[group], kv.lens[group]
        index = np.concatenate([np.arange(i * size, min((i + 1) * size, length)) for i in at])
        src = self._slots(kv, group, index)
        old = kv.tables[group][at].tolist()
        kv.tables[group][at] = pool.take(len(at))
        self._move(group, src, self._slots(kv, group, index))
        pool.release(old)

    def _move(self, group: int, src: np.ndarray, dst: np.ndarray) -> None:
        differs = src != dst
        src, dst = src[differs], dst[differs]
        if len(src):
            self._flat[group][dst] = self._flat[group][src]
            for pool in (*self.k[group], *self.v[group]):
                self.memory.move(pool, src, dst)


def _n_in_place(index: np.ndarray) -> int:
    """How many leading elements of an ascending index equal their own place."""
    return int((index == np.arange(len(index))).sum())  # ascending: once behind, always behind


def _assert_ascending(index: np.ndarray, low: int, high: int) -> None:
    assert index.ndim == 1
    if len(index):
        assert low <= index[0] <= index[-1] < high, f"indices must lie from {low} to {high - 1}"
        assert (np.diff(index) > 0).all(), "indices must ascend"
