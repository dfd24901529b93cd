"""The six verbs against a dictionary oracle, with content written and read through the slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from numpy_memory import NumpyMemory, append, content, write

from paceline.core.errors import ConfigError
from paceline.core.kvcache import KVCache, make_groups, of_layer, page_bytes
from paceline.core.specs import KV, Window

STATES = {
    "one group": [KV(2, 2), KV(2, 2)],
    "window": [KV(1, 1), Window(1, 1, 5), KV(1, 1)],
    "wide window": [Window(2, 1, 17)],
}
LAYOUTS = [("one group", None), ("one group", 1), ("window", None), ("wide window", 1)]
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 13, 16, 21, 40])
HOW = st.sampled_from(["all", "all", "none", "prefix", "tree"])


class Cache(RuleBasedStateMachine):
    """Every verb, in any order, on any layout; the oracle holds (position, value) per sequence and group."""

    live = Bundle("live")

    @initialize(layout=st.sampled_from(LAYOUTS), page_size=st.sampled_from([1, 4, 16]), scarce=st.booleans())
    def start(self, layout, page_size, scarce):
        states, head_split = layout
        groups = make_groups(STATES[states], page_size, head_split)
        self.cache = KVCache(groups, NumpyMemory(), "float32", max(3, 40 // page_size) if scarce else 400)
        self.page_size, self.n_groups = page_size, len(groups)
        self.kvs: dict[int, object] = {}
        self.oracle: dict[int, list[list[tuple[int, int]]]] = {}
        self.n_ids = self.n_values = 0

    def add(self, kv, entries):
        self.n_ids += 1
        self.kvs[self.n_ids], self.oracle[self.n_ids] = kv, entries
        return self.n_ids

    def values(self, n):
        self.n_values += n
        return np.arange(self.n_values - n, self.n_values)

    def lacking(self, i, n):
        """Whether some group has fewer free pages than n more rows need, from the other sequences' tables alone."""
        kv = self.kvs[i]
        for g in range(self.n_groups):
            length = len(self.oracle[i][g])
            need = -(-(length + n) // self.page_size) - -(-length // self.page_size)
            if n and length % self.page_size:
                last = kv.pages(g)[-1]
                need += any(last in other.pages(g) for j, other in self.kvs.items() if j != i)
            used = {p for other in self.kvs.values() for p in other.pages(g)}
            if need > self.cache.pools[g].n_pages - len(used):
                return True
        return False

    @rule(target=live, n=ROWS, how=HOW, seed=SEEDS)
    def new(self, n, how, seed):
        i = self.add(self.cache.new(), [[] for _ in range(self.n_groups)])
        self.advance(i, n, how, seed)
        return i

    @rule(i=live, n=ROWS, how=HOW, seed=SEEDS)
    def step(self, i, n, how, seed):
        self.advance(i, n, how, seed)

    @rule(i=live, n=ROWS, how=HOW, seed=SEEDS)
    def step_and_trim(self, i, n, how, seed):
        self.advance(i, n, how, seed)
        self.trim(i)

    def advance(self, i, n, how, seed):
        rng = np.random.default_rng(seed)
        kv, entries = self.kvs[i], self.oracle[i]
        positions = rng.integers(0, 1000, n).astype(np.int32)
        lacking = self.lacking(i, n)
        slots = self.cache.reserve(kv, positions)
        assert (slots is None) == lacking
        if slots is None:
            return
        values = self.values(n)
        for g in range(self.n_groups):
            write(self.cache, g, np.array(slots[g], np.int64), values)
            table, lens = self.cache.tables([kv], g)
            index = np.arange(len(entries[g]), len(entries[g]) + n)
            assert lens.tolist() == [len(entries[g]) + n]
            size = self.page_size
            np.testing.assert_array_equal(table[0, index // size].astype(np.int64) * size + index % size, slots[g])
        rows = {"all": np.arange(n), "none": np.arange(0), "prefix": np.arange(rng.integers(0, n + 1))}.get(how)
        if rows is None:
            rows = np.nonzero(rng.random(n) < 0.5)[0]
        self.cache.settle(kv, None if how == "all" and n % 2 else rows)
        for g in range(self.n_groups):
            entries[g] += [(int(positions[r]), int(values[r])) for r in rows]

    @rule(target=live, i=live)
    def fork(self, i):
        before = [pool.n_used for pool in self.cache.pools]
        child = self.cache.fork(self.kvs[i])
        assert before == [pool.n_used for pool in self.cache.pools]
        return self.add(child, [list(e) for e in self.oracle[i]])

    @rule(target=live, i=live, n=st.integers(0, 40))
    def adopt(self, i, n):
        kv = self.kvs[i]
        n_pages = min(n // self.page_size, min(len(e) for e in self.oracle[i]) // self.page_size)
        if any(kv.first):
            n_pages = 0
        n = n_pages * self.page_size
        pages = [kv.pages(g)[:n_pages] for g in range(self.n_groups)]
        return self.add(self.cache.adopt(pages, n), [e[:n] for e in self.oracle[i]])

    @rule(i=live, g=st.integers(0, 7), seed=SEEDS, share=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0, "prefix"]))
    def keep(self, i, g, seed, share):
        g %= self.n_groups
        kv, entries = self.kvs[i], self.oracle[i][g]
        rng, low = np.random.default_rng(seed), kv.first[g] * self.page_size
        if share == "prefix":
            index = np.arange(low, low + rng.integers(0, len(entries) - low + 1))
        else:
            index = low + np.nonzero(rng.random(len(entries) - low) < share)[0]
        n_own = sum(self.n_holders(g, p) == 1 for p in kv.pages(g))
        if self.cache.keep(kv, g, index):
            if len(index) < len(entries) - low:
                self.oracle[i][g] = [entries[j] for j in index]
                assert len(kv.pages(g)) == -(-len(index) // self.page_size)
        else:
            assert -(-len(index) // self.page_size) > self.cache.pools[g].n_free + n_own

    def n_holders(self, g, page):
        return sum(page in kv.pages(g) for kv in self.kvs.values())

    @rule(i=live, g=st.integers(0, 7), seed=SEEDS, share=st.sampled_from([0.1, 0.5, 1.0]))
    def put(self, i, g, seed, share):
        g %= self.n_groups
        kv, entries = self.kvs[i], self.oracle[i][g]
        low = kv.first[g] * self.page_size
        index = low + np.nonzero(np.random.default_rng(seed).random(len(entries) - low) < share)[0]
        values = self.values(len(index))
        written = [content(self.cache, g, layer, values) for layer in self.cache.groups[g].layers]
        n_shared = sum(self.n_holders(g, int(kv.tables[g][p])) > 1 for p in np.unique(index // self.page_size).tolist())
        n_free = self.cache.pools[g].n_free
        done = self.cache.put(kv, g, index, [k for k, _ in written], [v for _, v in written])
        assert done == (n_shared <= n_free)
        if done:
            for j, value in zip(index.tolist(), values.tolist(), strict=True):
                entries[j] = (entries[j][0], value)

    def trim(self, i):
        kv = self.kvs[i]
        self.cache.trim(kv)
        for g, group in enumerate(self.cache.groups):
            if isinstance(group.spec, Window):
                seen_next = max(0, len(self.oracle[i][g]) - group.spec.size + 1)
                assert kv.first[g] == seen_next // self.page_size
            else:
                assert kv.first[g] == 0

    @rule(i=consumes(live), reserved=st.integers(0, 3))
    def free(self, i, reserved):
        self.cache.reserve(self.kvs[i], np.arange(reserved))  # an abort may come in the middle of a step
        self.cache.free(self.kvs[i])
        assert not any(self.kvs[i].lens + self.kvs[i].n_pages)
        assert all((table == -1).all() for table in self.kvs[i].tables)
        del self.kvs[i], self.oracle[i]

    @invariant()
    def content_is_the_oracles(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity(self.kvs.values())
        for i, kv in self.kvs.items():
            for g, group in enumerate(self.cache.groups):
                assert kv.lens[g] == len(self.oracle[i][g])
                entries = self.oracle[i][g][kv.first[g] * self.page_size :]
                for layer in group.layers:
                    k, v, positions = self.cache.view(kv, g, layer)
                    want = content(self.cache, g, layer, np.array([value for _, value in entries]))
                    np.testing.assert_array_equal(k, want[0])
                    np.testing.assert_array_equal(v, want[1])
                    assert positions.tolist() == [p for p, _ in entries]

    def teardown(self):
        if hasattr(self, "cache"):
            for kv in self.kvs.values():
                self.cache.free(kv)
            assert all(pool.n_free == pool.n_pages for pool in self.cache.pools)
            self.cache.check_integrity([])


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def small(spec=None, n_pages=8, page_size=4, dtype="float32", n_layers=1, memory=None):
    groups = make_groups([spec or KV(1, 2)] * n_layers, page_size)
    return KVCache(groups, memory or NumpyMemory(), dtype, n_pages)


def fill(cache, n, kv=None):
    kv = kv or cache.new()
    start = kv.lens[0]
    assert append(cache, kv, np.arange(start, start + n), np.arange(start, start + n))
    return kv


def test_no_room_changes_nothing_in_any_group():
    """The second group is the one that lacks pages: the first must not have been touched."""
    cache = KVCache(make_groups([KV(1, 1), KV(2, 1)], 4), NumpyMemory(), "float32", [8, 1])
    kv = fill(cache, 4)
    assert cache.reserve(kv, np.arange(1)) is None
    assert kv.lens == [4, 4]
    assert [pool.n_used for pool in cache.pools] == [1, 1]
    assert kv.n_reserved == 0


def test_keeping_all_moves_nothing_and_a_tree_moves_only_what_shifts():
    cache = small(n_layers=2)
    kv = fill(cache, 6)
    assert cache.memory.n_moves == 0
    append(cache, kv, np.arange(6, 10), np.arange(6, 10), rows=[0, 1])
    assert cache.memory.n_moves == 0
    append(cache, kv, np.array([8, 9, 9, 10]), np.array([8, 90, 91, 10]), rows=[0, 2, 3])
    assert cache.memory.n_moves == 4  # k and v of two layers, once each
    assert cache.view(kv, 0, 1)[2].tolist() == [*range(9), 9, 10]
    np.testing.assert_array_equal(cache.view(kv, 0, 1)[0][8:], content(cache, 0, 1, np.array([8, 91, 10]))[0])


def test_a_fork_copies_only_the_last_page_and_only_when_written():
    cache = small()
    parent = fill(cache, 6)
    child = cache.fork(parent)
    assert cache.pools[0].n_used == 2
    fill(cache, 1, child)
    assert cache.pools[0].n_used == 3
    assert parent.pages(0)[0] == child.pages(0)[0]
    assert parent.pages(0)[1] != child.pages(0)[1]
    used = cache.pools[0].n_used
    fill(cache, 1, parent)  # alone with its page again: written in place
    assert cache.pools[0].n_used == used


def test_the_copy_before_writing_counts_as_a_page_too():
    cache = small(n_pages=2)
    parent = fill(cache, 6)
    child = cache.fork(parent)
    assert cache.reserve(child, np.arange(1)) is None
    cache.free(parent)
    assert cache.reserve(child, np.arange(1)) is not None


def test_cutting_the_end_copies_nothing():
    cache = small()
    parent = fill(cache, 7)
    child = cache.fork(parent)
    assert cache.keep(child, 0, range(5))
    assert child.pages(0) == parent.pages(0)
    assert cache.memory.n_moves == 0
    fill(cache, 1, child)  # writes behind what it kept, not into the parent's page
    assert cache.view(parent, 0, 0)[2].tolist() == list(range(7))


def test_keep_reuses_own_pages_when_none_are_free():
    """A sequence with a shared prefix can be compacted in a full pool: the pages it is about to free are the room."""
    cache = small(n_pages=4)
    parent = fill(cache, 8)
    child = cache.fork(parent)
    fill(cache, 8, child)
    assert cache.pools[0].n_free == 0
    assert cache.keep(child, 0, [1, 3, 5, 15])
    assert cache.view(child, 0, 0)[2].tolist() == [1, 3, 5, 15]
    assert cache.view(parent, 0, 0)[2].tolist() == list(range(8))
    assert cache.pools[0].n_free == 1
    assert not cache.keep(cache.fork(parent), 0, [1, 2, 3, 4, 5])  # would need two pages; there is one


def test_head_groups_retain_different_entries():
    cache = KVCache(make_groups([KV(2, 4)], 4, head_split=1), NumpyMemory(), "float32", 8)
    kv = fill(cache, 8)
    assert cache.keep(kv, 0, [0, 7])
    assert kv.lens == [2, 8]
    assert kv.pure == 1
    fill(cache, 1, kv)
    assert cache.view(kv, 0, 0)[2].tolist() == [0, 7, 2]
    assert cache.view(kv, 1, 0)[2].tolist() == [*range(8), 2]


def test_purity_ends_where_the_text_does():
    cache = small()
    kv = fill(cache, 8)
    full = kv.pure
    assert cache.keep(kv, 0, range(8))
    assert kv.pure == full
    assert cache.put(kv, 0, [5], [np.zeros((1, 1, 2))], [np.zeros((1, 1, 2))])
    assert kv.pure == 5
    child = cache.fork(kv)
    assert child.pure == 5
    cache.free(child)
    assert child.pure == full


def test_trim_releases_what_the_next_row_cannot_see():
    cache = small(Window(1, 2, 6))
    kv = fill(cache, 9)  # the next row, index 9, sees 4..9
    cache.trim(kv)
    assert kv.tables[0][:3].tolist() == [-1, *kv.pages(0)]
    assert kv.lens == [9]
    assert cache.pools[0].n_used == 2
    assert cache.view(kv, 0, 0)[2].tolist() == [4, 5, 6, 7, 8]
    assert cache.tables([kv], 0)[0].tolist() == [[-1, *kv.pages(0)]]
    with pytest.raises(AssertionError, match="must lie from 4"):
        cache.keep(kv, 0, [3, 8])


def test_tables_are_ragged_and_padded():
    cache = small(n_pages=32)
    kvs = [fill(cache, n) for n in (1, 9, 41)] + [cache.new()]
    table, lens = cache.tables(kvs, 0)
    assert table.dtype == lens.dtype == np.int32
    assert lens.tolist() == [1, 9, 41, 0]
    assert table.shape == (4, 11)
    for kv, row in zip(kvs, table, strict=True):
        assert row.tolist() == kv.pages(0) + [-1] * (11 - len(kv.pages(0)))
    assert cache.tables([], 0)[0].shape == (0, 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_views_are_read_only_floats_of_every_dtype(dtype):
    cache = small(dtype=dtype)
    kv = cache.new()
    cache.reserve(kv, np.arange(3))
    cache.settle(kv)
    k = np.array([1.0, -2.5, 0.15625], np.float32).reshape(3, 1, 1).repeat(2, 2)  # exact in bfloat16
    assert cache.put(kv, 0, [0, 1, 2], [k], [-k])
    seen = cache.view(kv, 0, 0)
    assert [a.dtype for a in seen] == [np.float32, np.float32, np.int32]
    limit = np.abs(k).max() / 254 if dtype == "int8" else 0
    np.testing.assert_allclose(seen[0], k, rtol=0, atol=limit)
    np.testing.assert_allclose(seen[1], -k, rtol=0, atol=limit)
    for a in seen:
        with pytest.raises(ValueError, match="read-only"):
            a[0] = 0


def test_memory_that_cannot_be_written_is_refused_not_ignored():
    cache = small(memory=NumpyMemory(far=True))
    kv = fill(cache, 2)
    with pytest.raises(AssertionError, match="cannot be written"):
        cache.put(kv, 0, [0], [np.zeros((1, 1, 2))], [np.zeros((1, 1, 2))])


def test_groups_follow_specs_and_splits():
    states = [KV(2, 8), Window(2, 8, 16), KV(2, 8)]
    groups = make_groups(states, 16)
    assert [(g.id, g.layers, g.heads) for g in groups] == [(0, (0, 2), (0, 1)), (1, (1,), (0, 1))]
    assert of_layer(groups) == [[0], [1], [0]]
    groups = make_groups(states, 16, head_split=1, layer_split=1)
    assert [(g.layers, g.heads) for g in groups] == [((i,), (h,)) for i in (0, 2, 1) for h in (0, 1)]
    assert of_layer(groups) == [[0, 1], [4, 5], [2, 3]]
    assert page_bytes(make_groups(states, 16)[0], "bfloat16") == 16 * (2 * 2 * 2 * 8 * 2 + 4)
    assert page_bytes(make_groups(states, 16)[0], "int8") == 16 * (2 * 2 * 2 * (8 + 4) + 4)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: make_groups([KV(1, 1)], 0), "page_size = 0"),
        (lambda: make_groups([KV(1, 1)], 4, head_split=-1), "head_split = -1"),
        (lambda: small(dtype="int7"), "kv dtype = 'int7'"),
        (lambda: small(n_pages=0), "n_pages = 0"),
        (lambda: KVCache(make_groups([KV(1, 1)], 4), NumpyMemory(), "float32", [3, 3]), "n_pages"),
    ],
)
def test_wrong_options_are_named(make, field):
    with pytest.raises(ConfigError, match=field.replace("'", ".")):
        make()
