"""From 32-bit words of codes, zero points and scales (AWQ, GPTQ) to `Codes`, or to plain numbers where those cannot
say it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.core.errors import CheckpointError
from paceline.ops.packed import Codes

GROUPS = (128, 64, 32)  # what the formats of ops/packed.py take, the cheapest first


def unpack(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """int32 (r, c) -> uint8 (r, c * 32 / bits); field i (from the low end) of a word is its element order[i]
    (default i).
    """
    n = 32 // bits
    out = np.empty((*words.shape, n), np.uint8)
    unsigned = words.view(np.uint32)
    for i in range(n):
        out[..., order[i] if order else i] = (unsigned >> np.uint32(i * bits)) & np.uint32((1 << bits) - 1)
    return out.reshape(words.shape[0], -1)


def check_parts(where: str, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Every part present with the shape that the others and the config imply."""
    for part, shape in expected.items():
        if part not in shapes:
            raise CheckpointError(f"{where}: has no tensor {part!r}; the checkpoint is incomplete, download it again")
        if shapes[part] != shape:
            raise CheckpointError(
                f"{where}.{part}: shape {shapes[part]} must be {shape} by the other parts and "
                "quantization_config; check bits and group_size"
            )


def check_scales(where: str, scales: np.ndarray) -> np.ndarray:
    """The scales as finite float16."""
    with np.errstate(over="ignore"):
        out = scales.astype(np.float16)
    if not np.isfinite(out).all():
        raise CheckpointError(f"{where}: scales hold NaN, infinity or values beyond float16; the checkpoint is damaged")
    return out


def to_codes(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, group: int) -> Codes | np.ndarray:
    """value[k, n] = scales[g, n] * (q[k, n] - zeros[g, n]) with g = k // group, as `Codes` of shape (n, k).

    q (k, n) and zeros (g, n) are uint8, scales (g, n) float16. Gives a float16 array (n, k) where no `Codes` can
    express it: groups that are no multiple of 32, 8 bits with zero points, and the code -128 (our int8 is symmetric).
    """
    n_in = q.shape[0]
    fit = next((g for g in GROUPS if group % g == 0), None)
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    mins = None
    if fit is not None and n_in % group == 0 and bits == 4 and not symmetric:
        with np.errstate(over="ignore"):
            mins = (-scales.astype(np.float32) * zeros).astype(np.float16)
    codes = q if bits == 4 else (q ^ np.uint8(0x80)).view(np.int8)
    if (
        fit is None
        or n_in % group
        or (mins is not None and not np.isfinite(mins).all())
        or (bits == 8 and (not symmetric or bool((q == 0).any())))
    ):
        return dequantise(q, zeros, scales, np.arange(n_in) // group)

    def spread(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.repeat(a, group // fit, axis=0).T)

    return Codes(bits, np.ascontiguousarray(codes.T), spread(scales), None if mins is None else spread(mins), fit)


def dequantise(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """scales[g] * (q - zeros[g]) transposed to (n, k); groups (k,) gives each row's g. float16 (float32 where that
    overflows).
    """
    out = np.empty((q.shape[1], q.shape[0]), np.float32)
    for start in range(0, q.shape[0], 1024):
        rows = slice(start, start + 1024)
        g = groups[rows]
        out[:, rows] = ((q[rows].astype(np.int16) - zeros[g]) * scales[g].astype(np.float32)).T
    return out.astype(np.float16) if np.abs(out).max(initial=0) <= 65504 else out
