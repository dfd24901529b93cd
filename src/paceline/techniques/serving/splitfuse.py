"""Dynamic SplitFuse: each step's rows are composed to a budget, running streams first, prompts split to fill the rest.

Prompts are split and joined so that a step has as many rows as its time allows: DeepSpeed-FastGen, arXiv:2401.08671, section 3.
There the number is fixed and found by profiling; here it follows from `parts/steptime.py`, which learns seconds per step from
the steps themselves. While streams run, a step is to take at most `target_ms`, so that no stream's next token is late because
of somebody's prompt, but prompts get at least `share` of the time. When nobody decodes, steps are as large as they may be, which
is best for throughput. A step's rows are a multiple of 32 where possible, as the kernels take them. The paper gives 2.3 times the
effective throughput and 3.7 times shorter token tails against whole prompts. Measured here: docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.core.scheduler import Share
from paceline.core.sequence import Sequence as TokenSequence
from paceline.core.technique import Manifest, Technique, tune
from paceline.techniques.parts.steptime import StepTime, work_of

QUANTUM = 32  # rows of a kernel's tile block: 33 rows cost what 64 do, nearly


class Splitter:
    """The `budget` seam. target: seconds of a step; share: of that time, at least for prompts; n_min: rows of prompts at least."""

    def __init__(self, target: float, share: float, n_min: int):
        self.target, self.share, self.n_min = target, share, n_min
        self.model = StepTime()

    def rows(self, decoding: Sequence[Share], first: TokenSequence, limit: int) -> int:
        """The largest number of rows whose step is predicted to end in time."""
        base = work_of(decoding)
        allowed = max(self.target, self.model.seconds(base) / (1.0 - self.share))
        low = -(-(base.rows + min(self.n_min, limit)) // QUANTUM)  # steps of `k * QUANTUM` rows
        high = max(low, (base.rows + limit) // QUANTUM)
        while low < high:
            k = (low + high + 1) // 2
            if self.model.seconds(base.plus(k * QUANTUM - base.rows, first.n_computed)) <= allowed:
                low = k
            else:
                high = k - 1
        return min(limit, low * QUANTUM - base.rows)

    def observe(self, shares: Sequence[Share], seconds: float) -> None:
        self.model.observe(shares, seconds)


@dataclass(frozen=True)
class SplitFuse(Technique):
    target_ms: float = tune(100.0, 0.1, 60_000.0, log=True, help="milliseconds per output token aimed at")
    share: float = tune(0.5, 0.0, 0.95, help="part of a step's time that prompts get at least, late or not")
    min_rows: int = tune(16, 1, 1 << 16, log=True, help="rows of prompts in a step at least")

    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"budget"}), paper="2401.08671")

    def build(self, context: Any) -> Splitter:
        return Splitter(self.target_ms / 1e3, self.share, self.min_rows)
