"""GGUF blocks to float32, and the two formats we compute with directly to `Codes`. Equal bit for bit to the `gguf`
package.

A tensor is a sequence of blocks. Small blocks hold 32 values, K blocks 256 with sub-scales; d and m are float16, codes
run in halves (low nibbles first half, high nibbles second half of a run). Formulas (layouts as in ggml's quantisation
structs):

    Q4_0, IQ4_NL  d; 16 bytes of nibbles           d * (q - 8);  d * table[q]
    Q4_1          d m; 16 bytes                    d * q + m
    Q5_0, Q5_1    d (m); 32 high bits; 16 bytes    d * (q - 16);  d * q + m
    Q8_0          d; 32 int8                       d * q
    Q2_K          16 x (4-bit scale, 4-bit min); 64 bytes of 2-bit codes; d dmin        d*s*q - dmin*t
    Q3_K          256 high bits (inverted); 64 bytes; 16 6-bit scales; d                d*(s - 32)*q
    Q4_K, Q5_K    d dmin; 8 x (6-bit scale, 6-bit min); (256 high bits); 128 bytes      d*s*q - dmin*t
    Q6_K          128 bytes low nibbles; 64 bytes of high bit pairs; 16 int8 scales; d  d*s*(q - 32)
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from paceline.ops.packed import Codes

PLAIN: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_CHUNK = 1 << 18  # values at a time, so that the temporaries stay in cache

Blocks = np.ndarray  # uint8 (n_blocks, bytes)


def _half(b: Blocks, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as float32 (n, 1)."""
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(b: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Codes of `bits` bits: bytes (n, k) in runs of `run` -> uint8 (n, k * 8 / bits); a run's lowest bits come
    first, together.
    """
    n = b.shape[0]
    runs = b.reshape(n, -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(n, -1)


def _bits32(b: Blocks, at: int) -> np.ndarray:
    """32 bits from byte `at`, lowest first: uint8 (n, 32)."""
    return np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little")


def _q4_0(b: Blocks) -> np.ndarray:
    return _half(b, 0) * (_fields(b[:, 2:], 16, 4).astype(np.float32) - 8)


def _q4_1(b: Blocks) -> np.ndarray:
    return _half(b, 0) * _fields(b[:, 4:], 16, 4).astype(np.float32) + _half(b, 2)


def _q5_0(b: Blocks) -> np.ndarray:
    q = _fields(b[:, 6:], 16, 4) | (_bits32(b, 2) << np.uint8(4))
    return _half(b, 0) * (q.astype(np.float32) - 16)


def _q5_1(b: Blocks) -> np.ndarray:
    q = _fields(b[:, 8:], 16, 4) | (_bits32(b, 4) << np.uint8(4))
    return _half(b, 0) * q.astype(np.float32) + _half(b, 2)


def _q8_0(b: Blocks) -> np.ndarray:
    return b[:, 2:].view(np.int8).astype(np.float32) * _half(b, 0)


def _iq4_nl(b: Blocks) -> np.ndarray:
    return _half(b, 0) * _IQ4[_fields(b[:, 2:], 16, 4)]


def _q2_k(b: Blocks) -> np.ndarray:
    n = b.shape[0]
    scales = (_half(b, 80) * (b[:, :16] & 15).astype(np.float32)).reshape(n, 16, 1)
    mins = (_half(b, 82) * (b[:, :16] >> 4).astype(np.float32)).reshape(n, 16, 1)
    q = _fields(b[:, 16:80], 32, 2).reshape(n, 16, 16).astype(np.float32)
    return (scales * q - mins).reshape(n, 256)


def _q3_k(b: Blocks) -> np.ndarray:
    n = b.shape[0]
    low = _fields(b[:, 96:104], 8, 4)  # 16 low nibbles of the scales
    high = _fields(b[:, 104:108], 4, 2)  # and their two high bits
    scales = (low | (high << np.uint8(4))).astype(np.float32) - 32
    q = _fields(b[:, 32:96], 32, 2).astype(np.float32) - 4 * (_fields(b[:, :32], 32, 1) ^ 1).astype(np.float32)
    return ((_half(b, 108) * scales).reshape(n, 16, 1) * q.reshape(n, 16, 16)).reshape(n, 256)


def _scales_mins(b: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K's and Q5_K's d*s and dmin*t, (n, 8, 1). Twelve bytes: six bits each of s0-3 and t0-3, whose two top bits
    belong to s4-7 and t4-7, then the nibbles (s low, t high) of those.
    """
    n = b.shape[0]
    s, t, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([s & 63, (rest & 15) | ((s >> 6) << 4)], axis=1).astype(np.float32)
    mins = np.concatenate([t & 63, (rest >> 4) | ((t >> 6) << 4)], axis=1).astype(np.float32)
    return (_half(b, 0) * scales).reshape(n, 8, 1), (_half(b, 2) * mins).reshape(n, 8, 1)


def _q4_k(b: Blocks) -> np.ndarray:
    scales, mins = _scales_mins(b)
    q = _fields(b[:, 16:], 32, 4).reshape(-1, 8, 32).astype(np.float32)
    return (scales * q - mins).reshape(-1, 256)


def _q5_k(b: Blocks) -> np.ndarray:
    scales, mins = _scales_mins(b)
    q = _fields(b[:, 48:], 32, 4) | (_fields(b[:, 16:48], 32, 1) << np.uint8(4))
    return (scales * q.reshape(-1, 8, 32).astype(np.float32) - mins).reshape(-1, 256)


def _q6_k(b: Blocks) -> np.ndarray:
    n = b.shape[0]
    q = _fields(b[:, :128], 64, 4) | (_fields(b[:, 128:192], 32, 2) << np.uint8(4))
    scales = (_half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)).reshape(n, 16, 1)
    return (scales * (q.astype(np.float32) - 32).reshape(n, 16, 16)).reshape(n, 256)


