"""One GGUF file (versions 2 and 3): header, metadata and tensor table, every number checked before it is used.

magic "GGUF", u32 version, u64 tensor count, u64 key count; then the keys (string, u32 type, value), the tensors
(string, u32 rank, u64 extents innermost first, u32 type, u64 offset), padding to `general.alignment`, the data.
Little-endian. (GGUF specification: github.com/ggml-org/ggml, docs/gguf.md)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paceline.checkpoints.files import MappedFile
from paceline.core.errors import CheckpointError

MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 16
MAX_NAME = 1 << 16  # bytes of a key or a tensor name, as in the specification
MAX_STRING = 16 << 20  # bytes of a string value; chat templates stay below 100 kB
MAX_ARRAY = 1 << 24  # elements of an array; vocabularies stay below 2^19
MAX_ALIGNMENT = 1 << 20
MAX_RANK = 4
MAX_DEPTH = 4  # of nested arrays

# type id -> (name, values per block, bytes per block)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 30: ("BF16", 1, 2),
}  # fmt: skip
_REFUSED = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
            23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
            39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY, _U32 = 7, 8, 9, 4


@dataclass(frozen=True)
class GgufTensor:
    """shape is in NumPy order (outermost first); `start` is the absolute offset in bytes."""

    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufFile:
    """A mapped GGUF file."""

    def __init__(self, path: Path):
        self.path = path
        self._map = MappedFile(path)
        try:
            self.metadata, self.tensors = _Parser(self._map).parse()
        except CheckpointError:
            self._map.close()
            raise

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, a view."""
        t = self.tensors[name]
        return self._map.view(t.start, t.nbytes)

    def array(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The tensor as plain numbers of `dtype` in its shape, a view where aligned."""
        t = self.tensors[name]
        return self._map.array(t.start, dtype, t.shape)

    def release(self) -> None:
        self._map.release()

    def close(self) -> None:
        self._map.close()


class _Parser:
    def __init__(self, file: MappedFile):
        self.path, self.size = file.path, file.size
        self.data = memoryview(file.view(0, file.size))  # type: ignore[arg-type]
        self.pos = 0
        self.types: dict[str, int] = {}

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def take(self, n: int, what: str) -> int:
        """The position of the next n bytes, which are skipped."""
        if n > self.size - self.pos:
            raise self.fail(
                f"ends inside {what} (byte {self.pos} of {self.size}): it is truncated or corrupt; download it again"
            )
        start, self.pos = self.pos, self.pos + n
        return start

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, limit: int) -> str:
        n = self.scalar("Q", what)
        if n > limit:
            raise self.fail(f"{what} is {n} bytes long, more than {limit}; the file is corrupt")
        start = self.take(n, what)
        try:
            return str(self.data[start : start + n], "utf-8")
        except UnicodeDecodeError as e:
            raise self.fail(f"{what} is not UTF-8 ({e.reason} at byte {e.start}); the file is corrupt") from e

    def count(self, what: str, limit: int, min_bytes: int) -> int:
        """A u64 count of things that take at least min_bytes each, so that the file's size bounds it too."""
        n = self.scalar("Q", what)
        if n > limit:
            raise self.fail(f"{what} = {n} exceeds {limit}; the file is corrupt")
        if n * min_bytes > self.size - self.pos:
            raise self.fail(
                f"{what} = {n} cannot fit in the remaining {self.size - self.pos} bytes; it is truncated or corrupt"
            )
        return n

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        self.check_version()
        n_tensors = self.count("the tensor count", MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
        n_keys = self.count("the metadata count", MAX_KEYS, 8 + 4 + 1)
        metadata = self.keys(n_keys)
        alignment = self.alignment(metadata)
        table = self.table(n_tensors)
        base = -(-self.pos // alignment) * alignment
        return metadata, self.place(table, base, alignment)

    def check_version(self) -> None:
        if self.size < 24 or bytes(self.data[:4]) != b"GGUF":
            raise self.fail("is not a GGUF file (it does not begin with 'GGUF'), or it is truncated")
        self.pos = 4
        version = self.scalar("I", "the version")
        if version & 0xFFFF == 0 and version:
            raise self.fail("is a big-endian GGUF file, which is not supported; take the little-endian one")
        if version not in (2, 3):
            raise self.fail(
                f"GGUF version {version} is not supported (2 and 3 are); convert the model again with a recent "
                "llama.cpp"
            )

    def keys(self, n: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for i in range(n):
            key = self.string(f"the name of metadata key {i}", MAX_NAME)
            if key in out:
                raise self.fail(f"metadata key {key[:200]!r} occurs twice; the file is corrupt")
            self.types[key] = kind = self.scalar("I", f"the type of {key[:200]!r}")
            out[key] = self.value(kind, key[:200], 0)
        return out

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self.string(f"metadata {key!r}", MAX_STRING)
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        if kind not in _SCALARS:
            raise self.fail(f"metadata {key!r} has the unknown type {kind}; the file is corrupt")
        return self.scalar(_SCALARS[kind], f"metadata {key!r}")

    def array(self, key: str, depth: int) -> list[Any]:
        what = f"metadata array {key!r}"
        if depth > MAX_DEPTH:
            raise self.fail(f"{what} is nested more than {MAX_DEPTH} deep; the file is corrupt")
        kind = self.scalar("I", what)
        if kind == _ARRAY:
            n = self.count(f"the length of {what}", 1024, 12)
            return [self.array(key, depth + 1) for _ in range(n)]
        if kind == _STRING:
            n = self.count(f"the length of {what}", MAX_ARRAY, 8)
            return self.strings(n, what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has the unknown element type {kind}; the file is corrupt")
        dtype = np.dtype("u1" if kind == _BOOL else "<" + _SCALARS[kind])
        n = self.count(f"the length of {what}", MAX_ARRAY, dtype.itemsize)
        start = self.take(n * dtype.itemsize, what)
        values = np.frombuffer(self.data, dtype, n, start)
        return (values != 0).tolist() if kind == _BOOL else values.tolist()

    def strings(self, n: int, what: str) -> list[str]:
        """As `string` n times; written out because vocabularies have hundreds of thousands."""
        out, data, pos, size, u64 = [], self.data, self.pos, self.size, struct.Struct("<Q").unpack_from
        try:
            for _ in range(n):
                (length,) = u64(data, pos)
                end = pos + 8 + length
                if length > MAX_STRING or end > size:
                    raise self.fail(f"{what}: a string of {length} bytes leaves the file; it is truncated or corrupt")
                out.append(str(data[pos + 8 : end], "utf-8"))
                pos = end
        except struct.error as e:
            raise self.fail(f"ends inside {what}: it is truncated or corrupt; download it again") from e
        except UnicodeDecodeError as e:
            raise self.fail(f"{what}: string {len(out)} is not UTF-8 ({e.reason}); the file is corrupt") from e
        self.pos = pos
        return out

    def alignment(self, metadata: dict[str, Any]) -> int:
        n = metadata.get("general.alignment", 32)
        if self.types.get("general.alignment", _U32) != _U32 or not 0 < n <= MAX_ALIGNMENT or n & (n - 1):
            raise self.fail(
                f"general.alignment = {str(n)[:40]}: must be a UINT32, a power of two up to {MAX_ALIGNMENT}; the "
                "file is corrupt"
            )
        return int(n)

    def table(self, n: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """(name, type, shape, nbytes, offset)"""
        out = []
        for i in range(n):
            name = self.string(f"the name of tensor {i}", MAX_NAME)
            what = f"tensor {name[:200]!r}"
            rank = self.scalar("I", what)
            if not 1 <= rank <= MAX_RANK:
                raise self.fail(f"{what}: rank {rank} is not in 1..{MAX_RANK}; the file is corrupt")
            extents = [self.scalar("Q", what) for _ in range(rank)]
            kind, offset = self.scalar("I", what), self.scalar("Q", what)
            type_name, nbytes = self.measure(what, extents, kind)
            out.append((name, type_name, tuple(reversed(extents)), nbytes, offset))
        return out

    def measure(self, what: str, extents: list[int], kind: int) -> tuple[str, int]:
        """The type's name and the tensor's bytes."""
        if kind in _REFUSED:
            raise self.fail(
                f"{what} has type {_REFUSED[kind]}, which is not supported; take this model as Q4_K_M, Q8_0, BF16 "
                "or F16"
            )
        if kind not in TYPES:
            raise self.fail(f"{what} has the unknown type {kind}; the file is corrupt or newer than this program")
        name, block, block_bytes = TYPES[kind]
        count = 1
        for n in extents:  # Python integers do not wrap; the size of the file bounds the product
            count *= n
            if n == 0 or count > self.size * block:
                raise self.fail(
                    f"{what}: extents {extents} do not fit in a file of {self.size} bytes; it is truncated or corrupt"
                )
        if extents[0] % block:
            raise self.fail(
                f"{what}: its rows of {extents[0]} values are no multiple of {name}'s block of {block}; the file "
                "is corrupt"
            )
        return name, count // block * block_bytes

    def place(
        self, table: list[tuple[str, str, tuple[int, ...], int, int]], base: int, alignment: int
    ) -> dict[str, GgufTensor]:
        out: dict[str, GgufTensor] = {}
        end, last = 0, ""
        for name, kind, shape, nbytes, offset in sorted(table, key=lambda t: t[4]):
            what = f"tensor {name[:200]!r}"
            if name in out:
                raise self.fail(f"{what} occurs twice; the file is corrupt")
            if offset % alignment:
                raise self.fail(
                    f"{what}: offset {offset} is no multiple of the alignment {alignment}; the file is corrupt"
                )
            if offset < end:
                raise self.fail(f"{what}: offset {offset} lies inside tensor {last[:200]!r}; the file is corrupt")
            if base + offset + nbytes > self.size:
                raise self.fail(
                    f"{what} ends at byte {base + offset + nbytes} and the file at {self.size}: it is truncated; "
                    "download it again"
                )
            end, last = offset + nbytes, name
            out[name] = GgufTensor(kind, shape, base + offset, nbytes)
        return out
