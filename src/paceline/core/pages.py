"""Page ids of one KV group: a free list and a count of holders per page.

A page id names `page_size` consecutive slots in the pools of every layer of its group. Holders are sequences and the
prefix index; a page with more than one holder must not be written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PagePool:
    """The pages 0..n_pages-1: taken with one holder, shared, and free again when the last holder releases them.

    The prefix index holds pages by `retain` and `forget`, so that the pages nobody else holds are counted: those can be
    had for the asking. Plain lists, because single pages are asked for every step and reading a list element costs a
    third of a NumPy scalar.
    """

    def __init__(self, n_pages: int):
        self.n_pages = n_pages
        self.refs = [0] * n_pages  # holders per page; read by others, changed only here
        self.n_shared = 0  # pages with more than one holder
        self.n_idle = 0  # pages that only the prefix index holds
        self.peak = 0  # most pages ever in use at once
        self._free = list(range(n_pages - 1, -1, -1))  # a stack; the lowest id lies on top at first
        self.retained = bytearray(n_pages)  # 1: the prefix index is a holder

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_used(self) -> int:
        return self.n_pages - len(self._free)

    def take(self, n: int) -> list[int]:
        """n free pages, each now with one holder. The caller has made sure that `n <= n_free`."""
        assert 0 <= n <= len(self._free)
        cut = len(self._free) - n
        pages = self._free[cut:][::-1]
        del self._free[cut:]
        for page in pages:
            self.refs[page] = 1
        self.peak = max(self.peak, self.n_used)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, all of them in use."""
        refs = self.refs
        for page in pages:
            n = refs[page]
            assert n > 0
            refs[page] = n + 1
            if n == 1:
                self.n_shared += 1
                self.n_idle -= self.retained[page]

    def release(self, pages: Iterable[int]) -> int:
        """One holder fewer for each of these pages; how many became free."""
        refs, n_before = self.refs, len(self._free)
        for page in pages:
            n = refs[page] - 1
            assert n >= 0
            refs[page] = n
            if n == 1:
                self.n_shared -= 1
                self.n_idle += self.retained[page]
            elif n == 0:
                self._free.append(page)
        return len(self._free) - n_before

    def retain(self, pages: Sequence[int]) -> None:
        """The prefix index becomes a holder of these pages."""
        self.share(pages)
        for page in pages:
            assert not self.retained[page]
            self.retained[page] = 1

    def forget(self, pages: Sequence[int]) -> int:
        """The prefix index lets go of these pages; how many became free."""
        for page in pages:
            assert self.retained[page]
            self.retained[page] = 0
            self.n_idle -= self.refs[page] == 1
        return self.release(pages)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that the counts agree with `held`: every page once per holder, over all holders."""
        counts = Counter(held)
        wrong = {p: (n, counts[p]) for p, n in enumerate(self.refs) if n != counts[p]}
        assert not wrong, f"page: (counted holders, real holders) differ: {wrong}"
        assert set(counts) <= set(range(self.n_pages)), "page ids out of range"
        assert len(self._free) == len(set(self._free)), "a page is free twice"
        assert set(self._free) == {p for p, n in enumerate(self.refs) if n == 0}, "free list and counts differ"
        idle = [p for p, n in enumerate(self.refs) if n == 1 and self.retained[p]]
        assert self.n_idle == len(idle), "n_idle is wrong"
        assert not any(self.retained[p] for p in self._free), "a free page is retained"
        assert self.n_shared == sum(n > 1 for n in self.refs), "n_shared is wrong"
        assert self.n_used <= self.peak <= self.n_pages, "peak is wrong"
