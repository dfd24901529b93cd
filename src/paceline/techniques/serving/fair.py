"""Fair shares per owner: whoever sends much delays himself, not others. Virtual Token Counter, arXiv:2401.00588, section 4.

Service is counted in tokens, `output_weight` of a prompt's for each of an answer (the paper takes 2, as prices do), per
`Request.owner`. No owner can be starved: its counter stands still while others' grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paceline.core.technique import Manifest, Technique, tune
from paceline.techniques.parts.fairshare import FairShare


@dataclass(frozen=True)
class Fair(Technique):
    output_weight: float = tune(2.0, 0.0, 1000.0, help="prompt tokens that one output token counts as")

    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"schedule"}), paper="2401.00588")

    def build(self, context: Any) -> FairShare:
        return FairShare(lambda seq: seq.request.owner, 1.0, self.output_weight)
