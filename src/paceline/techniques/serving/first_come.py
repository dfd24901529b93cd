"""First come, first served, within a priority: what runs when no other order is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paceline.core.scheduler import FirstCome
from paceline.core.technique import Manifest, Technique


@dataclass(frozen=True)
class FirstComeFirstServed(Technique):
    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"schedule"}))

    def build(self, context: Any) -> FirstCome:
        return FirstCome()
