"""One step, in one straight line: propose, schedule, reserve, forward, draw or verify, commit.

Commit is the only place where persistent state changes; whatever observes a sequence sees committed tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from paceline.core.build import build
from paceline.core.kvcache import KVCache, of_layer
from paceline.core.sampler import Drawn, LogitsPart, Sampler
from paceline.core.scheduler import Budget, FirstCome, Limits, Policy, Prefix, Scheduler, Share
from paceline.core.sequence import NO_DRAFT, Draft, Sequence
from paceline.core.tier import Tier
from paceline.core.tiers import Tiers
from paceline.core.types import TokenLogprob
from paceline.core.verify import Acceptor, Verdict, coupled


class Drafter(Protocol):
    """The `drafter` seam."""

    def propose(self, seqs: Seq[Sequence]) -> list[Draft]:
        """A draft (possibly empty) for each sequence; each has all but its last token computed."""

    def observe(self, seq: Sequence, n_accepted: int) -> None: ...


class KVPolicy(Protocol):
    """One link of the `kv_policy` chain."""

    def after_commit(self, seq: Sequence, cache: KVCache) -> None: ...


@dataclass
class Parts:
    """What the techniques built, by seam. Empty seams cost nothing. tiers: the `kv_tier` chain, put to work under `prefix`."""

    prefix: Prefix | None = None
    drafter: Drafter | None = None
    acceptor: Acceptor = coupled
    schedule: Policy = field(default_factory=FirstCome)
    budget: Budget | None = None
    logits: list[LogitsPart] = field(default_factory=list)
    kv_policy: list[KVPolicy] = field(default_factory=list)
    kv_tier: list[Tier] = field(default_factory=list)
    tiers: Tiers | None = None


Append = Callable[[Sequence, Drawn], bool]  # takes a committed token; True when the sequence is finished


class Runner:
    """Runs steps of a model over a cache. `append` receives every new token and decides whether the sequence ends."""

    def __init__(self, model: Any, cache: KVCache, parts: Parts, limits: Limits, eos: frozenset[int], append: Append):
        self.model, self.ops, self.cache, self.parts = model, model.ops, cache, parts
        self.scheduler = Scheduler(cache, limits, parts.schedule, parts.prefix, parts.budget, parts.tiers)
        self.sampler = Sampler(self.ops, parts.logits, eos)
        self.append = append
        self.of_layer = of_layer(cache.groups)
        self._page = cache.groups[0].page_size  # the prefix index takes whole pages
        self.n_steps = 0
        self._shares: list[Share] = []  # of the last step
        self.adapted: Any = None  # the model's program for steps with adapters, once there are any

    def step(self, now: float) -> list[Sequence]:
        """Compute one step; the sequences that got tokens, ended or failed in it."""
        self._propose()
        shares = self._shares = self.scheduler.schedule(now)
        if not shares:
            return []
        self.n_steps += 1
        start = perf_counter()
        batch = build(shares, self.cache, self.of_layer)
        bound = self.ops.begin(batch)
        program = self.model.program if batch.adapter_of is None else self.adapted
        if any(not s.seq.plain and s.seq.request.pool in ("mean", "last") for s in shares):
            hidden, logits = map(self.ops.numpy, program.hidden(bound))
            self._pool(shares, batch.cu_rows, hidden)
        else:
            logits = self.ops.numpy(program.forward(bound))
        if self.parts.tiers is not None:
            self.parts.tiers.computed(batch.n_rows, perf_counter() - start)
        return self._commit(shares, logits)

    def observe(self, seconds: float) -> None:
        """Tell the parts that schedule how long the last step took."""
        if self._shares:
            self.parts.schedule.observe(self._shares, seconds)
            if self.parts.budget is not None:
                self.parts.budget.observe(self._shares, seconds)

    def _propose(self) -> None:
        if self.parts.drafter is None:
            return
        ready = [s for s in self.scheduler.running if len(s.tokens) - s.n_computed == 1 and s.request.generate]
        for seq, draft in zip(ready, self.parts.drafter.propose(ready), strict=True):
            room = seq.max_len - len(seq.tokens) - 1
            seq.draft = draft.cut(max(0, min(len(draft), room))) if draft.is_chain else prune(draft, room)

    def _pool(self, shares: Seq[Share], cu_rows: np.ndarray, hidden: np.ndarray) -> None:
        for share, at in zip(shares, cu_rows, strict=False):
            rows = hidden[at : at + share.n].astype(np.float64)
            seq = share.seq
            if seq.request.pool == "mean":
                total = rows.sum(axis=0)
                seq.pooled = total if seq.pooled is None else seq.pooled + total
            elif seq.request.pool == "last":
                seq.pooled = rows[-1]

    def _commit(self, shares: Seq[Share], logits: np.ndarray) -> list[Sequence]:
        touched: list[Sequence] = []
        draws: list[Sequence] = []
        rows: list[int] = []
        at = 0
        for share in shares:
            seq, first = share.seq, at
            at += len(share.want)
            if not seq.plain:
                self._collect(share, logits[first:at])
            if share.n_draft:
                touched.append(self._settle_draft(share, logits[at - 1 - share.n_draft : at]))
                continue
            self.cache.settle(seq.kv)
            seq.n_computed += share.n
            if seq.n_computed == len(seq.tokens):
                touched.append(seq)
                if seq.plain or seq.request.generate:
                    draws.append(seq)
                    rows.append(at - 1)
                    if seq.siblings:
                        children = self._fork_siblings(seq)
                        draws += children
                        touched += children
                        rows += [at - 1] * len(children)
        if draws:
            every = rows == list(range(len(logits)))  # a copy of all of them would cost as much as the sampling
            for seq, d in zip(draws, self.sampler.draw(draws, logits if every else logits[rows]), strict=True):
                self._take(seq, d)
        for share in shares:
            if share.seq.kv is not None:
                self._after(share.seq)
        return touched

    def _take(self, seq: Sequence, drawn: Drawn) -> bool:
        if drawn.token < 0:
            seq.finish_reason = "error"
            seq.error = seq.error or (
                "the model's logits are not finite (NaN or infinite): the weights or their quantisation are damaged"
            )
            return True
        ended = self.append(seq, drawn)
        if ended:
            seq.error = None  # a part of the logits chain may have failed in a draft, beyond the end
        return ended

    def _settle_draft(self, share: Share, logits: np.ndarray) -> Sequence:
        """Keep the accepted nodes' state, append their tokens and the one after them."""
        seq, n_real = share.seq, share.n - share.n_draft
        verdict, drawn = self.sampler.verify(seq, seq.draft, logits, self.parts.acceptor)
        rows = np.array([*range(n_real), *(n_real + i for i in verdict.path)], np.int64)
        self.cache.settle(seq.kv, rows)
        seq.draft = NO_DRAFT
        seq.n_computed += len(rows)
        for d in drawn:
            if self._take(seq, d):
                break
        self._observe(seq, verdict)
        return seq

    def _observe(self, seq: Sequence, verdict: Verdict) -> None:
        if self.parts.drafter is not None:
            self.parts.drafter.observe(seq, len(verdict.path))

    def _fork_siblings(self, seq: Sequence) -> list[Sequence]:
        """The other completions of the request share this one's prompt pages from here on."""
        children, seq.siblings = seq.siblings, []
        for child in children:
            child.kv = self.cache.fork(seq.kv)
            child.n_computed, child.n_cached = seq.n_computed, seq.n_cached
            self.scheduler.run(child)
        return children

    def _collect(self, share: Share, rows: np.ndarray) -> None:
        """What the request asks for besides tokens."""
        seq = share.seq
        if seq.params.prompt_logprobs is not None and seq.n_computed < seq.n_prompt:
            self._prompt_logprobs(share, rows)
        if seq.request.pool == "logits":
            seq.rows.append(rows.copy())

    def _prompt_logprobs(self, share: Share, rows: np.ndarray) -> None:
        seq = share.seq
        if seq.prompt_logprobs is None:
            seq.prompt_logprobs = [None]
        n = min(share.n, seq.n_prompt - 1 - seq.n_computed)
        start = len(seq.prompt_logprobs) - 1 - seq.n_computed  # a replay after preemption has them already
        if n > start:
            targets = np.array(seq.tokens[seq.n_computed + 1 + start : seq.n_computed + 1 + n], np.int64)
            found: list[TokenLogprob] = self.sampler.logprobs(rows[start:n], targets, seq.params.prompt_logprobs or 0)
            seq.prompt_logprobs.extend(found)

    def _after(self, seq: Sequence) -> None:
        """The rest of commit: policies, the prefix index, windows."""
        for policy in self.parts.kv_policy:
            policy.after_commit(seq, self.cache)
        kv, prefix = seq.kv, self.parts.prefix
        if prefix is not None and kv.lens[0] - kv.n_indexed >= self._page and seq.finish_reason != "error":
            prefix.insert(seq.tokens, kv, seq.salt)
        if self.cache.has_windows:
            self.cache.trim(kv)


def prune(draft: Draft, depth: int) -> Draft:
    """The nodes at most `depth` below the last real token."""
    keep = np.nonzero(draft.depths() <= depth)[0]
    new = {int(old): i for i, old in enumerate(keep)}
    parents = np.array([new.get(int(draft.parents[i]), -1) for i in keep], np.int32)
    return Draft(draft.tokens[keep], parents, None if draft.q is None else draft.q[keep])
