"""Files as checkpoints use them: mapped for reading, replaced as a whole for writing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from paceline.core.errors import CheckpointError

SAMPLE = 1 << 20
MAX_JSON = 64 << 20  # bytes of config.json, of an index, ...; real ones stay below 10 MB


class MappedFile:
    """A regular file mapped read-only. Views stay valid after `close`; the pages go when the last view does."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open_regular(path)
        self.size = os.fstat(self._file.fileno()).st_size
        if self.size == 0:
            self._file.close()
            raise CheckpointError(f"{path}: the file is empty; download or copy it again")
        try:
            self._mmap = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._mmap, dtype=np.uint8)
        except (OSError, ValueError) as e:
            self._file.close()
            raise CheckpointError(f"{path}: cannot be mapped into memory ({e})") from e

    def view(self, start: int, n_bytes: int) -> np.ndarray:
        """uint8 view of n_bytes from `start`. Refuses when the file has shrunk since: touching such pages would kill
        us.
        """
        if self._file.closed:
            raise CheckpointError(f"{self.path}: the checkpoint is closed")
        if os.fstat(self._file.fileno()).st_size < self.size:
            raise CheckpointError(f"{self.path}: the file was truncated while in use; restore it and load it again")
        if start < 0 or n_bytes < 0 or start + n_bytes > self.size:
            raise CheckpointError(
                f"{self.path}: bytes {start}..{start + n_bytes} lie outside the file ({self.size} bytes)"
            )
        return self._bytes[start : start + n_bytes]

    def array(self, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A read-only view as `dtype`; a copy only where the file does not align the data."""
        count = int(np.prod(shape, dtype=np.int64))
        raw = self.view(start, count * dtype.itemsize)
        if raw.ctypes.data % dtype.alignment:
            raw = raw.copy()
        return raw.view(dtype).reshape(shape)

    def release(self) -> None:
        """Give back the memory of all pages read so far; views stay valid and read them again when touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mmap.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._file.close()


def open_regular(path: Path) -> IO[bytes]:
    """Open for reading; directories, pipes and devices are refused (opening a pipe would wait for ever)."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        return path.open("rb")
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read ({e})") from e


def sampled_digest(config: dict[str, Any], paths: Iterable[Path]) -> str:
    """Tells checkpoints and versions of them apart in a moment: SHA-256, in hex, of the config, and of the name, size and first, middle
    and last MiB of each file. Headers are in it; a change of weights that keeps all of these would go unnoticed.
    """
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in paths:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            found.update(f"{path.name}:{size}".encode())
            for at in (0, size // 2, max(0, size - SAMPLE)):
                f.seek(at)
                found.update(f.read(SAMPLE))
    return found.hexdigest()


def parse_json(text: bytes | bytearray | memoryview, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; anything else is a CheckpointError that starts with `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"duplicate key {twice[:200]!r}")
        return out

    try:
        value = json.loads(bytes(text).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{where}: is not valid JSON ({str(e)[:300]}); download or write the file again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must be a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    with open_regular(path) as f:
        text = f.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise CheckpointError(f"{path}: larger than {MAX_JSON >> 20} MiB, which no such file is")
    return parse_json(text, str(path))


def is_count(value: Any) -> bool:
    """A non-negative integer that fits an int64 (JSON's true and 1.0 are not)."""
    return type(value) is int and 0 <= value < 1 << 62


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises CheckpointError unless the file system of `folder` has n_bytes free."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise CheckpointError(
            f"{folder}: writing needs {n_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; free some space "
            "or choose another folder"
        )


class AtomicFile:
    """A file that appears complete or not at all: written beside its place, synced, then renamed.

    As a context manager it commits on success and leaves nothing after an error. OSErrors become CheckpointErrors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._temp = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            self._file = self._temp.open("wb")
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be written ({e})") from e

    def write(self, data: bytes | np.ndarray) -> None:
        try:
            self._file.write(memoryview(data))  # type: ignore[arg-type]
        except OSError as e:
            self.abort()
            raise _unwritten(self.path, e) from e

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def commit(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temp, self.path)
        except OSError as e:
            self.abort()
            raise _unwritten(self.path, e) from e

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # the buffered rest cannot be written either, and is not wanted
            self._file.close()
        self._temp.unlink(missing_ok=True)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


def _unwritten(path: Path, e: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: writing failed ({e.strerror or e}); nothing was left behind; free some space and try again"
    )


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):  # some network file systems refuse; the data files themselves are synced
        os.fsync(fd)
    os.close(fd)


def some(names: Iterable[str], n: int = 5) -> str:
    """The first names, for a message."""
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
