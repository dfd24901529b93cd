"""Formats of integer codes with scales: int8, int4g. Rounding to nearest, in float32 throughout.

A native quantiser must give the same bits, so the arithmetic of each format's `quantise` is normative: divisions are
true float32 divisions by the *stored* scale (a zero scale divides as infinity: the quotient is zero), rounding is half
to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from paceline.core.errors import CheckpointError
from paceline.ops.formats import base
from paceline.ops.packed import LANES, Codes, Packed

Quantise = Callable[[np.ndarray, bool, np.dtype], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
"""(w (n, n_groups, group) float32, mins, dtype of scales) -> codes of that shape, scales and mins (n, n_groups)"""


@dataclass(frozen=True)
class Quantised:
    """Codes of `width` bits in 4-byte words along k.

    groups: the sizes of groups that are allowed. encode: codes (n, k) with k a multiple of 64 -> bytes
    (n, k * width / 8) in the order of the tile's words; decode: its inverse. tile: the shape of `data` after
    (NB, k / tile_k).
    """

    name: str
    width: int
    groups: tuple[int, ...]
    default_group: int
    with_mins: bool
    dtype: np.dtype  # of data
    tile_k: int
    tile: tuple[int, ...]
    code_range: tuple[int, int]
    quantise: Quantise
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    quantised: bool = True

    def why_not(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> str | None:
        if group is not None and group not in self.groups:
            return f"group = {group}: must be {', '.join(map(str, self.groups[:-1]))} or {self.groups[-1]}"
        if mins and not self.with_mins:
            return "mins: its codes are symmetric; leave mins out or use int4g"
        return base.no_room(shape)

    def bits(self, group: int | None = None, mins: bool = False) -> float:
        group = self.default_group if group is None else group
        return self.width + (16 * (1 + mins) / group if group else 0.0)

    def arrays(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> base.Arrays:
        if why := self.why_not(shape, group, mins):
            raise CheckpointError(f"{self.name}: {why}")
        group = self.default_group if group is None else group
        n_blocks = base.ceil_div(shape[0], LANES)
        k = self._padded(shape[1], group)
        scales = ((n_blocks, k // group if group else 1, LANES), _scale_dtype(group))
        out = {"data": ((n_blocks, k // self.tile_k, *self.tile), self.dtype), "scales": scales}
        return out | {"mins": scales} if mins else out

    def pack(self, w: np.ndarray | Codes, group: int | None = None, mins: bool = False) -> Packed:
        shape = base.check_matrix(self, w, group, mins)
        if isinstance(w, Codes) and w.bits == self.width and group in (None, w.group):
            group, mins = w.group, w.mins is not None
            base.check_matrix(self, w, group, mins)
            self._check_codes(w)
            blocks = _blocks_of(w)
        else:
            group = self.default_group if group is None else group
            blocks = self._quantised_blocks(base.dequantise(w) if isinstance(w, Codes) else w, group, mins)
        out = base.allocate(self.arrays(shape, group, mins))
        for lo, c in blocks:
            q = np.zeros((len(c.q), self._padded(shape[1], group)), c.q.dtype)
            q[:, : shape[1]] = c.q
            base.put(base.lanes(out["data"]), lo, self.encode(q).view(np.uint32))
            base.put(out["scales"], lo, c.scales)
            if c.mins is not None:
                base.put(out["mins"], lo, c.mins)
        return Packed(self.name, shape, out["data"], out["scales"], out.get("mins"), group)

    def unpack(self, p: Packed) -> np.ndarray:
        return base.dequantise(self._codes(p, None))

    def rows(self, p: Packed, ids: np.ndarray) -> np.ndarray:
        return base.dequantise(self._codes(p, ids))

    def codes(self, p: Packed) -> Codes:
        return self._codes(p, None)

    def _codes(self, p: Packed, ids: np.ndarray | None) -> Codes:
        n_out, n_in = p.shape
        n_groups = base.ceil_div(n_in, p.group or n_in)
        assert p.scales is not None
        scales = base.take(p.scales, n_out, ids)[:, :n_groups]
        mins = None if p.mins is None else base.take(p.mins, n_out, ids)[:, :n_groups]
        words = base.take(base.lanes(p.data), n_out, ids)
        return Codes(self.width, self.decode(words.view(self.dtype))[:, :n_in], scales, mins, p.group)

    def _padded(self, n_in: int, group: int) -> int:
        align = math.lcm(64, group or 1)
        return base.ceil_div(n_in, align) * align

    def _check_codes(self, c: Codes) -> None:
        """Codes in range, scales finite and of the right shape. Raises CheckpointError."""
        n_out, n_in = c.q.shape
        expected = (n_out, base.ceil_div(n_in, c.group or n_in))
        for what, a in (("scales", c.scales), ("mins", c.mins)):
            if a is None:
                continue
            if a.shape != expected:
                raise CheckpointError(
                    f"{self.name}: {what} of shape {a.shape}, expected {expected} for groups of {c.group}"
                )
            if not np.isfinite(a.astype(np.float32)).all():
                raise CheckpointError(f"{self.name}: {what} hold NaN or infinity: the file is damaged; fetch it again")
        low, high = self.code_range
        if c.q.min() < low or c.q.max() > high:
            raise CheckpointError(f"{self.name}: codes from {c.q.min()} to {c.q.max()} must lie from {low} to {high}")

    def _quantised_blocks(self, w: np.ndarray, group: int, mins: bool) -> Iterator[tuple[int, Codes]]:
        """Blocks of rows, quantised by rounding to nearest."""
        n_in = w.shape[1]
        size = group or n_in
        n_groups = base.ceil_div(n_in, size)
        for lo, block in base.chunks(w):
            if n_groups * size > n_in:  # complete the last group with one of its own elements: its statistics stay
                block = np.pad(block, ((0, 0), (0, n_groups * size - n_in)), mode="edge")
            with np.errstate(over="ignore", invalid="ignore"):  # an infinite scale is reported below
                q, scales, minima = self.quantise(block.reshape(len(block), n_groups, size), mins, _scale_dtype(group))
            for a in (scales, minima):
                if a is not None and not np.isfinite(a).all():
                    raise CheckpointError(
                        f"{self.name}: weights up to {np.abs(block).max():g} need scales or mins beyond float16's "
                        "largest, 65504; use bf16 or f32"
                    )
            yield lo, Codes(self.width, q.reshape(len(block), -1)[:, :n_in], scales, minima, group)


def _scale_dtype(group: int) -> np.dtype:
    return np.dtype(np.float16 if group else np.float32)


def _blocks_of(c: Codes) -> Iterator[tuple[int, Codes]]:
    step = max(LANES, (1 << 20) // c.q.shape[1] // LANES * LANES)
    for lo in range(0, c.q.shape[0], step):
        at = slice(lo, lo + step)
        yield lo, Codes(c.bits, c.q[at], c.scales[at], None if c.mins is None else c.mins[at], c.group)


def divisor(scales: np.ndarray) -> np.ndarray:
    """Stored scales (n, n_groups) as float32 (n, n_groups, 1) to divide by; infinity where a scale is zero."""
    s = scales.astype(np.float32)[..., None]
    s[s == 0] = np.inf
    return s


def largest(w: np.ndarray) -> np.ndarray:
    """The signed element of largest magnitude in each group, the first on ties: (n, n_groups, g) -> (n, n_groups)."""
    at = np.abs(w).argmax(-1)
    return np.take_along_axis(w, at[..., None], -1)[..., 0]
