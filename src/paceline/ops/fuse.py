"""Fewer passes over the activations of a traced program: a linear takes in what comes right before and after it.

    rms_norm, linear    -> the linear normalises its rows as it reads them; so does a rescored head
    linear, gated       -> the linear computes gates and ups side by side and writes their product
    linear, add         -> the linear adds to its result as it writes it

Only where the value in between is used nowhere else. The bits stay: the fused kernel does the same arithmetic row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from paceline.ops.packed import LANES

if TYPE_CHECKING:
    from paceline.ops.record import Call, Reg


@dataclass
class _Linear:
    """A linear on its way to being fused: out = add + (norm(x) W^T + bias), or the gated product of that."""

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

    def norm_of(x: Reg) -> Call | None:
        """The norm that made x, taken out of the program, where it ran over whole rows for this call alone."""
        source = made.get(x.id)
        if source is None or source.op != "rms_norm" or not passing(x) or len(source.args[0]) != x.cols:
            return None
        out[at[x.id]] = None
        return source

    for c in calls:
        if c.op == "linear":
            linear = _Linear(c.out, c.ins[0], *c.args)
            if (norm := norm_of(linear.x)) is not None:
                linear.norm, linear.x = norm.args, norm.ins[0]
            out.append(linear)
        elif c.op == "rescored" and (norm := norm_of(c.ins[0])) is not None:
            out.append(replace(c, ins=norm.ins, args=(*c.args[:2], *norm.args)))
        elif (found := _taken_in(c, out, at, passing)) is not None:
            product, other = found
            linear = out[at[product.id]]  # type: ignore[assignment]
            out[at[product.id]] = None
            linear.out = c.out
            if other is None:
                linear.gate = c.args[0]
            else:
                linear.add = other
            out.append(linear)  # where `c` was: by then the other summand is there
        else:
            out.append(c)
        made[c.out.id], at[c.out.id] = c, len(out) - 1
    return [c.call() if isinstance(c, _Linear) else c for c in out if c is not None]


def _taken_in(c: Call, out: Sequence[Any], at: dict[int, int], passing: Any) -> tuple[Reg, Reg | None] | None:
    """The linear's result among the operands of a gate or a sum that it can do itself, and the other summand."""

    def plain(r: Reg) -> bool:
        made = out[at[r.id]] if r.id in at else None
        return isinstance(made, _Linear) and made.add is None and made.gate is None and passing(r)

    if c.op == "gated" and c.ins[0].cols % (2 * LANES) == 0 and plain(c.ins[0]):
        return c.ins[0], None
    if c.op == "add" and c.ins[0].id != c.ins[1].id:
        for product, other in (c.ins, c.ins[::-1]):
            if plain(product):
                return product, other
    return None
