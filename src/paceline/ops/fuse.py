"""Fewer passes over the activations of a traced program: a linear takes in what comes right before and after it.

    rms_norm, linear    -> the linear normalises its rows as it reads them
    gated, linear       -> likewise
    linear, add         -> the linear adds to its result as it writes it

Only where the value in between is used nowhere else. The bits stay: the fused kernel does the same arithmetic row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.ops.record import Call, Reg


@dataclass
class _Linear:
    """A linear on its way to being fused: out = add + (before(x) W^T + bias)."""

    out: Reg
    x: Reg
    weight: Any
    bias: Any
    add: Reg | None = None
    norm: tuple[Any, float, float] | None = None  # weight, eps, offset
    gate: str | None = None

    def call(self) -> Call:
        from paceline.ops.record import Call

        if self.add is None and self.norm is None and self.gate is None:
            return Call("linear", self.out, (self.x,), (self.weight, self.bias))
        norm, eps, offset = self.norm or (None, 0.0, 0.0)
        args = (self.weight, self.bias, self.add is not None, norm, eps, offset, self.gate)
        return Call("fused_linear", self.out, (self.x, self.add or self.x), args)


def fuse(calls: Sequence[Call], widths: Sequence[int], kept: Collection[int]) -> list[Call]:
    """The same program in fewer calls. widths: columns by register; kept: registers that are read after the program."""
    uses = Counter(r.id for c in calls for r in c.ins)
    for i in kept:
        uses[i] += 1
    made: dict[int, Call] = {}  # what wrote a register
    out: list[Call | _Linear | None] = []
    at: dict[int, int] = {}  # where in `out`

    def passing(r: Reg) -> bool:
        """A whole register that only this call reads."""
        return uses[r.id] == 1 and r.col == 0 and r.cols == widths[r.id]

    for c in calls:
        if c.op == "linear":
            linear = _Linear(c.out, c.ins[0], *c.args)
            source = made.get(linear.x.id)
            if source is not None and passing(linear.x):
                whole = source.op == "rms_norm" and len(source.args[0]) == linear.x.cols
                if whole or source.op == "gated":
                    linear.norm, linear.gate = (source.args, None) if whole else (None, source.args[0])
                    linear.x = source.ins[0]
                    out[at[source.out.id]] = None
            out.append(linear)
        elif c.op == "add" and (found := _summand(c, out, at, passing)) is not None:
            product, other = found
            linear = out[at[product.id]]  # type: ignore[assignment]
            out[at[product.id]] = None
            linear.out, linear.add = c.out, other
            out.append(linear)  # where the sum was: by then the other summand is there
        else:
            out.append(c)
        made[c.out.id], at[c.out.id] = c, len(out) - 1
    return [c.call() if isinstance(c, _Linear) else c for c in out if c is not None]


def _summand(c: Call, out: Sequence[Any], at: dict[int, int], passing: Any) -> tuple[Reg, Reg] | None:
    """The operand of a sum that a linear can add up itself, and the other one."""
    for product, other in (c.ins, c.ins[::-1]):
        made = out[at[product.id]] if product.id in at else None
        if isinstance(made, _Linear) and made.add is None and passing(product) and other.id != product.id:
            return product, other
    return None
