"""Formats of plain numbers: f32, f16, bf16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core.errors import CheckpointError
from paceline.ops.formats import base
from paceline.ops.packed import LANES, Codes, Packed


@dataclass(frozen=True)
class Floats:
    """Numbers of one dtype; `align`: n_in is padded to a multiple of it. Rounding to the dtype is to nearest even."""

    name: str
    dtype: np.dtype
    align: int
    default_group: int = 0
    quantised: bool = False

    def why_not(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> str | None:
        if group or mins:
            return "plain numbers have no groups and no mins; leave them out"
        return base.no_room(shape)

    def bits(self, group: int | None = None, mins: bool = False) -> float:
        return 8.0 * self.dtype.itemsize

    def arrays(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> base.Arrays:
        if why := self.why_not(shape, group, mins):
            raise CheckpointError(f"{self.name}: {why}")
        per = 4 // self.dtype.itemsize
        n_words = base.ceil_div(shape[1], self.align) * self.align // per
        tail = (LANES,) if per == 1 else (LANES, per)
        return {"data": ((base.ceil_div(shape[0], LANES), n_words, *tail), self.dtype)}

    def pack(self, w: np.ndarray | Codes, group: int | None = None, mins: bool = False) -> Packed:
        shape = base.check_matrix(self, w, group, mins)
        values = base.dequantise(w) if isinstance(w, Codes) else w
        data = base.allocate(self.arrays(shape))["data"]
        per = 4 // self.dtype.itemsize
        for lo, block in base.chunks(values):
            rows = np.zeros((len(block), base.ceil_div(shape[1], per) * per), self.dtype)
            with np.errstate(over="ignore"):
                rows[:, : shape[1]] = block
            if self.dtype != np.float32 and not np.isfinite(rows).all():
                raise CheckpointError(
                    f"{self.name}: values up to {np.abs(block).max():g} exceed the format's range; use bf16 or f32"
                )
            base.put(base.lanes(data), lo, rows.view(np.uint32))
        return Packed(self.name, shape, data)

    def unpack(self, p: Packed) -> np.ndarray:
        return self._values(p, None)

    def rows(self, p: Packed, ids: np.ndarray) -> np.ndarray:
        return self._values(p, ids)

    def codes(self, p: Packed) -> Codes:
        raise CheckpointError(f"{self.name}: plain numbers have no codes")

    def _values(self, p: Packed, ids: np.ndarray | None) -> np.ndarray:
        words = base.take(base.lanes(p.data), p.shape[0], ids)
        return words.view(self.dtype)[:, : p.shape[1]].astype(np.float32)
