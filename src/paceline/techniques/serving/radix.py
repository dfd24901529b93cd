"""Radix prefix index: requests that begin alike share the pages of what they have in common.

A trie over whole pages of tokens with path compression: an edge carries the tokens of one or more pages and the page
ids of every KV group. A request starts from the longest prefix found, so its cost falls from n to n - matched rows, and
equal prefixes lie in memory once. The index is a holder like a sequence; pages that it alone holds are given back,
least recently used tail first, when the cache runs out. Idea: RadixAttention in SGLang, arXiv:2312.07104, section 3.
Cost: a dictionary look-up and a comparison of the real tokens per edge; no hash is trusted. The paper gives up to 6.4
times the throughput for its system as a whole, on workloads that share prefixes. Measured here
(`python benchmarks/kvcache_cost.py`): 58 us to find and 55 us to add a prompt of about 2,000 tokens with pages of 16,
3 us to give a page back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any

from paceline.core.kvcache import KVCache, SeqKV
from paceline.core.scheduler import Watcher
from paceline.core.technique import Fact, Manifest, Technique


class Node:
    """An edge and its lower end. tokens: a whole number of pages; pages: their ids per group."""

    __slots__ = ("children", "id", "pages", "parent", "tokens", "used")

    def __init__(self, id: int, parent: Node | None, tokens: list[int], pages: list[list[int]]):
        self.id = id
        self.parent = parent  # None: a root, or removed
        self.tokens = tokens
        self.pages = pages
        self.children: dict[tuple[int, ...], Node] = {}  # by the tokens of their first page
        self.used = 0  # when last matched or extended, on the index's own clock


class RadixIndex:
    """The `prefix` seam over a cache. All groups are in step: a node has a page in each.

    To be used up when pages run out, `evict` must be set as the cache's (the scheduler does). watcher: set before use.
    """

    def __init__(self, cache: KVCache):
        sizes = {g.page_size for g in cache.groups}
        assert len(sizes) == 1, "the groups of one cache have one page size"
        self.page_size = sizes.pop()
        self.n_pages = 0  # per group
        self.n_nodes = 0  # roots aside
        self.watcher: Watcher | None = None
        self._pools = cache.pools
        self._roots: dict[str, Node] = {}
        self._ids, self._clock = count(), count(1)
        self._leaves: list[tuple[int, int, Node]] = []  # heap by last use; entries that no longer hold are skipped
        self._counts = dict.fromkeys(("n_queries", "n_query_tokens", "n_hit_tokens", "n_inserted", "n_evicted"), 0)

    def match(self, tokens: Sequence[int], salt: str = "") -> tuple[int, list[list[int]]]:
        """Tokens of the longest prefix known under this salt, and its pages per group.

        At most len(tokens) - 1 tokens, so that a row is left to compute. The pages must be given to `KVCache.adopt`
        before anything else is done with the cache.
        """
        n = max(0, len(tokens) - 1) // self.page_size * self.page_size
        pages: list[list[int]] = [[] for _ in self._pools]
        at = 0
        if salt in self._roots:
            path = list(self._walk(self._roots[salt], list(tokens[:n])))
            for node, n_equal in path:
                at += n_equal * self.page_size
                for found, held in zip(pages, node.pages, strict=True):
                    found += held[:n_equal]
            self._touch([node for node, _ in path])
        self._counts["n_queries"] += 1
        self._counts["n_query_tokens"] += len(tokens)
        self._counts["n_hit_tokens"] += at
        return at, pages

    def insert(self, tokens: Sequence[int], kv: SeqKV, salt: str = "") -> int:
        """Add the full pages of a sequence, of which entry i is token i; how many pages were new.

        Of tokens computed twice the first pages stay. Nothing is added from where the cache was compacted or rewritten
        (`kv.pure`), nor where a window group has already released a page. Call it before `KVCache.trim`.
        """
        assert not kv.n_reserved
        n = min(len(tokens), kv.pure, *kv.lens) // self.page_size * self.page_size
        if n <= kv.n_indexed:
            return 0
        kv.n_indexed = n
        tokens = list(tokens[:n])
        root = self._roots.get(salt) or Node(next(self._ids), None, [], [[] for _ in self._pools])
        path, at, n_equal = [root], 0, 0
        for node, n_equal in self._walk(root, tokens):
            path.append(node)
            at += n_equal
        pages = [table[at : n // self.page_size].tolist() for table in kv.tables]
        n_new = len(pages[0])
        if at < max(kv.first) or self._has_any(pages):
            n_new = 0
        if n_new:
            self._roots[salt] = root
            if n_equal < len(path[-1].pages[0]):
                path[-1] = self._split(path[-1], n_equal)
            before = path[-1].pages[0][-1] if path[-1].tokens else -1
            path.append(self._extend(path[-1], tokens[at * self.page_size :], pages))
            if self.watcher is not None:
                self.watcher.added(before, tokens[at * self.page_size :], pages, salt)
        self._touch(path[1:])
        return n_new

    def evict(self, n: int, group: int) -> int:
        """Free n pages of a group that only the index holds; how many were freed: at least n, or all there were.

        First whole tails that nobody uses, least recently used first. What then remains lies above a tail that is in
        use (a window group's old pages, or pages whose like some sequence computed for itself): the index lets go of
        such a tail too, which costs its users nothing.
        """
        n = min(n, self._pools[group].n_idle)
        freed = self._evict_unused(n, group)
        if freed < n:
            freed += self._evict_above(n - freed, group)
        return freed

    def clear(self) -> None:
        """Forget everything."""
        for node in self._nodes():
            node.parent = None
            for pool, pages in zip(self._pools, node.pages, strict=True):
                pool.forget(pages)
        self._roots.clear()
        self._leaves.clear()
        self.n_pages = self.n_nodes = 0
        if self.watcher is not None:
            self.watcher.cleared()

    def held(self) -> list[list[int]]:
        """The pages the index holds, per group."""
        return [[page for node in self._nodes() for page in node.pages[g]] for g in range(len(self._pools))]

    def stats(self) -> dict[str, int]:
        """Pages and nodes now; queries, their tokens, tokens found, pages inserted and evicted so far."""
        return {"n_pages": self.n_pages, "n_nodes": self.n_nodes, **self._counts}

    def check(self) -> None:
        """Assert that the tree is well formed and that its pages are alive, each once."""
        nodes = list(self._nodes())
        live = {(used, node.id) for used, _, node in self._leaves if not node.children and node.parent is not None}
        for root in self._roots.values():
            assert root.parent is None, "a root has a parent"
            assert root.children, "a root without children"
            assert not root.tokens, "a root has tokens"
        for node in nodes:
            n = len(node.pages[0])
            assert n > 0, "an empty node"
            assert len(node.tokens) == n * self.page_size, "tokens and pages differ"
            assert all(len(pages) == n for pages in node.pages), "groups out of step"
            assert node.parent is not None, "an attached node has no parent"
            assert node.parent.children[self._key(node.tokens, 0)] is node, "a child under a wrong key"
            assert node.parent.used >= node.used or not node.parent.tokens, "a child used after its parent"
            assert node.children or (node.used, node.id) in live, "a leaf that eviction would not find"
        assert self.n_nodes == len(nodes), "n_nodes is wrong"
        for pool, pages in zip(self._pools, self.held(), strict=True):
            assert len(pages) == len(set(pages)) == self.n_pages, "a page twice, or n_pages is wrong"
            assert all(pool.refs[page] > 0 for page in pages), "a dead page"

    # within

    def _key(self, tokens: list[int], at: int) -> tuple[int, ...]:
        return tuple(tokens[at : at + self.page_size])

    def _walk(self, node: Node, tokens: list[int]) -> Iterator[tuple[Node, int]]:
        """The nodes below `node` that whole pages of `tokens` lead through, and how many pages of each are equal."""
        at = 0
        while at < len(tokens):
            child = node.children.get(self._key(tokens, at))
            if child is None:
                return
            n_equal = self._n_equal(child.tokens, tokens[at : at + len(child.tokens)])
            yield child, n_equal
            if n_equal * self.page_size < len(child.tokens):
                return
            node, at = child, at + len(child.tokens)

    def _n_equal(self, a: list[int], b: list[int]) -> int:
        """Leading pages that are equal; b is not longer than a."""
        size = self.page_size
        if a[: len(b)] == b:
            return len(b) // size
        return next(i for i in range(len(b) // size) if a[i * size : (i + 1) * size] != b[i * size : (i + 1) * size])

    def _has_any(self, pages: list[list[int]]) -> bool:
        """Whether some of these are in the index already (a fork that went on under another salt)."""
        return any(pool.retained[page] for pool, new in zip(self._pools, pages, strict=True) for page in new)

    def _touch(self, path: list[Node]) -> None:
        now = next(self._clock)
        for node in path:
            node.used = now
        if path:
            self._offer(path[-1])

    def _offer(self, node: Node) -> None:
        """Let eviction know a node, if it is a leaf now."""
        if node.children:
            return
        heappush(self._leaves, (node.used, node.id, node))
        if len(self._leaves) > 2 * self.n_nodes + 64:
            self._leaves = [(x.used, x.id, x) for x in self._nodes() if not x.children]
            heapify(self._leaves)

    def _split(self, node: Node, n: int) -> Node:
        """Cut a node after its first n pages; the new upper part, for the caller to touch."""
        assert node.parent is not None
        cut = n * self.page_size
        upper = Node(next(self._ids), node.parent, node.tokens[:cut], [pages[:n] for pages in node.pages])
        node.parent.children[self._key(node.tokens, 0)] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[cut:], [pages[n:] for pages in node.pages]
        upper.children[self._key(node.tokens, 0)] = node
        self.n_nodes += 1
        return upper

    def _extend(self, node: Node, tokens: list[int], pages: list[list[int]]) -> Node:
        """Append pages below a node: to the node itself when it is a leaf. The node that now has them."""
        for pool, new in zip(self._pools, pages, strict=True):
            pool.retain(new)
        self.n_pages += len(pages[0])
        self._counts["n_inserted"] += len(pages[0])
        if node.parent is not None and not node.children:
            node.tokens += tokens
            for held, new in zip(node.pages, pages, strict=True):
                held += new
            return node
        child = Node(next(self._ids), node, tokens, pages)
        node.children[self._key(tokens, 0)] = child
        self.n_nodes += 1
        return child

    def _evict_unused(self, n: int, group: int) -> int:
        freed = 0
        kept: list[Node] = []
        while freed < n and self._leaves:
            used, _, node = heappop(self._leaves)
            if node.parent is None or node.children or node.used != used:
                continue
            while freed < n and node.pages[0] and self._tail_is_unused(node):
                freed += self._drop_tail(node, group)
            if node.parent is not None:
                kept.append(node)
        for node in kept:
            self._offer(node)
        return freed

    def _evict_above(self, n: int, group: int) -> int:
        refs, freed = self._pools[group].refs, 0
        nodes = [node for node in self._nodes() if any(refs[page] == 1 for page in node.pages[group])]
        for node in sorted(nodes, key=lambda node: (node.used, node.id)):
            for below in reversed(list(self._below(node))):
                while below.parent is not None:
                    freed += self._drop_tail(below, group)
            while freed < n and node.parent is not None and any(refs[page] == 1 for page in node.pages[group]):
                freed += self._drop_tail(node, group)
            if freed >= n:
                break
        return freed

    def _tail_is_unused(self, node: Node) -> bool:
        return all(pool.refs[pages[-1]] == 1 for pool, pages in zip(self._pools, node.pages, strict=True))

    def _drop_tail(self, leaf: Node, group: int) -> int:
        """Let go of a leaf's last page in every group; how many pages that freed in `group`."""
        parent = leaf.parent
        assert parent is not None and not leaf.children  # noqa: PT018
        key = self._key(leaf.tokens, 0)
        if self.watcher is not None:
            self.watcher.dropping([pages[-1] for pages in leaf.pages])
        freed = [pool.forget([pages.pop()]) for pool, pages in zip(self._pools, leaf.pages, strict=True)]
        del leaf.tokens[-self.page_size :]
        self.n_pages -= 1
        self._counts["n_evicted"] += 1
        if not leaf.tokens:
            del parent.children[key]
            leaf.parent = None
            self.n_nodes -= 1
            if parent.parent is not None:
                self._offer(parent)
            elif not parent.children:
                self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}
        return freed[group]

    def _below(self, node: Node) -> Iterator[Node]:
        """All nodes below a node, parents before their children."""
        todo = list(node.children.values())
        while todo:
            node = todo.pop()
            todo += node.children.values()
            yield node

    def _nodes(self) -> Iterator[Node]:
        for root in list(self._roots.values()):
            yield from self._below(root)


@dataclass(frozen=True)
class Radix(Technique):
    def manifest(self) -> Manifest:
        needs = frozenset({Fact.PREFIX_PURE, Fact.FORKABLE})
        return Manifest(seams=frozenset({"prefix"}), needs=needs, paper="2312.07104")

    def build(self, context: Any) -> RadixIndex:
        return RadixIndex(context.cache)
