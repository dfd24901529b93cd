"""The operators of a serving engine, measured in its idle moments: `analysis/operators.py` without `bench`'s freedom to take its time.

A measurement is made of short pieces, and before each it is asked whether the engine is still idle, so a request that comes in waits for
one piece at most: a step of one sequence, as beside any other user, or once in the life of an engine a look at one of the machine's limits
(about 0.2 s for the bandwidth). It runs past the scheduler and the prefix index, in pages that are free, and leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from paceline.analysis import operators
from paceline.analysis.hardware import host
from paceline.analysis.operators import UNITS, Limits
from paceline.core.build import build
from paceline.core.config import Plan
from paceline.core.errors import PacelineError
from paceline.core.runner import Runner
from paceline.core.scheduler import Share
from paceline.core.sequence import Sequence
from paceline.core.types import Request, SamplingParams

FRESH_S = 60.0  # a measurement is told again for so long
CONTEXT = 512  # tokens before the measured steps, where there is room and time
GROW_S = 1.0  # for computing them
PIECE_S = 0.1  # what is repeated for better figures is repeated for so long
MAX_STEPS = 32
MAX_ROWS = 128
BANDWIDTH_BYTES = 1 << 28
PEAK_S = 0.02


class NotNow(PacelineError):
    """The engine has got work, or lacks room: why there is no measurement."""


class Probe:
    """Measures when asked and when `idle()`. All calls are made by the thread that owns the engine."""

    def __init__(self, runner: Runner, plan: Plan, idle: Callable[[], bool]):
        self.runner, self.plan, self.idle = runner, plan, idle
        self._device: Any = getattr(runner.ops, "device", None)
        self._bandwidth = 0.0
        self._peaks: dict[str, float] = {}
        self._last: dict[str, Any] | None = None
        self._when = 0.0

    def ask(self) -> dict[str, Any]:
        """{"refused": why nothing was measured now, or None; "age": seconds since the last measurement; and that measurement, if any}.

        A measurement: "bandwidth" (bytes/s), "peaks" (FLOP/s by unit) and "steps", each with "work" (decode or prompt), "rows",
        "context", "n" (steps measured), and its `operators.Operator`s, longest first, times in seconds per step.
        """
        refused = None
        if self._last is None or time.monotonic() - self._when > FRESH_S:
            try:
                self._last, self._when = self._measure(), time.monotonic()
            except NotNow as e:
                refused = str(e)
        age = None if self._last is None else time.monotonic() - self._when
        return {"refused": refused, "age": age, **(self._last or {})}

    def _measure(self) -> dict[str, Any]:
        if self._device is None:
            raise NotNow(f"the {self.plan.backend} backend does not time its operators; the native core does")
        limits = self._limits()
        room = self._room()
        with _Steps(self.runner, room, self._go_on) as steps:
            rows = steps.grow(min(CONTEXT, room // 2), min(MAX_ROWS, self.plan.limits.chunk, room // 8))
            done = [self._profile(steps, "decode", 1, limits), self._profile(steps, "prompt", rows, limits)]
        return {"bandwidth": limits.bandwidth, "peaks": dict(limits.peaks), "steps": done}

    def _go_on(self) -> None:
        if not self.idle():
            raise NotNow("requests are being served; operators are measured when the engine is idle")

    def _limits(self) -> Limits:
        """Measured once, piece by piece: what an interruption has left is used the next time."""
        if not self._bandwidth:
            self._go_on()
            free = host.detect().memory_available
            if free < 4 * BANDWIDTH_BYTES:  # a measurement must not be what ends the process
                raise NotNow(
                    f"measuring the bandwidth takes {BANDWIDTH_BYTES >> 20} MiB, too much of the {free >> 20} MiB free"
                )
            self._bandwidth = self._device.read_bandwidth(BANDWIDTH_BYTES, 3)
        for unit in UNITS:
            if unit not in self._peaks:
                self._go_on()
                self._peaks[unit] = max(self._device.peak(unit, PEAK_S) for _ in range(2))
        return Limits(self._bandwidth, self._peaks)

    def _room(self) -> int:
        """Tokens for which there are pages that nobody holds."""
        pages = min(p["n_free"] for p in self.runner.cache.stats()) - 1
        room = min(self.plan.context, pages * self.plan.page_size)
        if room < 64:
            raise NotNow("the KV cache has no free pages to measure in")
        return room

    def _profile(self, steps: _Steps, work: str, rows: int, limits: Limits) -> dict[str, Any]:
        """Some steps of so many rows each, operator by operator."""
        once = steps.run(rows)
        n = max(1, min(MAX_STEPS, int(PIECE_S / once), steps.room // (8 * rows) - 1))
        middle = steps.context + rows * (n - 1) // 2

        def run() -> int:
            for _ in range(n):
                steps.run(rows)
            return n

        costs = operators.count(self.runner.model, [rows], [middle], self.plan.kv_dtype)
        found = operators.profile(self._device, run, costs, limits, self.plan.kv_dtype)
        return {"work": work, "rows": rows, "context": middle, "n": n, "operators": [asdict(o) for o in found]}


class _Steps:
    """Steps of one sequence of random tokens in a cache, with nothing around them. Its pages are given back at the end."""

    def __init__(self, runner: Runner, room: int, go_on: Callable[[], None]):
        self.runner, self.room, self._go_on = runner, room, go_on
        tokens = np.random.default_rng(0).integers(0, runner.model.config.n_vocab, room).tolist()
        self.seq = Sequence(0, Request("probe", (), SamplingParams()), 0, tokens, room, 0, room)
        self.seq.kv = runner.cache.new()

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self.runner.cache.free(self.seq.kv)

    @property
    def context(self) -> int:
        return self.seq.n_computed

    def grow(self, n: int, max_rows: int) -> int:
        """Compute about n tokens in steps whose rows are doubled while they are short; how many rows they came to."""
        rows, end = min(8, max_rows), time.perf_counter() + GROW_S
        while self.context < n and time.perf_counter() < end:
            if self.run(rows) < PIECE_S / 3:
                rows = min(2 * rows, max_rows)
        return rows

    def run(self, n: int) -> float:
        """Compute the next n tokens and choose one behind them; seconds of it. Raises NotNow when there is no time or room."""
        self._go_on()
        runner, seq, start = self.runner, self.seq, time.perf_counter()
        positions = range(seq.n_computed, seq.n_computed + n)
        slots = runner.cache.reserve(seq.kv, positions) if positions.stop <= self.room else None
        if slots is None:
            raise NotNow("the KV cache has no free pages to measure in")
        batch = build([Share(seq, n, 0, positions, slots, range(n - 1, n))], runner.cache, runner.of_layer)
        logits = runner.ops.numpy(runner.model.program.forward(runner.ops.begin(batch)))
        zero = np.zeros(1, np.float32)
        runner.ops.sample(logits, zero, np.zeros(1, np.int32), np.ones(1, np.float32), zero, np.zeros(1))
        runner.cache.settle(seq.kv)
        seq.n_computed += n
        if runner.cache.has_windows:
            runner.cache.trim(seq.kv)
        return time.perf_counter() - start
