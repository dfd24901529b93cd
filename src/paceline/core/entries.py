"""How the numbers of a KV entry (one head's key or value) are stored in a pool.

Floating point: as they are. int8: `dim` codes in [-127, 127], then the four bytes of their float32 scale, max|x| / 127 (1 for zeros).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import numpy as numpy_xp

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of one number
KINDS = (*FLOATS, "int8")
SCALE_BYTES = 4


def n_items(kind: str, dim: int) -> int:
    """Items of the pool's dtype that an entry takes: the last axis of a pool."""
    return dim + SCALE_BYTES if kind == "int8" else dim


def n_bytes(kind: str, dim: int) -> int:
    """Bytes of an entry."""
    return dim + SCALE_BYTES if kind == "int8" else dim * FLOATS[kind]


def encode(x: Any, kind: str, xp: Any = numpy_xp) -> Any:
    """(..., dim) floats, arrays of `xp`, as items of a pool (..., n_items); other kinds than int8 are left to the assignment."""
    if kind != "int8":
        return x
    scale = xp.astype(xp.max(xp.abs(x), axis=-1, keepdims=True), xp.float32) / 127
    scale = xp.where(scale == 0, xp.ones_like(scale), scale)
    with np.errstate(invalid="ignore"):  # the scale of what is no number is none either
        codes = xp.astype(xp.clip(xp.round(x * xp.astype(1 / scale, x.dtype)), -127, 127), xp.int8)
    return xp.concat([codes, scale.view(xp.int8)], axis=-1)


def decode(items: Any, kind: str, xp: Any = numpy_xp) -> Any:
    """(..., n_items) of a pool as float32 (..., dim)."""
    if kind != "int8":
        return xp.astype(items, xp.float32, copy=False)
    scale = xp.asarray(items[..., -SCALE_BYTES:], copy=True).view(xp.float32)
    return xp.astype(items[..., :-SCALE_BYTES], xp.float32) * scale
