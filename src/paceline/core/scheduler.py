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
from paceline.core.specs import KVGroup, Window
from paceline.core.tiers import Tiers

AHEAD = 2  # pages kept for each running sequence before another is admitted: with none, a tenth of all rows was computed twice


@dataclass(frozen=True)
class Limits:
    """Bounds of a step. max_rows: rows computed; max_seqs: sequences running; chunk: rows of one sequence."""

    max_rows: int
    max_seqs: int
    chunk: int
    max_wanted: int  # rows of logits at a time


class Policy(Protocol):
    """The `schedule` seam. Within a priority no sequence may wait for ever while others come and go."""

    def order(self, seqs: Seq[Sequence], now: float) -> list[Sequence]:
        """Who is served first: called for those that decode, and for those with more to compute, running (with `kv`) or waiting."""

    def victim(self, running: Seq[Sequence]) -> Sequence:
        """Who is preempted when pages run out: an order that time does not change, so that its first is never interrupted."""
        return max(running, key=by_arrival)

    def add(self, seq: Sequence, waiting: Seq[Sequence]) -> None:
        """A new sequence comes to those that wait."""
        return

    def observe(self, shares: Seq[Share], seconds: float) -> None:
        """What the last step computed, and its time. Called after commit: `seq.n_computed` and `seq.tokens` include the step."""
        return


class FirstCome(Policy):
    """In the order of arrival within a priority; the latest is preempted first."""

    def order(self, seqs: Seq[Sequence], now: float) -> list[Sequence]:
        return sorted(seqs, key=by_arrival)


def by_arrival(seq: Sequence) -> tuple[int, float, int]:
    return (-seq.request.priority, seq.request.arrival, seq.id)


class Budget(Protocol):
    """The `budget` seam."""

    def rows(self, decoding: Seq[Share], first: Sequence, limit: int) -> int:
        """How many rows of prompts, those of `first` before others, a step takes beside these shares: from 1 to `limit`."""

    def observe(self, shares: Seq[Share], seconds: float) -> None:
        """As `Policy.observe`."""


class Watcher(Protocol):
    """Who is told what a prefix index takes in and gives up; page ids are one per group."""

    def added(self, before: int, tokens: Seq[int], pages: Seq[Seq[int]], salt: str) -> None:
        """Full pages of these tokens, behind the page `before` of group 0 (-1: at the beginning of a text)."""

    def dropping(self, pages: Seq[int]) -> None:
        """One page, whose content still stands."""

    def cleared(self) -> None: ...


