"""Where the engine reads the time: real, or driven by a test or a simulation."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds; only differences mean anything."""


class RealClock:
    def now(self) -> float:
        return time.perf_counter()


class ManualClock:
    """Moves only when told to."""

    def __init__(self, start: float = 0.0):
        self.time = start

    def now(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds
