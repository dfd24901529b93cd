"""Strict priority, or with ageing: whoever waits gains levels with time.

With ageing a sequence is overtaken only by those that come within (difference in priority) / ageing seconds after it, so nobody
starves. Without, one of a lower priority waits as long as higher ones keep coming: that is what strict means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.core.scheduler import Policy
from paceline.core.sequence import Sequence as TokenSequence
from paceline.core.technique import Manifest, Technique, tune


class Ranked(Policy):
    """The `schedule` seam. ageing: levels of priority gained per second of waiting."""

    def __init__(self, ageing: float):
        self.ageing = ageing

    def _key(self, seq: TokenSequence) -> tuple[float, float, int]:
        """Since all age alike, the level at the time of arrival decides."""
        request = seq.request
        return (self.ageing * request.arrival - request.priority, request.arrival, seq.id)

    def order(self, seqs: Sequence[TokenSequence], now: float) -> list[TokenSequence]:
        return sorted(seqs, key=self._key)

    def victim(self, running: Sequence[TokenSequence]) -> TokenSequence:
        return max(running, key=self._key)


@dataclass(frozen=True)
class Priority(Technique):
    ageing: float = tune(0.0, 0.0, 1000.0, help="levels gained per second of waiting; 0: strict")

    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"schedule"}))

    def build(self, context: Any) -> Ranked:
        return Ranked(self.ageing)