class Prefix(Protocol):
    """The `prefix` seam: pages of computed prefixes, found by their tokens. watcher: set before use, if at all."""

    watcher: Watcher | None

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
    def __init__(
        self,
        cache: KVCache,
        limits: Limits,
        policy: Policy,
        prefix: Prefix | None = None,
        budget: Budget | None = None,
        tiers: Tiers | None = None,
    ):
        self.cache, self.limits, self.policy, self.prefix, self.budget = cache, limits, policy, prefix, budget
        self.tiers = tiers
        cache.evict = prefix.evict if prefix is not None else None
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.n_preempted = 0

    def add(self, seq: Sequence) -> None:
        self.policy.add(seq, self.waiting)
        self.waiting.append(seq)
        if self.tiers is not None and self._reuses(seq):
            self.tiers.prefetch(seq)

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
        if self.tiers is not None:
            self.tiers.forget(seq)

    def schedule(self, now: float) -> list[Share]:
        """Decodes (little pending) first, so that nobody's next token waits for another's prompt; then prompts."""
        shares: list[Share] = []
        rows, n_before = self.limits.max_rows, self.n_preempted
        tree = any(not s.draft.is_chain for s in self.running if s.draft is not NO_DRAFT)
        chunk = min(self.limits.chunk, MAX_TREE) if tree else self.limits.chunk
        decoding = [s for s in self.running if not _is_behind(s)]
        prompts = len(decoding) < len(self.running) or bool(self.waiting)
        for seq in self.policy.order(decoding, now):
            if rows == 0:
                break
            if self.n_preempted > n_before and seq not in self.running:  # preempted by an earlier one in this loop
                continue
            share = self._share(seq, min(rows, chunk), shares)
            if share is not None:
                shares.append(share)
                rows -= share.n
        if prompts and rows:
            self._schedule_prompts(shares, rows, chunk, now, may_admit=self.n_preempted == n_before)
        return shares

    def _schedule_prompts(self, shares: list[Share], rows: int, chunk: int, now: float, may_admit: bool) -> None:
        """Give what rows are left to those with more to compute, whether they run or wait, in the policy's order.

        Nobody is admitted in a step in which pages were short: the running ones finish first.
        """
        seqs = [s for s in self.running if _is_behind(s)]
        if may_admit and len(self.running) < self.limits.max_seqs:
            seqs += self.waiting
        seqs = self.policy.order(seqs, now)
        if seqs and shares and self.budget is not None:
            rows = self.budget.rows(shares, seqs[0], rows)
        n_before = self.n_preempted
        for seq in seqs:
            if rows == 0:
                break
            if seq.kv is not None:
                share = self._continue(seq, min(rows, chunk), shares)
            elif may_admit and self.n_preempted == n_before and len(self.running) < self.limits.max_seqs:
                if self._comes_too_early(seq, shares):
                    continue
                share = self._admit(seq, min(rows, chunk))
                may_admit = share is not None  # none overtakes because it is small
            else:
                continue
            if share is not None:
                shares.append(share)
                rows -= share.n

    def _continue(self, seq: Sequence, rows: int, shares: list[Share]) -> Share | None:
        """The next chunk of a running sequence. It waits for pages while others go on: preempting for it would only lose work."""
        share = self._reserve(seq, rows)
        while share is None and self.parked:
            self._preempt(self.parked[0])
            share = self._reserve(seq, rows)
        return self._share(seq, rows, shares) if share is None and not shares else share

    def _comes_too_early(self, seq: Sequence, shares: list[Share]) -> bool:
        """Whether its prefix is on the way: from a tier, or because one that runs is computing it."""
        if self.prefix is None or not self._reuses(seq):
            return False
        if self.tiers is not None and not self.tiers.ready(seq, not (self.running or shares)):
            return True
        if seq.leader is None or seq.leader[0] not in self.running or seq.leader[0].n_computed >= seq.leader[1]:
            seq.leader = self._leader(seq)
        return seq.leader is not None

    def _leader(self, seq: Sequence) -> tuple[Sequence, int] | None:
        """A running sequence that has yet to compute whole pages of what `seq` begins with, and the length of what they share."""
        size = self.cache.groups[0].page_size
        head = seq.tokens[:size]
        for other in self.running:
            if not _is_behind(other) or other.tokens[:size] != head or other.salt != seq.salt:
                continue
            n = _n_common(other.tokens, seq.tokens) // size * size
            n = min(n, (len(seq.tokens) - 1) // size * size)
            if n > other.n_computed and self._reuses(other):
                return other, n
        return None

    def _admit(self, seq: Sequence, rows: int) -> Share | None:
        share = self._try_start(seq, rows)
        while share is None and self.parked and not self.running:
            self._preempt(self.parked[0])
            share = self._try_start(seq, rows)
        if share is not None:
            self.waiting.remove(seq)
            self.running.append(seq)
        return share

    def _try_start(self, seq: Sequence, rows: int) -> Share | None:
        self._start(seq)
        share = self._reserve(seq, rows) if self._has_room(seq) else None
        if share is None:
            self.cache.free(seq.kv)
            seq.kv, seq.n_computed, seq.n_cached = None, 0, 0
        return share

    def _has_room(self, seq: Sequence) -> bool:
        """Whether a sequence that would start fits beside the running ones with all that is known of each and some pages to go on.

        Half a prompt in the cache helps nobody: without this, prompts that do not fit together preempt each other again and again.
        """
        if not self.running:
            return True
        for group, pool in zip(self.cache.groups, self.cache.pools, strict=True):
            free = pool.n_free + (pool.n_idle if self.prefix is not None else 0)
            if self._lacking(seq, group) + sum(self._lacking(s, group) for s in self.running) > free:
                return False
        return True

    def _lacking(self, seq: Sequence, group: KVGroup) -> int:
        """Pages beyond those it has, for its tokens and `AHEAD` pages more of each of its completions."""
        size, n = group.page_size, len(seq.tokens)
        if isinstance(group.spec, Window):
            n = min(n, seq.n_computed + group.spec.size + self.limits.chunk)
        n_pages = -(-min(n + AHEAD * size, seq.max_len) // size) + AHEAD * len(seq.siblings)
        return max(0, n_pages - seq.kv.n_pages[group.id])

    def _start(self, seq: Sequence) -> None:
        """Give a sequence its cache, with what the prefix index, or a tier, already holds of it."""
        if self.prefix is None or not self._reuses(seq):
            seq.kv = self.cache.new()
            return
        n, pages = self.prefix.match(seq.tokens, seq.salt)
        seq.kv = self.cache.adopt(pages, n)
        if self.tiers is not None and self.tiers.restore(seq):
            n = seq.kv.lens[0]
            self.prefix.insert(seq.tokens, seq.kv, seq.salt)
        seq.n_computed = n
        seq.n_cached = min(n, seq.n_prompt)

    def _reuses(self, seq: Sequence) -> bool:
        """Whether it may start from known state: not when something is asked of its every row."""
        return seq.params.prompt_logprobs is None and seq.request.pool is None

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


def _n_common(a: list[int], b: list[int]) -> int:
    """Leading elements that are equal."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        mid = (low + high + 1) // 2
        if a[low:mid] == b[low:mid]:
            low = mid
        else:
            high = mid - 1
    return low


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
