"""int8, symmetric: w = scale * q with q from -127 to 127; one scale per output (group 0) or per group of inputs.

m = max |w| over the group;  scale = m / 127 (rounded to float16 for groups, float32 per output);
q = clip(round_half_even(w / scale), -127, 127), 0 where the scale is 0.
"""

from __future__ import annotations

import numpy as np

from paceline.ops.formats._quantised import Quantised, divisor, largest
from paceline.ops.packed import LANES


def quantise(w: np.ndarray, mins: bool, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, None]:
    scales = (np.abs(largest(w)) / np.float32(127)).astype(dtype)
    q = np.rint(w / divisor(scales))
    return np.clip(q, -127, 127, out=q).astype(np.int8), scales, None


FORMAT = Quantised(
    name="int8",
    width=8,
    groups=(0, 32, 64, 128),
    default_group=32,
    with_mins=False,
    dtype=np.dtype(np.int8),
    tile_k=4,
    tile=(LANES, 4),
    code_range=(-127, 127),
    quantise=quantise,
    encode=lambda q: q,
    decode=lambda q: q,
)
