"""Shortest remaining first: least mean waiting time when lengths are known (L. Schrage, Operations Research 16(3), 1968).

What remains of a sequence is the rest of its prompt and its expected output: its `max_tokens` or, where less, the running mean of
finished outputs. Ageing: each second of waiting counts as so many rows less, so a sequence is overtaken only by those that come
within (its length / ageing) seconds after it, and nobody starves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.core.scheduler import Policy, Share
from paceline.core.sequence import Sequence as TokenSequence
from paceline.core.technique import Manifest, Technique, tune

FORGET = 0.98  # of the mean output, per finished sequence


class ShortestRemaining(Policy):
    """The `schedule` seam. output_weight: rows of a prompt that one output token is worth; ageing: rows per second."""

    def __init__(self, output_weight: float, ageing: float, expected: float):
        self.output_weight, self.ageing, self.expected = output_weight, ageing, expected

    def remaining(self, seq: TokenSequence) -> float:
        """Rows, output tokens weighted."""
        n_output = len(seq.tokens) - seq.n_prompt
        longest = seq.max_len - seq.n_prompt if seq.request.generate else 0
        expected = min(longest, self.expected)
        if n_output >= expected:  # longer than the mean already: then likely half as long again
            expected = min(longest, 1.5 * n_output)
        return max(0, seq.n_prompt - seq.n_computed) + self.output_weight * max(0.0, expected - n_output)

    def order(self, seqs: Sequence[TokenSequence], now: float) -> list[TokenSequence]:
        """By what remains less what was waited; since all wait alike, the time of arrival decides."""
        return sorted(seqs, key=lambda s: (self.remaining(s) + self.ageing * s.request.arrival, s.id))

    def observe(self, shares: Sequence[Share], seconds: float) -> None:
        for share in shares:
            seq = share.seq
            if seq.done and seq.request.generate:
                self.expected += (1 - FORGET) * (len(seq.tokens) - seq.n_prompt - self.expected)


@dataclass(frozen=True)
class Shortest(Technique):
    output_weight: float = tune(1.0, 0.0, 1000.0, help="rows of a prompt that one output token counts as")
    ageing: float = tune(100.0, 0.1, 1e6, log=True, help="rows that a second of waiting is worth")
    expected: float = tune(128.0, 1.0, 1e6, log=True, help="output tokens expected before any has finished")

    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"schedule"}))

    def build(self, context: Any) -> ShortestRemaining:
        return ShortestRemaining(self.output_weight, self.ageing, self.expected)
