"""Least slack first: who would miss its time to the first token soonest is served first; who will miss it anyway comes last.

Slack is the target (`Request.ttft_target`, or this technique's) less the time waited and the time the rest of the prompt takes, as
`parts/steptime.py` predicts from the steps so far. Serving the hopeless last keeps one late request from making all others late (least
laxity first, with abandonment under overload: A. Mok, MIT/LCS/TR-297, 1983). They do not starve: in one step of `every` they go first.
Streams that run are ordered by when their next token is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.core.scheduler import Policy, Share
from paceline.core.sequence import Sequence as TokenSequence
from paceline.core.technique import Manifest, Technique, tune
from paceline.techniques.parts.steptime import StepTime, Work


class LeastSlack(Policy):
    """The `schedule` seam. ttft, tpot: seconds, for requests without their own; chunk: rows of a step."""

    def __init__(self, ttft: float, tpot: float, every: int, chunk: int):
        self.ttft, self.tpot, self.every, self.chunk = ttft, tpot, every, chunk
        self.model = StepTime()
        self._n_steps = 0

    def slack(self, seq: TokenSequence, now: float) -> float:
        """Seconds by which the next token can still be put off."""
        request = seq.request
        n_output = len(seq.tokens) - seq.n_prompt
        due = request.arrival + (self.ttft if request.ttft_target is None else request.ttft_target)
        due += n_output * (self.tpot if request.tpot_target is None else request.tpot_target)
        return due - now - self._seconds(len(seq.tokens) - seq.n_computed, seq.n_computed)

    def _seconds(self, n: int, start: int) -> float:
        """For n rows after `start`: as many full steps as that takes, at the middle of the way. A next token takes none."""
        if n <= 1:
            return 0.0
        full = min(n, self.chunk)
        return self.model.seconds(Work().plus(full, start + (n - full) // 2)) * n / full

    def order(self, seqs: Sequence[TokenSequence], now: float) -> list[TokenSequence]:
        turn = self._n_steps % self.every == self.every - 1

        def key(seq: TokenSequence) -> tuple[bool, float, int]:
            slack = self.slack(seq, now)
            late = slack < 0 and len(seq.tokens) == seq.n_prompt
            return (late != turn, seq.request.arrival if late else slack, seq.id)

        return sorted(seqs, key=key)

    def observe(self, shares: Sequence[Share], seconds: float) -> None:
        self._n_steps += 1
        self.model.observe(shares, seconds)


@dataclass(frozen=True)
class Deadline(Technique):
    ttft: float = tune(1.0, 1e-3, 3600.0, log=True, help="seconds to the first token, where the request says nothing")
    tpot: float = tune(0.1, 1e-4, 60.0, log=True, help="seconds per further token, where the request says nothing")
    every: int = tune(8, 2, 1 << 16, log=True, help="in one step of so many, requests that are late already go first")

    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"schedule"}))

    def build(self, context: Any) -> LeastSlack:
        return LeastSlack(self.ttft, self.tpot, self.every, context.plan.limits.chunk)
