"""The radix prefix index: a state machine against a brute-force longest prefix, and its rules one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from numpy_memory import NumpyMemory, append

from paceline.core.kvcache import KVCache, make_groups
from paceline.core.specs import KV, Window
from paceline.core.technique import Fact
from paceline.techniques.serving.radix import Radix, RadixIndex

SPECS = {"plain": [KV(1, 1)], "window": [KV(1, 1), Window(1, 1, 5)]}
SALTS = st.sampled_from(["", "a"])
# runs of three equal tokens: sequences that often begin alike and part at any place of a page
TOKENS = st.tuples(st.sampled_from([0, 1, 2, 4, 5, 8, 9, 13, 16]), st.integers(0, 7)).map(
    lambda x: [x[1] >> (i // 3 % 3) & 1 for i in range(x[0])]
)


def code(tokens) -> np.ndarray:
    """A number for each prefix (tokens 0..2): what a causal model's entry depends on."""
    return np.array([int("1" + "".join(map(str, tokens[: i + 1])), 3) % 16381 for i in range(len(tokens))])


class Prefixes(RuleBasedStateMachine):
    """Sequences come and go as in the scheduler: match, adopt, compute, insert, trim, fork, free.

    The oracle is the set of full-page prefixes the index holds, read from which pages it retains: everything inserted
    is known until `evict` runs, after which only what is still found by its exact tokens counts.
    """

    live = Bundle("live")

    @initialize(specs=st.sampled_from(sorted(SPECS)), page_size=st.sampled_from([1, 2, 4]), n_pages=st.integers(8, 40))
    def start(self, specs, page_size, n_pages):
        self.cache = KVCache(make_groups(SPECS[specs], page_size), NumpyMemory(), "float32", n_pages)
        self.index = RadixIndex(self.cache)
        self.cache.evict = self.evict
        self.page_size = page_size
        self.seqs: dict[int, tuple[object, list[int], str]] = {}
        self.known: set[tuple[str, tuple[int, ...]]] = set()  # every whole-page prefix in the index, with its salt
        self.used: dict[tuple[str, tuple[int, ...]], int] = {}
        self.n_ids = self.now = 0

    def prefixes(self, tokens, salt):
        size = self.page_size
        return [(salt, tuple(tokens[:n])) for n in range(size, len(tokens) + 1, size)]

    def in_tree(self):
        """The prefixes the index really holds, read off its tree."""
        out = set()
        for salt, root in self.index._roots.items():
            todo = [(root, ())]
            while todo:
                node, above = todo.pop()
                out |= {(salt, above + tuple(node.tokens[:n])) for n in self.sizes(node)}
                todo += [(child, above + tuple(node.tokens)) for child in node.children.values()]
        return out

    def sizes(self, node):
        return range(self.page_size, len(node.tokens) + 1, self.page_size)

    def evict(self, n, group):
        pool = self.cache.pools[group]
        n_free, n_idle = pool.n_free, pool.n_idle
        freed = self.index.evict(n, group)
        assert pool.n_free - n_free == freed
        assert freed >= min(n, n_idle)
        left = self.in_tree()
        assert left <= self.known
        assert not n or not n_idle or left < self.known
        self.known = left
        return freed

    @rule(target=live, tokens=TOKENS, salt=SALTS)
    def begin(self, tokens, salt):
        n, pages = self.index.match(tokens, salt)
        want = max((len(p) for s, p in self.prefixes(tokens[:-1], salt) if (s, p) in self.known), default=0)
        assert n == want
        kv = self.cache.adopt(pages, n)
        for g in range(len(self.cache.groups)):
            layer = self.cache.groups[g].layers[0]
            assert self.cache.view(kv, g, layer)[0][:, 0, 0].tolist() == [
                float(c * 1024 + layer * 64) for c in code(tokens)[:n]
            ]
        self.n_ids += 1
        self.seqs[self.n_ids] = (kv, [], salt)
        if self.compute(self.n_ids, tokens[n:], done=tokens[:n]):
            self.commit(self.n_ids)
        return self.n_ids

    def compute(self, i, more, done):
        kv, _, salt = self.seqs[i]
        tokens = done + more
        n_known = len(self.known)
        if not append(self.cache, kv, np.arange(len(done), len(tokens)), code(tokens)[len(done) :]):
            assert len(self.known) == n_known  # nothing is given up for a request that cannot be met
            tokens = done
        self.seqs[i] = (kv, tokens, salt)
        return len(tokens) > len(done)

    def commit(self, i):
        kv, tokens, salt = self.seqs[i]
        mine = self.prefixes(tokens[: kv.pure], salt)
        n_known = sum(p in self.known for p in mine)
        indexed = kv.n_indexed
        n_new = self.index.insert(tokens, kv, salt)
        if len(mine) * self.page_size > indexed:
            other = kv.first and n_known < max(kv.first)
            assert n_new == (0 if other else len(mine) - n_known)
            if not other:
                self.known |= set(mine)
        else:
            assert n_new == 0
        self.cache.trim(kv)

    @rule(i=live, more=TOKENS)
    def go_on(self, i, more):
        if self.compute(i, more, self.seqs[i][1]):
            self.commit(i)

    @rule(target=live, i=live)
    def fork(self, i):
        kv, tokens, salt = self.seqs[i]
        self.n_ids += 1
        self.seqs[self.n_ids] = (self.cache.fork(kv), tokens, salt)
        return self.n_ids

    @rule(i=live, g=st.integers(0, 1), last=st.booleans())
    def compact(self, i, g, last):
        kv, tokens, salt = self.seqs[i]
        g %= len(self.cache.groups)
        low = kv.first[g] * self.page_size
        index = np.arange(low, kv.lens[g])
        index = index[:-1] if last else index[1:]
        if len(index) < kv.lens[g] - low and self.cache.keep(kv, g, index):
            self.seqs[i] = (kv, tokens, salt)
            assert kv.pure <= index.size

    @rule(n=st.integers(1, 6), g=st.integers(0, 1))
    def squeeze(self, n, g):
        self.evict(n, g % len(self.cache.groups))

    @rule(i=consumes(live))
    def finish(self, i):
        self.cache.free(self.seqs.pop(i)[0])

    @rule()
    def clear(self):
        self.index.clear()
        self.known = set()

    @invariant()
    def sound(self):
        if not hasattr(self, "cache"):
            return
        self.index.check()
        self.cache.check_integrity([kv for kv, _, _ in self.seqs.values()], self.index.held())
        assert self.in_tree() == self.known
        assert self.index.n_pages == len(self.known)

    def teardown(self):
        if hasattr(self, "cache"):
            for kv, _, _ in self.seqs.values():
                self.cache.free(kv)
            for g, pool in enumerate(self.cache.pools):
                self.evict(pool.n_pages, g)
            assert all(pool.n_free == pool.n_pages for pool in self.cache.pools)
            assert self.index.n_pages == self.index.n_nodes == 0


