"""Low-rank updates of a program's linears, in plain order, as `Ops.adapter` takes them.

LoRA (arXiv:2106.09685): a linear y = W x gets y + scale * B (A x), where A and B have few rows and columns. A *site* is a linear of the
program; several modules of a checkpoint may be fused in one (q, k, v), so an adapter has any number of updates at a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.ops.packed import LANES


@dataclass(frozen=True)
class LowRank:
    """Columns [col, col + n_out) of a site's result get scale * (x a^T) b^T.

    a (rank, n_in), b (n_out, rank): float32 or bfloat16, both alike; all updates of a site have the same n_in.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    col: int = 0


Sites = Sequence[Sequence[LowRank]]
"""An adapter: its updates at every site of the model."""


def tiled(b: np.ndarray) -> np.ndarray:
    """(n_out, rank) with outputs as the lanes of vectors: (ceil(n_out / LANES), rank, LANES), zeros beyond n_out."""
    n_out, rank = b.shape
    out = np.zeros((-(-n_out // LANES) * LANES, rank), b.dtype)
    out[:n_out] = b
    return np.ascontiguousarray(out.reshape(-1, LANES, rank).transpose(0, 2, 1))


def n_bytes(rank: int, n_in: int, n_out: int, itemsize: int) -> int:
    """Memory that one update takes, scale included."""
    return rank * (n_in * itemsize + -(-n_out // LANES) * LANES * itemsize + 4)
