"""Safetensors files: a hardened reader that maps the data, and a streaming writer.

A file is: header length (8 bytes, little-endian), that many bytes of JSON, the data. The JSON maps each name to
{"dtype", "shape", "data_offsets": [begin, end)} relative to the data, which must be covered without hole or overlap;
"__metadata__" maps strings to strings. (https://github.com/huggingface/safetensors, "Format")
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from paceline.checkpoints.files import AtomicFile, MappedFile, check_space, is_count, parse_json
from paceline.core.errors import CheckpointError

MAX_HEADER = 100_000_000  # the reference implementation's limit
MAX_TENSORS = 1_000_000
MAX_RANK = 8

# bits per element of every dtype a header may name, and what reads it
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_CODES = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8",
          "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}  # fmt: skip
_NUMPY = {**{name: np.dtype(code) for name, code in _CODES.items()}, "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in _NUMPY.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` is its absolute offset in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """A mapped safetensors file. Everything is checked on opening, so that no later read can leave the file."""

    def __init__(self, path: Path):
        self.path = path
        self._map = MappedFile(path)
        try:
            self.entries, self.metadata = _parse(self._map)
        except CheckpointError:
            self._map.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype (bfloat16 by ml_dtypes), a read-only view of the file."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        dtype = _NUMPY.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which is unsupported; convert the "
                "checkpoint to BF16, F16 or F32"
            )
        return self._map.array(entry.start, dtype, entry.shape)

    def release(self) -> None:
        self._map.release()

    def close(self) -> None:
        self._map.close()


def _parse(file: MappedFile) -> tuple[dict[str, Entry], dict[str, str]]:
    path = file.path
    if file.size < 8:
        raise CheckpointError(
            f"{path}: {file.size} bytes are too few for a safetensors file; download or copy it again"
        )
    (length,) = struct.unpack("<Q", file.view(0, 8).tobytes())
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: header length {length} exceeds {MAX_HEADER}; this is not a safetensors file, or it is corrupt"
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{path}: the header is {length} bytes and the file only {file.size}: it is truncated; download or "
            "copy it again"
        )
    header = parse_json(file.view(8, length).tobytes(), f"{path}: header")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: header lists {len(header)} tensors, more than {MAX_TENSORS}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    base = 8 + length
    entries = {name: _entry(path, name, raw, base) for name, raw in header.items()}
    _check_cover(path, entries, base, file.size)
    return entries, metadata


def _entry(path: Path, name: str, raw: Any, base: int) -> Entry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(
            f"{where}: dtype {str(dtype)[:40]!r} is unknown; convert the checkpoint to BF16, F16 or F32"
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(is_count(n) for n in shape):
        raise CheckpointError(f"{where}: shape {str(shape)[:100]} must be at most {MAX_RANK} non-negative integers")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(is_count(o) for o in offsets)
        or offsets[0] > offsets[1]
    ):
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:100]} must be [begin, end] with 0 <= begin <= end")
    bits = _BITS[dtype]
    for n in shape:  # Python integers do not wrap, and the file size bounds the result
        bits *= n
    nbytes = offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} needs {bits / 8:.15g} bytes and data_offsets {offsets} give "
            f"{nbytes}; the file is corrupt"
        )
    return Entry(dtype, tuple(shape), base + offsets[0], nbytes)


def _check_cover(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """The data must be covered exactly: a hole, an overlap or a missing end is corruption (and a way to hide
    content).
    """
    end = base
    for name, e in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if e.start != end:
            what = "overlaps the tensor before it" if e.start < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at data offset {e.start - base} and {what}; the file is corrupt"
            )
        end = e.start + e.nbytes
        if end > size:
            raise CheckpointError(
                f"{path}: tensor {name!r} ends at byte {end} and the file at {size}: it is truncated; download it again"
            )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor; the file is corrupt")


def dtype_name(dtype: np.dtype) -> str:
    """The header's name of a NumPy dtype."""
    if dtype not in _NAMES:
        raise CheckpointError(f"arrays of {dtype} cannot be stored in safetensors")
    return _NAMES[dtype]


class SafetensorsWriter:
    """Writes tensors one at a time; the file appears complete on `finish` or not at all.

    The header comes first in the file but is known last, so `room` bytes are kept for it (padded with spaces, as the
    format allows). Data offsets in the file are multiples of `align`; the gaps are tensors named "__pad__.<n>" of dtype
    U8, since the format knows no holes.
    """

    def __init__(self, path: Path, *, room: int, align: int = 8, metadata: Mapping[str, str] | None = None):
        self._align = align
        self._room = -(-(room + 8) // align) * align - 8
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._header_bytes = len(_dump(self._header)) + 2
        self._end = 0
        self._file = AtomicFile(path)
        self._folder = path.parent
        self._file.write(b"\0" * 8 + b" " * self._room)

    @property
    def nbytes(self) -> int:
        """Bytes of data written so far."""
        return self._end

    def fits(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether the header has room for these too."""
        need = sum(_entry_bytes(name, a) for name, a in arrays.items())
        return self._header_bytes + need <= self._room

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor. Raises CheckpointError on a duplicate name, a full header or a full disk, leaving no
        file.
        """
        try:
            self._add(name, array)
        except BaseException:
            self.abort()
            raise

    def _add(self, name: str, array: np.ndarray) -> None:
        if name in self._header or name == "__metadata__":
            raise CheckpointError(f"tensor {name!r} is written twice")
        if not self.fits({name: array}):
            raise CheckpointError(f"tensor {name!r}: the header's room of {self._room} bytes is used up")
        array = np.asarray(array, order="C")
        entry = {"dtype": dtype_name(array.dtype), "shape": list(array.shape)}
        check_space(self._folder, array.nbytes)
        self._pad()
        self._header[name] = {**entry, "data_offsets": [self._end, self._end + array.nbytes]}
        self._header_bytes += _entry_bytes(name, array)
        self._file.write(array.reshape(-1).view(np.uint8))
        self._end += array.nbytes

    def _pad(self) -> None:
        n = -self._end % self._align
        if n:
            self._header[f"__pad__.{self._end}"] = {
                "dtype": "U8",
                "shape": [n],
                "data_offsets": [self._end, self._end + n],
            }
            self._file.write(b"\0" * n)
            self._end += n

    def finish(self) -> None:
        text = _dump(self._header)
        assert len(text) <= self._room, "the header outgrew its room: _entry_bytes is too small"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text)
        self._file.commit()

    def abort(self) -> None:
        """Remove what was written so far."""
        self._file.abort()


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()


def _entry_bytes(name: str, array: np.ndarray) -> int:
    """At most this many header bytes for a tensor and the padding before it (offsets below 10^15)."""
    return len(json.dumps(name)) + 80 + 21 * array.ndim + 110


def save_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], *, align: int = 8, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a whole file at once, atomically. Raises CheckpointError when there is no room on the disk."""
    room = len(_dump({"__metadata__": dict(metadata or {})})) + 2 + sum(_entry_bytes(n, a) for n, a in arrays.items())
    check_space(path.parent, room + sum(a.nbytes + align for a in arrays.values()))
    writer = SafetensorsWriter(path, room=room, align=align, metadata=metadata)
    for name, array in arrays.items():
        writer.add(name, array)
    writer.finish()