TestPrefixes = Prefixes.TestCase
TestPrefixes.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def setup(n_pages=16, page_size=4, specs=(KV(1, 1),)):
    cache = KVCache(make_groups(list(specs), page_size), NumpyMemory(), "float32", n_pages)
    index = RadixIndex(cache)
    cache.evict = index.evict
    return cache, index


def run(cache, index, tokens, salt=""):
    n, pages = index.match(tokens, salt)
    kv = cache.adopt(pages, n)
    assert append(cache, kv, np.arange(n, len(tokens)), np.arange(n, len(tokens)))
    index.insert(tokens, kv, salt)
    return kv


def test_a_row_is_always_left_to_compute():
    cache, index = setup()
    run(cache, index, list(range(8)))
    assert index.match(list(range(8)))[0] == 4
    assert index.match(list(range(9)))[0] == 8
    assert index.match([0])[0] == index.match([])[0] == 0


def test_equal_prefixes_lie_in_memory_once():
    cache, index = setup()
    a = run(cache, index, [1] * 8 + [2] * 4)
    b = run(cache, index, [1] * 8 + [3] * 4)
    assert a.pages(0)[:2] == b.pages(0)[:2]
    assert cache.pools[0].n_used == 4
    assert index.stats()["n_nodes"] == 3
    assert index.stats()["n_hit_tokens"] == 8
    index.check()


def test_salts_are_separate_and_vanish_when_empty():
    cache, index = setup()
    kv = run(cache, index, [1] * 8, "x")
    assert index.match([1] * 9, "y")[0] == 0
    assert index.match([1] * 9, "x")[0] == 8
    cache.free(kv)
    assert index.evict(2, 0) == 2
    assert index._roots == {}


def test_shared_during_prefill_and_of_two_equal_the_first_stays():
    cache, index = setup()
    tokens = list(range(12))
    a, b = cache.new(), cache.new()
    for kv in (a, b):  # both begin before either has a full page
        append(cache, kv, np.arange(8), np.arange(8))
    assert index.insert(tokens[:8], a) == 2
    assert index.insert(tokens[:8], b) == 0
    assert index.held() == [a.pages(0)]
    c = cache.adopt(*reversed(index.match(tokens)))  # a third one finds them although a and b go on
    assert c.pages(0) == a.pages(0)
    append(cache, b, np.arange(8, 12), np.arange(8, 12))
    assert index.insert(tokens, b) == 1  # b's page continues behind a's
    assert index.held() == [a.pages(0) + b.pages(0)[2:]]


