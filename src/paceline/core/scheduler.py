"""Who computes how many rows in the next step, and who waits.

One rule serves prefill, chunks, decode, drafts and replay: a sequence's share is at most what it has pending. Rows in hand are given to
running sequences first, then to waiting ones while pages last. When a running sequence finds no page, the victim's state is
forgotten (its tokens are not), and it computes again later.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.core.batch import MAX_TREE
from paceline.core.kvcache import KVCache
from paceline.core.sequence import NO_DRAFT, Sequence


@dataclass(frozen=True)
class Limits:
    """Bounds of a step. max_rows: rows computed; max_seqs: sequences running; chunk: rows of one sequence."""

    max_rows: int
    max_seqs: int
    chunk: int
    max_wanted: int  # rows of logits at a time


class Policy(Protocol):
    """The `schedule` seam."""

    def order(self, seqs: Seq[Sequence], now: float) -> list[Sequence]:
        """Who is served first, both of the running and of the waiting."""

    def victim(self, running: Seq[Sequence]) -> Sequence:
        """Who is preempted when pages run out."""


class FirstCome:
    """In the order of arrival within a priority; the latest is preempted first."""

    @staticmethod
    def _key(seq: Sequence) -> tuple[int, float, int]:
        return (-seq.request.priority, seq.request.arrival, seq.id)

    def order(self, seqs: Seq[Sequence], now: float) -> list[Sequence]:
        return sorted(seqs, key=self._key)

    def victim(self, running: Seq[Sequence]) -> Sequence:
        return max(running, key=self._key)


class Prefix(Protocol):
    """The `prefix` seam: pages of computed prefixes, found by their tokens."""

    def match(self, tokens: Seq[int], salt: str) -> tuple[int, list[list[int]]]:
        """Tokens matched and their pages per group, to be given to `KVCache.adopt` before anything else happens."""

    def insert(self, tokens: Seq[int], kv: Any, salt: str) -> Any:
        """Hold the full pages of these computed tokens."""

    def evict(self, n: int, group: int) -> int:
        """Release up to n pages of a group; how many were."""

    def check(self) -> None:
        """Assert the index's own integrity."""


@dataclass(slots=True, eq=False)
class Share:
    """`n` pending rows of a sequence, of which the last `n_draft` are draft nodes.

    positions: places in the text of the rows; slots: per KV group those of the rows; want: rows (from 0) whose logits somebody reads.
    """

    seq: Sequence
    n: int
    n_draft: int
    positions: Seq[int]
    slots: list[Seq[int]]
    want: range


