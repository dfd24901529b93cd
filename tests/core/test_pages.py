"""PagePool: counts of holders, and that its own check notices damage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.core.pages import PagePool


def test_take_share_release():
    pool = PagePool(4)
    a = pool.take(3)
    assert a == [0, 1, 2]
    pool.share(a[:2])
    assert (pool.n_free, pool.n_used, pool.n_shared, pool.peak) == (1, 3, 2, 3)
    assert pool.release(a) == 1  # only page 2 had one holder
    pool.check_integrity([0, 1])
    assert pool.release([0, 1]) == 2
    assert (pool.n_free, pool.n_shared, pool.peak) == (4, 0, 3)
    pool.check_integrity([])


def test_idle_pages_are_those_that_only_the_index_holds():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.retain(pages)
    assert pool.n_idle == 0
    pool.release(pages)
    assert (pool.n_idle, pool.n_free) == (2, 1)
    pool.share([0])  # a sequence found it again
    assert pool.n_idle == 1
    assert pool.forget(pages) == 1
    assert (pool.n_idle, pool.n_free) == (0, 2)
    pool.check_integrity([0])


@given(st.lists(st.tuples(st.sampled_from("tsrif"), st.integers(0, 7)), max_size=60))
def test_counts_equal_a_plain_model(steps):
    """Against a multiset of holders and a set of retained pages."""
    pool, held, kept = PagePool(8), [], set()
    for step, i in steps:
        page = held[i % len(held)] if held else None
        if step == "t" and pool.n_free:
            held += pool.take(1)
        elif page is not None and step == "s":
            pool.share([page])
            held.append(page)
        elif page is not None and step == "r":
            pool.release([page])
            held.remove(page)
        elif page is not None and step == "i" and page not in kept:
            pool.retain([page])
            kept.add(page)
        elif step == "f" and kept:
            page = sorted(kept)[i % len(kept)]
            kept.remove(page)
            assert pool.forget([page]) == (page not in held)
        pool.check_integrity(held + list(kept))
        assert pool.n_idle == len(kept - set(held))
        assert pool.n_free == 8 - len(kept | set(held))


def test_the_check_notices_a_leak_and_a_stranger():
    pool = PagePool(4)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="holders"):
        pool.check_integrity(pages[:1])
    with pytest.raises(AssertionError, match="holders"):
        pool.check_integrity([*pages, 3])


def test_more_than_there_is_is_our_own_mistake():
    pool = PagePool(2)
    with pytest.raises(AssertionError):
        pool.take(3)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError):
        pool.release(pages)
