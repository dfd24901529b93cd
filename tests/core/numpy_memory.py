"""The backend memory that the cache's tests run on: plain NumPy pools, written and read through slots."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from paceline.core.kvcache import KVCache, SeqKV

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


class NumpyMemory:
    """As `Ops`: empty, move, numpy. `far`: what `numpy` gives is a copy, as of a device's memory."""

    def __init__(self, far: bool = False):
        self.far = far
        self.n_moves = 0

    def empty(self, shape, dtype):
        return np.full(shape, -1 if dtype == "int8" else np.nan, DTYPES[dtype])

    def move(self, pool, src, dst):
        assert src.dtype == np.int64
        assert dst.dtype == np.int64
        assert len(set(dst.tolist())) == len(dst)
        self.n_moves += 1
        size = pool.shape[2]
        pool[dst // size, :, dst % size] = pool[src // size, :, src % size]

    def numpy(self, x):
        return x.copy() if self.far else x


def content(cache: KVCache, group: int, layer: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values (n, heads, dim) that stand for `values` (n,) in a layer: all different from one another."""
    g = cache.groups[group]
    lane = layer * 64 + np.asarray(g.heads)[:, None] * 8 + np.arange(g.spec.dim)
    k = np.asarray(values, np.float64)[:, None, None] * 1024 + lane
    return k.astype(np.float32), (k + 0.5).astype(np.float32)


def write(cache: KVCache, group: int, slots: np.ndarray, values: np.ndarray) -> None:
    """What a forward pass does: each layer's keys and values into the rows' slots."""
    g = cache.groups[group]
    page, offset = slots // g.page_size, slots % g.page_size
    for i, layer in enumerate(g.layers):
        k, v = content(cache, group, layer, values)
        cache.k[group][i][page, :, offset] = k
        cache.v[group][i][page, :, offset] = v


def append(cache: KVCache, kv: SeqKV, positions: np.ndarray, values: np.ndarray, rows=None) -> bool:
    """Reserve, write and settle; False when there was no room."""
    slots = cache.reserve(kv, positions)
    if slots is None:
        return False
    for g in range(len(cache.groups)):
        write(cache, g, np.array(slots[g], np.int64), values)
    cache.settle(kv, rows)
    return True
