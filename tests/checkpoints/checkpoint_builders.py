"""Files made byte by byte, independent of the readers and writers under test."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header (bytes, or an object to dump) and data; `length` overrides the header's length field."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensors_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A valid file of float32, float16, int32 or uint8 arrays."""
    names = {"float32": "F32", "float16": "F16", "int32": "I32", "uint8": "U8", "float64": "F64", "bfloat16": "BF16"}
    header, data = {}, b""
    for name, a in arrays.items():
        header[name] = {
            "dtype": names[a.dtype.name],
            "shape": list(a.shape),
            "data_offsets": [len(data), len(data) + a.nbytes],
        }
        data += np.ascontiguousarray(a).tobytes()
    return safetensors_bytes(header, data)


def write_folder(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(tensors_bytes(arrays))
    return folder


U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(kind: int, value: Any) -> bytes:
    """A metadata value; arrays are (element kind, values)."""
    if isinstance(value, bytes) and kind != STRING:
        return value  # given raw
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(gguf_value(element, v) for v in values)
    return struct.pack("<" + _CODES[kind], value)


def gguf_bytes(
    keys: list[tuple[str, int, Any]],
    tensors: list[tuple[str, list[int], int, int]],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file; tensors are (name, extents innermost first, type id, offset)."""
    out = magic + struct.pack("<I", version)
    out += struct.pack("<QQ", len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    for key, kind, value in keys:
        out += gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, value)
    for name, extents, kind, offset in tensors:
        out += gguf_string(name) + struct.pack("<I", len(extents)) + struct.pack(f"<{len(extents)}Q", *extents)
        out += struct.pack("<IQ", kind, offset)
    out += b"\0" * (-len(out) % alignment)
    return out + data


def llama_keys(**changes: tuple[int, Any]) -> list[tuple[str, int, Any]]:
    """Metadata of a llama with one layer, width 32, 2 heads; `changes` replace or add keys (dots as __)."""
    keys: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (U32, 1),
        "llama.embedding_length": (U32, 32),
        "llama.context_length": (U32, 64),
        "llama.feed_forward_length": (U32, 64),
        "llama.attention.head_count": (U32, 2),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    }
    keys |= {k.replace("__", "."): v for k, v in changes.items()}
    return [(k, *v) for k, v in keys.items()]


def small_gguf(**changes: tuple[int, Any]) -> bytes:
    """A valid file: the keys of `llama_keys` and one F32 matrix token_embd (4, 32)."""
    data = np.arange(128, dtype="<f4").tobytes()
    return gguf_bytes(llama_keys(**changes), [("token_embd.weight", [32, 4], 0, 0)], data)
