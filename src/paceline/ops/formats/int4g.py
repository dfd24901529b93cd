"""int4g, four bits with float scales, as AWQ, GPTQ and GGUF have them.

w = scale * (q - 8), or scale * q + min with mins; q from 0 to 15; groups of 32, 64 or 128 inputs.

Symmetric: m = the element of largest magnitude, the first on ties; scale = float16(m / -8), so that m has code 0;
q = clip(round_half_even(w / scale) + 8, 0, 15), 8 where the scale is 0.
With mins: scale = float16((max - min) / 15), min = float16(min); q = clip(round_half_even((w - min) / scale), 0, 15),
0 where the scale is 0.
"""

from __future__ import annotations

import numpy as np

from paceline.ops.formats._quantised import Quantised, divisor, largest
from paceline.ops.packed import LANES


def quantise(w: np.ndarray, mins: bool, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if mins:
        low = w.min(-1)
        scales, minima = ((w.max(-1) - low) / np.float32(15)).astype(dtype), low.astype(dtype)
        q = np.rint((w - minima.astype(np.float32)[..., None]) / divisor(scales))
        return np.clip(q, 0, 15, out=q).astype(np.uint8), scales, minima
    scales = (largest(w) / np.float32(-8)).astype(dtype)
    q = np.rint(w / divisor(scales))
    q += 8
    return np.clip(q, 0, 15, out=q).astype(np.uint8), scales, None


def encode(q: np.ndarray) -> np.ndarray:
    """Codes (n, k) -> bytes (n, k / 2): in each block of 64, byte i holds code i low and code 32 + i high."""
    halves = q.reshape(len(q), -1, 2, 32)
    return (halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)).reshape(len(q), -1)


def decode(b: np.ndarray) -> np.ndarray:
    blocks = b.reshape(len(b), -1, 1, 32)
    return np.concatenate([blocks & np.uint8(15), blocks >> np.uint8(4)], axis=2).reshape(len(b), -1)


FORMAT = Quantised(
    name="int4g",
    width=4,
    groups=(32, 64, 128),
    default_group=32,
    with_mins=True,
    dtype=np.dtype(np.uint8),
    tile_k=64,
    tile=(8, LANES, 4),
    code_range=(0, 15),
    quantise=quantise,
    encode=encode,
    decode=decode,
)