def test_least_recently_used_goes_first():
    cache, index = setup(n_pages=6)
    for first in (1, 2, 3):
        cache.free(run(cache, index, [first] * 8))
    index.match([1] * 9)  # 2 is now the oldest
    kv = cache.new()
    assert append(cache, kv, np.arange(4), np.arange(4))
    assert [index.match([t] * 9)[0] for t in (1, 2, 3)] == [8, 4, 8]  # its tail only
    cache.free(kv)
    index.check()


def test_nothing_in_use_is_evicted_and_nothing_is_given_up_in_vain():
    cache, index = setup(n_pages=4)
    kv = run(cache, index, [1] * 8)
    cache.free(run(cache, index, [2] * 8))
    assert cache.reserve(cache.new(), np.arange(12)) is None  # three pages; two can be had
    assert index.match([2] * 9)[0] == 8
    assert index.evict(4, 0) == 2
    assert index.match([1] * 9)[0] == 8
    cache.check_integrity([kv], index.held())


def test_a_window_groups_old_pages_are_freed_under_a_tail_in_use():
    """The sequence has trimmed them and only the index has them: it must not starve by them."""
    cache, index = setup(n_pages=8, specs=[KV(1, 1), Window(1, 1, 4)], page_size=4)
    kv = run(cache, index, list(range(32)))
    cache.trim(kv)
    assert [pool.n_free for pool in cache.pools] == [0, 0]
    assert cache.pools[1].n_idle == 7  # the next row, index 32, sees 29..32
    assert index.evict(1, 1) == 1
    index.check()
    cache.check_integrity([kv], index.held())
    assert index.match(list(range(40)))[0] == 6 * 4  # pages 7, in use, and 6 had to go
    assert cache.pools[0].n_free == 0  # the plain group's pages live on in the sequence


def test_a_text_that_differs_in_the_middle_ends_there():
    cache, index = setup()
    for branch in (5, 6):
        run(cache, index, [1] * 4 + [2] * 4 + [branch] * 4)
    assert index.match([1] * 4 + [9] * 4 + [5] * 8)[0] == 4


def test_what_branches_had_in_common_goes_after_them():
    cache, index = setup()
    for branch in (2, 3):
        cache.free(run(cache, index, [1] * 8 + [branch] * 4))
    for n_left in (3, 2, 1, 0):
        assert index.evict(1, 0) == 1
        index.check()
        assert index.n_pages == n_left
    assert cache.pools[0].n_free == 16


def test_a_trunk_whose_branches_were_in_use_is_found_again():
    """Its last old page is freed by letting go of the branches; the rest goes when its users have gone."""
    cache, index = setup(n_pages=32, specs=[KV(1, 1), Window(1, 1, 4)])
    kvs = [run(cache, index, [1] * 16 + [branch] * 8) for branch in (2, 3)]
    for kv in kvs:
        cache.trim(kv)
    assert cache.pools[1].n_idle == 6  # four of the trunk, the first of each branch
    assert index.evict(3, 1) >= 3
    index.check()
    cache.check_integrity(kvs, index.held())
    assert index.n_pages > 0
    for kv in kvs:
        cache.free(kv)
    index.evict(32, 1)
    assert index.n_pages == 0
    assert [pool.n_free for pool in cache.pools] == [32, 32]


def test_a_compacted_sequence_is_not_inserted():
    cache, index = setup()
    kv = run(cache, index, list(range(8)))
    assert cache.keep(kv, 0, [0, 1, 2, 3, 6, 7])
    append(cache, kv, np.arange(8, 18), np.arange(8, 18))
    assert index.insert(list(range(18)), kv) == 0
    assert index.match(list(range(20)))[0] == 8


def test_a_fork_under_another_salt_is_left_out():
    cache, index = setup()
    kv = run(cache, index, list(range(8)), "x")
    child = cache.fork(kv)
    append(cache, child, np.arange(8, 12), np.arange(8, 12))
    assert index.insert(list(range(12)), child, "y") == 0
    assert index.match(list(range(12)), "y")[0] == 0
    index.check()


def test_decoding_extends_one_node():
    cache, index = setup(n_pages=64)
    kv, tokens = cache.new(), list(range(200))
    for n in range(1, 201):
        append(cache, kv, np.array([n - 1]), np.array([n - 1]))
        index.insert(tokens[:n], kv)
    assert index.stats()["n_nodes"] == 1
    assert index.n_pages == 50
    for _ in range(500):  # the queue of leaves does not grow with the number of queries
        index.match(tokens)
    assert len(index._leaves) < 100


def test_the_check_notices_damage():
    cache, index = setup()
    run(cache, index, list(range(8)))
    node = next(iter(index._roots[""].children.values()))
    node.tokens.append(3)
    with pytest.raises(AssertionError, match="tokens and pages differ"):
        index.check()


def test_the_technique_declares_what_it_needs():
    assert Radix().manifest().needs == {Fact.PREFIX_PURE, Fact.FORKABLE}
    assert Radix().manifest().seams == {"prefix"}