# name -> (values per block, bytes per block, function)
_READERS: dict[str, tuple[int, int, Callable[[Blocks], np.ndarray]]] = {
    "Q4_0": (32, 18, _q4_0), "Q4_1": (32, 20, _q4_1), "Q5_0": (32, 22, _q5_0), "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0), "IQ4_NL": (32, 18, _iq4_nl), "Q2_K": (256, 84, _q2_k), "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k), "Q5_K": (256, 176, _q5_k), "Q6_K": (256, 210, _q6_k),
}  # fmt: skip
BLOCKED = tuple(_READERS)


def dequantise(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 bytes of a tensor of a blocked type -> float32 of `shape`.

    float32 because nothing smaller holds them: a K block's d*s*q - dmin*t has more significant bits than float16 or
    bfloat16.
    """
    values, size, function = _READERS[kind]
    blocks = raw.reshape(-1, size)
    out = np.empty((blocks.shape[0], values), np.float32)
    step = _CHUNK // values
    with np.errstate(invalid="ignore", over="ignore"):  # damaged scales may be infinite; the loader judges the numbers
        for i in range(0, blocks.shape[0], step):
            out[i : i + step] = function(blocks[i : i + step])
    return out.reshape(shape)


def codes(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> Codes | None:
    """A Q4_0, Q4_1 or Q8_0 matrix (n_out, n_in) as `Codes` of group 32. None where `Codes` cannot hold it exactly:
    infinite or NaN scales, the int8 code -128.
    """
    rows, n_in = shape
    blocks = raw.reshape(-1, _READERS[kind][1])
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").reshape(rows, n_in // 32)
    mins = None
    if kind == "Q8_0":
        q = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).reshape(shape)
        if (q == -128).any():
            return None
    else:
        at = 2 if kind == "Q4_0" else 4
        q = np.empty((blocks.shape[0], 32), np.uint8)
        np.bitwise_and(blocks[:, at:], 15, out=q[:, :16])
        np.right_shift(blocks[:, at:], 4, out=q[:, 16:])
        q = q.reshape(shape)
        if kind == "Q4_1":
            mins = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").reshape(rows, n_in // 32)
    if not np.isfinite(scales).all() or (mins is not None and not np.isfinite(mins).all()):
        return None
    return Codes(8 if kind == "Q8_0" else 4, q, scales, mins, 32)
