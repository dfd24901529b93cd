"""From a function over symbolic registers to a native program.

Tracing calls the function once. Every op appends a `Call`; its result is a `Reg`. Then each register gets a place in the device's
arena: a register's floats are needed from the call that writes it to the last call that reads it, so later ones reuse the space.
Inputs and outputs are the caller's arrays, not arena. The recorder knows nothing of what the ops do; `fuse` knows a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline import _native
from paceline.ops.fuse import fuse

_ALIGN = 16  # floats: rows start at 64 bytes


@dataclass(frozen=True, eq=False)
class Reg:
    """Columns [col, col + cols) of a symbolic float32 matrix; `wanted`: it has the batch's wanted rows instead of all."""

    recorder: Recorder
    id: int
    col: int
    cols: int
    wanted: bool = False

    @property
    def shape(self) -> tuple[None, int]:
        return (None, self.cols)

    def columns(self, col: int, cols: int) -> Reg:
        """A view; nothing is copied."""
        return Reg(self.recorder, self.id, self.col + col, cols, self.wanted)


@dataclass(frozen=True)
class Call:
    op: str  # the method of _native.Program
    out: Reg
    ins: tuple[Reg, ...]
    args: tuple[Any, ...]


@dataclass
class Recorder:
    """What has been traced. Also stands for the batch while tracing."""

    n_inputs: int = 0
    widths: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def input(self, cols: int) -> Reg:
        self.n_inputs += 1
        return self._new(cols, False)

    def call(
        self,
        op: str,
        ins: Sequence[Reg],
        cols: int,
        args: Sequence[Any] = (),
        wanted: bool | None = None,
        in_place: bool = False,
    ) -> Reg:
        """Append an op with one result; its rows are those of the inputs unless `wanted` says otherwise.

        in_place: it changes its first operand, which nobody reads afterwards, and that is the result.
        """
        assert all(r.recorder is self for r in ins), "a register of another trace"
        rows = {r.wanted for r in ins} or {False}
        assert len(rows) == 1, f"{op}: mixes all rows with the wanted ones"
        if in_place:
            out = ins[0] if self._own(ins[0]) else self.call("copy", ins[:1], cols)
            ins = (out, *ins[1:])
        else:
            out = self._new(cols, rows.pop() if wanted is None else wanted)
        self.calls.append(Call(op, out, tuple(ins), tuple(args)))
        return out

    def _own(self, r: Reg) -> bool:
        """Whether r is all of a register that the program itself has written."""
        return r.id >= self.n_inputs and r.col == 0 and r.cols == self.widths[r.id]

    def _new(self, cols: int, wanted: bool) -> Reg:
        self.widths.append(cols)
        return Reg(self, len(self.widths) - 1, 0, cols, wanted)

    def finish(self, device: _native.Device, results: Sequence[Reg]) -> _native.Program:
        """Plan the arena and build the program whose outputs are `results`."""
        outs = self._outputs(results)
        self.calls = fuse(self.calls, self.widths, {r.id for r in outs})
        slots = {i: i for i in range(self.n_inputs)} | {r.id: self.n_inputs + k for k, r in enumerate(outs)}
        places, width = plan([*self._lifetimes(slots)])
        program = _native.Program(device, width, self.widths[: self.n_inputs], [(r.cols, r.wanted) for r in outs])
        for c in self.calls:
            refs = [self._ref(r, slots, places) for r in (c.out, *c.ins)]
            getattr(program, c.op)(*refs, *c.args)
        return program

    def _outputs(self, results: Sequence[Reg]) -> list[Reg]:
        """One whole, fresh register per result: inputs, views and repeated results are copied."""
        outs: list[Reg] = []
        for r in results:
            fresh = self._own(r) and all(o.id != r.id for o in outs)
            outs.append(r if fresh else self.call("copy", (r,), r.cols))
        return outs

    def _lifetimes(self, slots: dict[int, int]) -> list[tuple[int, int, int, int]]:
        """(id, floats, first, last call) of every register that lives in the arena."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for n, c in enumerate(self.calls):
            first.setdefault(c.out.id, n)
            last |= {r.id: n for r in (c.out, *c.ins)}
        return [(i, _stride(self.widths[i]), first[i], last[i]) for i in first if i not in slots]

    def _ref(self, r: Reg, slots: dict[int, int], places: dict[int, int]) -> _native.Ref:
        return _native.Ref(
            slots.get(r.id, -1), r.wanted, places.get(r.id, 0), _stride(self.widths[r.id]), r.col, r.cols
        )


def _stride(cols: int) -> int:
    return -(-cols // _ALIGN) * _ALIGN


def plan(lifetimes: Sequence[tuple[int, int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets such that registers alive at the same call never overlap, and the width they need together.

    lifetimes: (id, size, first, last) with both ends included. First fit, in the order of `first`.
    """
    places: dict[int, int] = {}
    placed: list[tuple[int, int, int]] = []  # offset, size, last: those alive
    width = 0
    for i, size, first, last in sorted(lifetimes, key=lambda t: t[2]):
        placed = [p for p in placed if p[2] >= first]
        at = 0
        for offset, taken, _ in sorted(placed):
            if at + size <= offset:
                break
            at = max(at, offset + taken)
        places[i] = at
        placed.append((at, size, last))
        width = max(width, at + size)
    return places, width
