"""Short and long prompts in two queues that share the machine, so that a short one does not wait behind long ones (LAPS).

From the paper: prompts are divided by length, and the two queues take turns on one engine (its time-multiplexed form). The turns are
weighted fair shares of prompt rows: short prompts get `weight` times as much as long ones while both wait, and either gets everything
when alone, so neither starves. Since steps compute chunks, a short prompt also goes between two chunks of a long one. Not taken over:
the waiting window that gathers short prompts for captured GPU graphs; steps here take ragged rows of any number. Length is the
prompt's own: what the prefix index will find is not known while a request waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paceline.core.technique import Manifest, Technique, tune
from paceline.techniques.parts.fairshare import FairShare


@dataclass(frozen=True)
class Laps(Technique):
    longest: int = tune(256, 1, 1 << 20, log=True, help="tokens of the longest prompt that is short")
    weight: float = tune(3.0, 0.01, 1000.0, log=True, help="share of short prompts, where that of long ones is 1")

    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"schedule"}))

    def build(self, context: Any) -> FairShare:
        return FairShare(
            lambda seq: "short" if seq.n_prompt <= self.longest else "long", 1.0, 0.0, {"short": self.weight}
        )