class Scheduler:
    def __init__(self, cache: KVCache, limits: Limits, policy: Policy, prefix: Prefix | None = None):
        self.cache, self.limits, self.policy, self.prefix = cache, limits, policy, prefix
        cache.evict = prefix.evict if prefix is not None else None
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.n_preempted = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def run(self, seq: Sequence) -> None:
        """Take in a sequence that already has state (a fork)."""
        self.running.append(seq)

    def park(self, seq: Sequence) -> None:
        if seq in self.running:
            self.running.remove(seq)
        self.parked.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence and release its pages."""
        for queue in (self.waiting, self.running, self.parked):
            if seq in queue:
                queue.remove(seq)
        if seq.kv is not None:
            self.cache.free(seq.kv)
            seq.kv = None

    def schedule(self, now: float) -> list[Share]:
        shares: list[Share] = []
        rows, n_before = self.limits.max_rows, self.n_preempted
        tree = any(not s.draft.is_chain for s in self.running if s.draft is not NO_DRAFT)
        chunk = min(self.limits.chunk, MAX_TREE) if tree else self.limits.chunk
        # decodes (little pending) before chunks of prompts, so that nobody's next token waits for another's prompt
        order = self.policy.order(self.running, now)
        if any(map(_is_behind, order)):
            order.sort(key=_is_behind)
        for seq in order:
            if rows == 0:
                break
            if self.n_preempted > n_before and seq not in self.running:  # preempted by an earlier one in this loop
                continue
            share = self._share(seq, min(rows, chunk), shares)
            if share is not None:
                shares.append(share)
                rows -= share.n
        if self.n_preempted > n_before:  # pages are short: let the running ones finish first
            return shares
        return shares + self._admit(rows, chunk, now) if self.waiting else shares

    def _admit(self, rows: int, chunk: int, now: float) -> list[Share]:
        shares: list[Share] = []
        for seq in self.policy.order(self.waiting, now):
            if rows == 0 or len(self.running) >= self.limits.max_seqs:
                break
            share = self._try_start(seq, min(rows, chunk))
            while share is None and self.parked and not self.running:
                self._preempt(self.parked[0])
                share = self._try_start(seq, min(rows, chunk))
            if share is None:
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            shares.append(share)
            rows -= share.n
        return shares

    def _try_start(self, seq: Sequence, rows: int) -> Share | None:
        self._start(seq)
        share = self._reserve(seq, rows)
        if share is None:
            self.cache.free(seq.kv)
            seq.kv, seq.n_computed, seq.n_cached = None, 0, 0
        return share

    def _start(self, seq: Sequence) -> None:
        """Give a sequence its cache, with what the prefix index already holds of it."""
        if self.prefix is None or seq.params.prompt_logprobs is not None or seq.request.pool is not None:
            seq.kv = self.cache.new()
            return
        n, pages = self.prefix.match(seq.tokens, seq.salt)
        seq.kv = self.cache.adopt(pages, n)
        seq.n_computed = n
        seq.n_cached = min(n, seq.n_prompt)

    def _share(self, seq: Sequence, rows: int, shares: list[Share]) -> Share | None:
        """Reserve for a running sequence, preempting victims until it fits; None when it had to give way itself."""
        while True:
            share = self._reserve(seq, rows)
            if share is not None:
                return share
            victim = self._victim(shares)
            self._preempt(victim)
            if victim is seq:
                return None

    def _victim(self, shares: list[Share]) -> Sequence:
        if self.parked:
            return self.parked[0]
        served = {s.seq.id for s in shares}
        return self.policy.victim([s for s in self.running if s.id not in served])

    def _preempt(self, seq: Sequence) -> None:
        self.cache.free(seq.kv)
        seq.rewind()
        self.n_preempted += 1
        if seq in self.parked:
            self.parked.remove(seq)
            return
        self.running.remove(seq)
        self.waiting.append(seq)

    def _reserve(self, seq: Sequence, rows: int) -> Share | None:
        n_real = len(seq.tokens) - seq.n_computed
        if not seq.plain and (seq.params.prompt_logprobs is not None or seq.request.pool == "logits"):
            rows = min(rows, self.limits.max_wanted)
        n = min(n_real, rows)
        if seq.draft is not NO_DRAFT:
            n_draft = self._cut_draft(seq, rows - n) if n == n_real else 0
            seq.draft = seq.draft.cut(n_draft) if n_draft else NO_DRAFT
            share = self._of(seq, n, n_draft)
            if share is not None or not n_draft:
                return share
            seq.draft = NO_DRAFT  # a draft is never worth a preemption
        return self._of(seq, n, 0)

    def _cut_draft(self, seq: Sequence, room: int) -> int:
        """How many nodes of the draft fit the step."""
        n = min(len(seq.draft), room)
        n_real = len(seq.tokens) - seq.n_computed
        return n if seq.draft.is_chain else min(n, max(0, MAX_TREE - n_real))

    def _of(self, seq: Sequence, n: int, n_draft: int) -> Share | None:
        """The share of n real rows and the draft, with room for it in the cache; None where there is none."""
        positions: Seq[int] = range(seq.n_computed, seq.n_computed + n)
        if n_draft:
            positions = [*positions, *(len(seq.tokens) - 1 + seq.draft.depths()).tolist()]
        slots = self.cache.reserve(seq.kv, positions)
        return None if slots is None else Share(seq, n + n_draft, n_draft, positions, slots, _wanted(seq, n, n_draft))


def _is_behind(seq: Sequence) -> bool:
    """Whether it has more to compute than its next token."""
    return len(seq.tokens) - seq.n_computed > 1


def _wanted(seq: Sequence, n_real: int, n_draft: int) -> range:
    n = n_real + n_draft
    if seq.plain:
        return range(n_real - 1, n) if seq.n_computed + n_real == len(seq.tokens) else range(0)
    request = seq.request
    if request.pool == "logits" or (request.params.prompt_logprobs is not None and seq.n_computed < seq.n_prompt):
        return range(n)
    if seq.n_computed + n_real < len(seq.tokens) or not request.generate:
        return range(0)
    return range(n_real - 1, n)
