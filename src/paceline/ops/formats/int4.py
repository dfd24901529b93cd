"""int4: w = scale * factor * (q - 8); q from 0 to 15, a whole factor from -15 to 15 per group of 32 inputs, a float32 scale per output.

factor * (q - 8) lies in -120..120, so a matrix is one of int8 per output that takes 4.25 bits per weight: integer sums run
over all of K, with one scale of the activations per row. Whole factors of a scale: QServe (Lin et al. 2024, section 4.1), there for
codes without sign.

scale = max |w| over the output / 120. For each group: m = its element of largest magnitude, the first on ties; the factor is
round_half_even(|m / -8 / scale|) with the sign of m / -8 / scale, so that m gets code 0, or one more or one less where the squared error
is less (in this order; within 1..15); 0 where m is 0. q = clip(round_half_even(w / (scale * factor)), -8, 7) + 8.
The squared errors add as two halves of 16, then 8 + 8, 4 + 4, 2 + 2, 1 + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core.errors import CheckpointError
from paceline.ops.formats import base
from paceline.ops.formats._quantised import divisor, largest
from paceline.ops.formats.int4g import decode, encode
from paceline.ops.packed import LANES, Codes, Packed

GROUP = 32
MOST_FACTOR = 15
MOST_INPUTS = 1 << 17
"""Integer sums over more inputs could pass 2^31."""


def quantise(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w (n, n_groups, 32) float32 -> codes of that shape, factors int8 (n, n_groups), scales float32 (n)."""
    widest = largest(w)
    scales = np.abs(widest).max(-1) / np.float32(8 * MOST_FACTOR)
    ideal = widest / np.float32(-8) / divisor(scales)
    size = np.rint(np.abs(ideal))
    least = np.full(widest.shape, np.inf, np.float32)
    factors, codes = np.zeros(widest.shape, np.float32), np.zeros(w.shape, np.float32)
    for by in (0, 1, -1):
        magnitude = np.clip(size + np.float32(by), 1, MOST_FACTOR)
        factor = np.where(ideal < 0, -magnitude, magnitude)
        step = (scales[:, None] * factor)[..., None]
        q = np.clip(np.rint(w / divisor(step[..., 0])), -8, 7)
        error = _sum((q * step - w) ** 2)
        better = error < least
        least, factors = np.where(better, error, least), np.where(better, factor, factors)
        codes = np.where(better[..., None], q, codes)
    zero = widest == 0
    factors[zero], codes[zero] = 0, 0
    return (codes + 8).astype(np.uint8), factors.astype(np.int8), scales


def _sum(x: np.ndarray) -> np.ndarray:
    """Sums of the last axis of 32 in the order of the vector registers."""
    n = x.shape[-1]
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


@dataclass(frozen=True)
class Factored:
    name: str = "int4"
    default_group: int = GROUP
    quantised: bool = True

    def why_not(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> str | None:
        if group not in (None, GROUP):
            return f"group = {group}: must be {GROUP}; int4g has other groups"
        if mins:
            return "mins: its codes are symmetric; leave mins out or use int4g"
        if len(shape) == 2 and shape[1] > MOST_INPUTS:
            return f"{shape[1]} inputs: its integer sums hold at most {MOST_INPUTS}; use int4g"
        return base.no_room(shape)

    def bits(self, group: int | None = None, mins: bool = False) -> float:
        return 4 + 8 / GROUP

    def arrays(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> base.Arrays:
        if why := self.why_not(shape, group, mins):
            raise CheckpointError(f"{self.name}: {why}")
        n_blocks, k = base.ceil_div(shape[0], LANES), _padded(shape[1])
        return {
            "data": ((n_blocks, k // 64, 8, LANES, 4), np.dtype(np.uint8)),
            "scales": ((n_blocks, 1, LANES), np.dtype(np.float32)),
            "factors": ((n_blocks, k // GROUP, LANES), np.dtype(np.int8)),
        }

    def pack(self, w: np.ndarray | Codes, group: int | None = None, mins: bool = False) -> Packed:
        shape = base.check_matrix(self, w, group, mins)
        out = base.allocate(self.arrays(shape))
        n_in = shape[1]
        for lo, block in base.chunks(base.dequantise(w) if isinstance(w, Codes) else w):
            n = base.ceil_div(n_in, GROUP) * GROUP
            block = np.pad(block, ((0, 0), (0, n - n_in)))
            codes, factors, scales = quantise(block.reshape(len(block), -1, GROUP))
            q = np.zeros((len(block), _padded(n_in)), np.uint8)
            q[:, :n_in] = codes.reshape(len(block), -1)[:, :n_in]
            base.put(base.lanes(out["data"]), lo, encode(q).view(np.uint32))
            base.put(out["scales"], lo, scales[:, None])
            base.put(out["factors"], lo, factors)
        return Packed(self.name, shape, out["data"], out["scales"], None, GROUP, out["factors"])

    def unpack(self, p: Packed) -> np.ndarray:
        return base.dequantise(self._codes(p, None))

    def rows(self, p: Packed, ids: np.ndarray) -> np.ndarray:
        return base.dequantise(self._codes(p, ids))

    def codes(self, p: Packed) -> Codes:
        """As int8 per output, which is what it is."""
        return self._codes(p, None)

    def _codes(self, p: Packed, ids: np.ndarray | None) -> Codes:
        n_out, n_in = p.shape
        assert p.scales is not None
        assert p.factors is not None
        words = base.take(base.lanes(p.data), n_out, ids)
        q = decode(words.view(np.uint8)).astype(np.int8) - np.int8(8)
        factors = np.repeat(base.take(p.factors, n_out, ids), GROUP, axis=1)
        return Codes(8, (q * factors)[:, :n_in], base.take(p.scales, n_out, ids), None, 0)


def _padded(n_in: int) -> int:
    return base.ceil_div(n_in, 64) * 64


FORMAT = Factored()
