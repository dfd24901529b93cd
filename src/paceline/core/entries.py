"""How the numbers of a KV entry (one head's key or value) are stored in a pool.

Floating point: as they are. int8: `dim` codes in [-127, 127], then the four bytes of their float32 scale, max|x| / 127 (1 for zeros).
"""

from __future__ import annotations

import numpy as np

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of one number
KINDS = (*FLOATS, "int8")
SCALE_BYTES = 4


def n_items(kind: str, dim: int) -> int:
    """Items of the pool's dtype that an entry takes: the last axis of a pool."""
    return dim + SCALE_BYTES if kind == "int8" else dim


def n_bytes(kind: str, dim: int) -> int:
    """Bytes of an entry."""
    return dim + SCALE_BYTES if kind == "int8" else dim * FLOATS[kind]


def encode(x: np.ndarray, kind: str) -> np.ndarray:
    """(..., dim) floats as items of a pool (..., n_items)."""
    if kind != "int8":
        return x
    scale = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    with np.errstate(invalid="ignore"):  # the scale of what is no number is none either
        codes = np.clip(np.rint(x * (1 / scale)), -127, 127).astype(np.int8)
    return np.concatenate([codes, scale.view(np.int8)], axis=-1)


def decode(items: np.ndarray, kind: str) -> np.ndarray:
    """(..., n_items) of a pool as float32 (..., dim)."""
    if kind != "int8":
        return items.astype(np.float32, copy=False)
    scale = np.ascontiguousarray(items[..., -SCALE_BYTES:]).view(np.float32)
    return items[..., :-SCALE_BYTES].astype(np.float32) * scale
