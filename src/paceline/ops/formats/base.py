"""What a weight format is, and what all of them share: the tile transposition, alignment, and the checks on weights.

Every format stores, for each output, a string of 4-byte words along k (one float32, two halves, four int8, eight int4
codes); a tile is 16 outputs side by side, so packing is one transposition (NB, 16, words) -> (NB, words, 16) whatever
the format. All padding (outputs, k's, groups) is stored as zero bytes. Group statistics are over real elements only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from paceline.core.errors import CheckpointError
from paceline.ops.packed import LANES, Codes, Packed

Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]
"""By field of `Packed` (data, scales, mins, factors): shape and dtype."""

ALIGN = 64  # bytes: a cache line and the widest vector
_CHUNK = 1 << 19  # elements converted and quantised at a time: stays in the second-level cache


class Format(Protocol):
    """How a weight matrix (n_out, n_in) is stored. Immutable; `formats.get(name)` finds it.

    group: input elements that share a scale, 0 for one scale per output, None for `default_group`; float formats take 0
    or None.
    mins: int4g only, store a minimum beside each scale.
    """

    @property
    def name(self) -> str: ...

    @property
    def default_group(self) -> int: ...

    @property
    def quantised(self) -> bool:
        """Whether weights are integer codes with scales (and activations are quantised to meet them)."""

    def why_not(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> str | None:
        """The reason why such a matrix cannot be stored, or None."""

    def bits(self, group: int | None = None, mins: bool = False) -> float:
        """Bits per weight, scales and mins included, padding and scales per output not."""

    def arrays(self, shape: tuple[int, int], group: int | None = None, mins: bool = False) -> Arrays:
        """The arrays of a packed matrix, without any data. Raises CheckpointError where `why_not` has a reason."""

    def pack(self, w: np.ndarray | Codes, group: int | None = None, mins: bool = False) -> Packed:
        """Pack float32, float16 or bfloat16 weights (n_out, n_in), or codes.

        Codes of this format's width are kept exactly when `group` is None or theirs (whether they have mins is theirs
        too); others are dequantised and stored anew. Raises CheckpointError for NaN, infinity and values out of range.
        """

    def unpack(self, p: Packed) -> np.ndarray:
        """float32 (n_out, n_in), exactly the numbers that `p` stands for."""

    def rows(self, p: Packed, ids: np.ndarray) -> np.ndarray:
        """float32 (len(ids), n_in): some rows of `unpack`, reading no others."""

    def codes(self, p: Packed) -> Codes:
        """The codes of a quantised matrix (group 0: scales float32 (n_out, 1)). Raises CheckpointError for floats."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros on a 64-byte boundary."""
    n = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(n + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + n].view(dtype).reshape(shape)


def allocate(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: aligned(shape, dtype) for name, (shape, dtype) in arrays.items()}


def lanes(a: np.ndarray) -> np.ndarray:
    """`data` of any format as 4-byte words (NB, words, 16); scales and mins have that form already."""
    return a.view(np.uint32).reshape(a.shape[0], -1, LANES)


def put(tiled: np.ndarray, row: int, rows: np.ndarray) -> None:
    """Write rows (n, words) of a matrix to the tiles, from output `row` (a multiple of 16) on."""
    n, n_words = rows.shape
    full, block = n // LANES, row // LANES
    tiled[block : block + full, :n_words] = rows[: full * LANES].reshape(full, LANES, n_words).transpose(0, 2, 1)
    if n % LANES:
        tiled[block + full, :n_words, : n % LANES] = rows[full * LANES :].T


def take(tiled: np.ndarray, n_out: int, ids: np.ndarray | None) -> np.ndarray:
    """Rows `ids` (None: all n_out), contiguous (n, words), of a tiled array (NB, words, 16)."""
    if ids is None:
        n_words = tiled.shape[1]
        return np.ascontiguousarray(tiled.transpose(0, 2, 1)).reshape(-1, n_words)[:n_out]
    return np.ascontiguousarray(tiled[ids // LANES, :, ids % LANES])


def chunks(w: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 rows) by blocks of rows, every value finite. Raises CheckpointError."""
    step = max(LANES, _CHUNK // w.shape[1] // LANES * LANES)
    for lo in range(0, w.shape[0], step):
        block = w[lo : lo + step].astype(np.float32)
        if not np.isfinite(block).all():
            raise CheckpointError(not_finite(w))
        yield lo, block


def not_finite(w: np.ndarray) -> str:
    """What to say of weights with NaN or infinite values."""
    n_nan = n_inf = 0
    for row in w:
        row = row.astype(np.float32)
        n_nan += int(np.isnan(row).sum())
        n_inf += int(np.isinf(row).sum())
    return (
        f"weights hold {n_nan} NaN and {n_inf} infinite values of {w.size}: "
        "the file is damaged or its training failed; fetch it again"
    )


def check_matrix(fmt: Format, w: np.ndarray | Codes, group: int | None, mins: bool) -> tuple[int, int]:
    """The shape of what is to be packed. Raises CheckpointError."""
    shape = (w.q if isinstance(w, Codes) else w).shape
    if len(shape) != 2:
        raise CheckpointError(f"a matrix to be packed must have two dimensions, not shape {shape}")
    if why := fmt.why_not(shape, group, mins):
        raise CheckpointError(f"{fmt.name}: {why}")
    if not isinstance(w, Codes) and w.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise CheckpointError(
            f"{fmt.name}: weights of dtype {w.dtype} cannot be packed; give float32, float16, bfloat16"
        )
    return shape


def no_room(shape: tuple[int, ...]) -> str | None:
    """Why a matrix of this shape cannot be packed in any format."""
    if len(shape) != 2 or min(shape) < 1:
        return f"shape {tuple(shape)} must be (n_out, n_in), both at least 1"
    return None


def dequantise(c: Codes) -> np.ndarray:
    """float32 (n_out, n_in): the values of the codes. scale * q and the sum with min are each rounded to float32."""
    n_out, n_in = c.q.shape
    group = c.group or n_in
    out = np.empty((n_out, n_in), np.float32)
    for g in range(ceil_div(n_in, group)):
        k = slice(g * group, (g + 1) * group)
        q = c.q[:, k].astype(np.float32)
        if c.bits == 4 and c.mins is None:
            q -= 8
        out[:, k] = q * c.scales[:, g : g + 1].astype(np.float32)
        if c.mins is not None:
            out[:, k] += c.mins[:, g : g + 1].astype(np.float32)
    return out
