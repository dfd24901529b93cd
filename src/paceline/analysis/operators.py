"""What a step costs, operator by operator, and how much of its time the machine makes necessary.

Time is the native core's own profile; bytes and FLOPs are those of `ops/count.py` for the same model and the same step. No operator
takes less than its bound, max(bytes / bandwidth, FLOPs / peak).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.models.base import Model
from paceline.ops.count import Cost, CountOps
from paceline.ops.count import step as shape_of

UNITS = ("f32", "bf16", "int8")

Costs = Mapping[str, Cost]
"""What a step costs, by the names of the native profile."""


@dataclass(frozen=True)
class Limits:
    """Measured with the engine's threads: bytes/s read, and operations/s of each arithmetic unit."""

    bandwidth: float
    peaks: Mapping[str, float]

    def arithmetic(self, name: str, cost: Cost, kv_dtype: str) -> float:
        """Seconds that an operator's FLOPs take at least."""
        return cost.flops / self.peaks[unit_of(name, kv_dtype)]


def measure_limits(device: Any) -> Limits:
    return Limits(device.read_bandwidth(), {unit: device.peak(unit) for unit in UNITS})


def unit_of(name: str, kv_dtype: str) -> str:
    """The arithmetic unit that an operator's products can run on."""
    if name == "attention":
        return "bf16" if kv_dtype in ("bfloat16", "int8") else "f32"
    form = name.rpartition(" ")[2] if name.startswith(("linear ", "rescored ")) else "f32"
    return "int8" if form.startswith("int") else "bf16" if form == "bf16" else "f32"


def count(model: Model, new: Sequence[int], cached: Sequence[int], kv_dtype: str, want: str = "last") -> Costs:
    """The cost of computing new[s] rows of sequence s after cached[s] that it has, `want` as in `ops.count.step`."""
    ops = CountOps(kv_dtype)
    counted = type(model)(model.config, ops, model.w, 1)  # tables of one position: only their widths are counted
    batch = ops.begin(shape_of(model.config.states, new, cached, want))
    logits = counted.forward(batch)
    if len(batch.want):
        unused = np.empty(0)
        ops.sample(logits, unused, unused, unused, unused, unused)
    return ops.ledger.by_name()


def streamed(costs: Costs) -> int:
    """Bytes that no cache holds from step to step: weights and KV entries."""
    return sum(c.weights + c.kv_read + c.kv_written for c in costs.values())


@dataclass(frozen=True)
class Operator:
    """One kind of operator in a step. share: its bound's part of its time, 1 where nothing is left to gain; None: not counted.

    bound: what sets the bound, "memory" or the arithmetic unit. Where the operands stay in a cache between steps, share can exceed 1.
    """

    name: str
    calls: float
    seconds: float
    bytes: int
    flops: int
    share: float | None
    bound: str | None = None


def profile(device: Any, steps: Callable[[], int], costs: Costs, limits: Limits, kv_dtype: str) -> list[Operator]:
    """Operators of the steps that `steps` runs (it says how many), longest first; `costs` is what each step costs."""
    device.profile(True)
    try:
        n = steps()
    finally:
        spent = device.profile(False)
    rows = []
    for name, calls, total in spent:
        cost, seconds = costs.get(name), total / n
        if cost is None:
            rows.append(Operator(name, calls / n, seconds, 0, 0, None))
            continue
        memory, arithmetic = cost.bytes / limits.bandwidth, limits.arithmetic(name, cost, kv_dtype)
        bound = "memory" if memory >= arithmetic else unit_of(name, kv_dtype)
        rows.append(
            Operator(name, calls / n, seconds, cost.bytes, cost.flops, max(memory, arithmetic) / seconds, bound)
        )
    return sorted(rows, key=lambda r: -r.seconds)
