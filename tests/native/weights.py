"""Packing and the exact meaning of every weight format, written a second time for the tests (NumPy, float64)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from paceline.ops.packed import Packed

FORMATS = (
    [("f32", 0, False), ("f16", 0, False), ("bf16", 0, False), ("int8", 0, False)]
    + [("int8", g, False) for g in (32, 64, 128)]
    + [("int4g", g, mins) for g in (32, 64, 128) for mins in (False, True)]
    + [("int4", 32, False)]
)


def up(n: int, m: int) -> int:
    return -(-n // m) * m


def pad(a: np.ndarray, rows: int, cols: int) -> np.ndarray:
    return np.pad(a, ((0, rows - a.shape[0]), (0, cols - a.shape[1])))


def lanes(a: np.ndarray, per: int) -> np.ndarray:
    """(N, K) -> (N / 16, K / per, 16, per)."""
    n, k = a.shape
    return np.ascontiguousarray(a.reshape(n // 16, 16, k // per, per).transpose(0, 2, 1, 3))


def quantise(w: np.ndarray, bits: int, group: int, mins: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes (N, K), scales and mins (N, G) as ops/formats defines them."""
    n, k = w.shape
    g = w.reshape(n, -1, group or k).astype(np.float32)
    dtype = np.float16 if group else np.float32
    if bits == 8:
        s = (np.abs(g).max(2) / np.float32(127)).astype(dtype)
        q = np.clip(np.rint(g / np.where(s == 0, 1, s).astype(np.float32)[..., None]), -127, 127)
        return np.where(s[..., None] == 0, 0, q).astype(np.int8).reshape(n, k), s, None
    if mins:
        low = g.min(2).astype(np.float16)
        s = ((g.max(2) - g.min(2)) / np.float32(15)).astype(np.float16)
        q = np.clip(
            np.rint((g - low.astype(np.float32)[..., None]) / np.where(s == 0, 1, s).astype(np.float32)[..., None]),
            0,
            15,
        )
        return np.where(s[..., None] == 0, 0, q).astype(np.uint8).reshape(n, k), s, low
    top = np.take_along_axis(g, np.abs(g).argmax(2)[..., None], 2)[..., 0]
    s = (top / np.float32(-8)).astype(np.float16)
    q = np.clip(np.rint(g / np.where(s == 0, 1, s).astype(np.float32)[..., None]) + 8, 0, 15)
    return np.where(s[..., None] == 0, 8, q).astype(np.uint8).reshape(n, k), s, None


def factored(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, K), scales (N, 1) and factors (N, K / 32) of int4: any that are valid will do for the kernels."""
    n, k = w.shape
    g = w.reshape(n, -1, 32).astype(np.float32)
    top = np.abs(g).max(2)
    s = top.max(1, keepdims=True) / np.float32(120)
    f = np.minimum(15, np.ceil(top / np.where(s == 0, 1, s) / 8)) * np.where(g[..., 0] < 0, 1, -1)
    step = (s * f)[..., None]
    q = np.clip(np.rint(g / np.where(step == 0, 1, step)) + 8, 0, 15)
    return q.astype(np.uint8).reshape(n, k), s, f.astype(np.int8)


def pack(w: np.ndarray, fmt: str, group: int = 0, mins: bool = False) -> tuple[Packed, dict[str, np.ndarray]]:
    """The packed matrix, and what it holds in plain order: codes, scales, mins or values."""
    n, k = w.shape
    np_ = up(n, 16)
    if fmt == "f32":
        return Packed(fmt, (n, k), lanes(pad(w, np_, k), 1)[..., 0].copy()), {"values": w}
    if fmt in ("f16", "bf16"):
        v = pad(w, np_, up(k, 32)).astype(np.float16 if fmt == "f16" else ml_dtypes.bfloat16)
        return Packed(fmt, (n, k), lanes(v, 2)), {"values": v[:n, :k].astype(np.float32)}
    kp = up(k, max(64, group))
    factors = None
    if fmt == "int4":
        q, s, factors = factored(pad(w, np_, kp))
        low = None
    else:
        q, s, low = quantise(pad(w, np_, kp), 8 if fmt == "int8" else 4, group, mins)
    data = lanes(q, 4)
    if fmt != "int8":
        blocks = data.reshape(np_ // 16, kp // 64, 16, 16, 4)
        data = np.ascontiguousarray(blocks[:, :, :8] | blocks[:, :, 8:] << 4)
    tile = lambda a: np.ascontiguousarray(a.reshape(np_ // 16, 16, -1).transpose(0, 2, 1))  # noqa: E731
    plain = {"q": q[:n], "scales": s[:n]} | ({} if low is None else {"mins": low[:n]})
    if factors is None:
        return Packed(fmt, (n, k), data, tile(s), None if low is None else tile(low), group), plain
    plain["q"] = (q.astype(int) - 8)[:n] * np.repeat(factors, 32, axis=1)[:n]
    return Packed(fmt, (n, k), data, tile(s), None, group, tile(factors)), plain


def activations(x: np.ndarray, kp: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (M, G, group) and scales (M, G) of dynamic int8 activations."""
    g = np.pad(x, ((0, 0), (0, kp - x.shape[1]))).reshape(x.shape[0], -1, group or kp)
    s = np.abs(g).max(2) / np.float32(127)
    s[s == 0] = 1
    return np.rint(g * (np.float32(1) / s)[..., None]), s


def on_tiles(plain: dict[str, np.ndarray], group: int) -> np.ndarray:
    """int8 in groups as tiles multiply it: rounded to bfloat16, ties away from zero."""
    w = (np.repeat(plain["scales"], group, axis=1).astype(np.float64) * plain["q"]).astype(np.float32)
    return ((w.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def exact(
    x: np.ndarray, fmt: str, plain: dict[str, np.ndarray], group: int, bias: np.ndarray | None, isa: str = ""
) -> np.ndarray:
    """x W^T + bias in float64, with the documented rounding of activations and nothing else rounded."""
    if isa.startswith("amx") and fmt == "int8" and group:
        w = on_tiles(plain, group).astype(np.float64)
        y = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ w[:, : x.shape[1]].T
    elif "values" in plain:
        xr = x.astype(ml_dtypes.bfloat16) if fmt == "bf16" else x
        y = xr.astype(np.float64) @ plain["values"].astype(np.float64).T
    else:
        group = 0 if fmt == "int4" else group
        q = plain["q"].astype(np.float64)
        xq, xs = activations(x, q.shape[1], group)
        w = q.reshape(q.shape[0], -1, group or q.shape[1])
        w = w - (8 if fmt == "int4g" and "mins" not in plain else 0)
        y = np.einsum(
            "mgk,ngk,mg,ng->mn",
            xq.astype(np.float64),
            w,
            xs.astype(np.float64),
            plain["scales"].astype(np.float64),
            optimize=True,
        )
        if "mins" in plain:
            y += np.einsum(
                "mg,mg,ng->mn", xq.sum(2).astype(np.float64), xs.astype(np.float64), plain["mins"].astype(np.float64)
            )
    return y if bias is None else y + bias
