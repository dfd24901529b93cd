"""A tier of KV blocks in files, which later processes find again.

One file a block, `<owner>/<hash>.kv`, written under another name and renamed, so that a block is there whole or not at all; a process that
is killed leaves at most a temporary file, which the next sweep removes. The folder itself is the index: nothing else can be out of step
with it, and several processes may share it. A file's modification time is when it was last used; when the files exceed the limit, those
unused for longest go until a tenth is free. Readers check what they read (`core/blocks.py`), so nothing is synced: what a power
failure tears is dropped. A full or failing disk pauses writing, and nothing else. LMCache, arXiv:2510.09665, local disk backend.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.core.blocks import KEY_BYTES, OWNER_BYTES
from paceline.core.errors import ConfigError
from paceline.core.technique import Fact, Manifest, Technique, tune
from paceline.core.tier import FETCH, Tier
from paceline.techniques.parts.pause import Pause
from paceline.techniques.parts.prefixes import why_no_prefix

MIB = 1 << 20
HOUR = 3600.0
SUFFIX = ".kv"
STALE = 600.0  # seconds after which a temporary file is nobody's
STEP = 1.0  # seconds that a page seems to have been used before the page before it: texts are given up from their ends
MAX_FILES = 1 << 20
ROOM = 0.9  # of the limit is left by a sweep
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def default_folder() -> Path:
    """$XDG_CACHE_HOME/paceline/kv, ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "paceline" / "kv"


def private_folder(folder: Path) -> Path:
    """The folder, made if need be, open to nobody else. Raises ConfigError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"path = {str(folder)!r}: is not a folder; choose another")
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise ConfigError(f"path = {str(folder)!r}: belongs to another user; choose a folder of your own")
        if hasattr(os, "getuid") and found.st_mode & 0o077:
            raise ConfigError(
                f"path = {str(folder)!r}: others may enter it; `chmod 700` it, since it holds what users wrote"
            )
    except OSError as e:
        raise ConfigError(f"path = {str(folder)!r}: cannot be used ({e.strerror or e}); choose another") from None
    return folder


@dataclass(frozen=True)
class _File:
    used: float  # seconds since the epoch
    n_bytes: int
    path: str
    key: bytes


class DiskStore:
    """Blocks as files of at most `n_bytes` bytes in all, unused for at most `max_age` seconds. Raises ConfigError for the folder."""

    name = "disk"
    near = True
    ahead = True

    def __init__(self, folder: Path, n_bytes: int, max_age: float):
        self.folder = private_folder(folder)
        self.capacity, self.max_age = n_bytes, max_age
        self.pinned: Set[bytes] = frozenset()
        self.pause = Pause(f"writing KV blocks to {folder}", 60, HOUR)
        self._lock = threading.Lock()
        self._n_files = self._n_bytes = 0  # as of the last sweep, and our own since
        self._sweep()

    @property
    def accepts(self) -> bool:
        return not self.pause.active

    def has(self, key: bytes) -> bool:
        return os.path.exists(self._path(key))

    def find(self, keys: list[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if not self.has(key)), len(keys))

    def get(self, key: bytes, n_bytes: int) -> bytes | None:
        path = self._path(key)
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | _FLAGS), "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if self._is_old(found.st_mtime, key) or not stat.S_ISREG(found.st_mode):
                    self.delete(key)
                    return None
                return _read(file, min(found.st_size, n_bytes + 1))
        except OSError:  # not there, or being replaced, or damaged: all the same to the caller
            return None

    def touch(self, key: bytes, index: int) -> None:
        used = time.time() - STEP * index
        with contextlib.suppress(OSError):
            os.utime(self._path(key), (used, used))

    def put(self, key: bytes, raw: bytes) -> list[tuple[bytes, bytes]]:
        if not self.accepts:
            return [(key, raw)]
        if self._n_bytes + len(raw) > self.capacity:
            self._sweep(len(raw))
            if self._n_bytes + len(raw) > self.capacity:  # all the rest is pinned
                return [(key, raw)]
        path = self._path(key)
        temporary = f"{path}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            _write(temporary, raw)
            os.replace(temporary, path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            self.pause.failed(e.strerror or str(e))
            return [(key, raw)]
        self.pause.worked()
        with self._lock:
            self._n_files += 1
            self._n_bytes += len(raw)
        return []

    def delete(self, key: bytes) -> bool:
        path = self._path(key)
        try:
            n_bytes = os.lstat(path).st_size
            os.unlink(path)
        except OSError:
            return False
        with self._lock:  # never below zero: another process may have written it
            self._n_files, self._n_bytes = max(0, self._n_files - 1), max(0, self._n_bytes - n_bytes)
        return True

    def keys(self, owner: bytes | None) -> Iterable[bytes]:
        return [file.key for file in self._files() if file.key.startswith(owner or b"")]

    def stats(self) -> dict[str, Any]:
        """As of the last sweep, but for what this process wrote since."""
        return {
            "n_blocks": self._n_files,
            "n_bytes": self._n_bytes,
            "capacity": self.capacity,
            "paused": self.pause.why if self.pause.active else None,
        }

    def close(self) -> None:
        pass

    # within

    def _path(self, key: bytes) -> str:
        return f"{self.folder}/{key[:OWNER_BYTES].hex()}/{key[OWNER_BYTES:].hex()}{SUFFIX}"

    def _is_old(self, used: float, key: bytes) -> bool:
        return time.time() - used > self.max_age and key not in self.pinned

    def _files(self) -> Iterator[_File]:
        """Every block in the folder; temporary files that nobody can be writing any more are removed on the way."""
        n = 0
        for owner in _scan(self.folder):
            n += 1
            if not owner.is_dir(follow_symlinks=False):
                continue
            for entry in _scan(owner.path):
                n += 1
                if n > MAX_FILES:
                    return
                try:
                    found = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                key = _key(owner.name, entry.name)
                if key is not None and stat.S_ISREG(found.st_mode):
                    yield _File(found.st_mtime, found.st_size, entry.path, key)
                elif entry.name.endswith(".tmp") and time.time() - found.st_mtime > STALE:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)

    def _sweep(self, n_more: int = 0) -> None:
        """Delete what is too old, and the least recently used until `n_more` bytes fit well; then folders of owners with nothing left."""
        files = sorted(self._files(), key=lambda f: f.used)
        total = sum(f.n_bytes for f in files)
        limit = self.capacity - n_more
        target = limit if total <= limit else min(limit, int(ROOM * self.capacity))
        n_left = len(files)
        for file in files:
            if self._is_old(file.used, file.key) or (total > target and file.key not in self.pinned):
                with contextlib.suppress(OSError):
                    os.unlink(file.path)
                total -= file.n_bytes
                n_left -= 1
        with self._lock:
            self._n_files, self._n_bytes = n_left, total
        for owner in list(itertools.islice(_scan(self.folder), MAX_FILES)):
            with contextlib.suppress(OSError):  # it is not empty, or no folder; one that a writer wants is made again
                if len(owner.name) == 2 * OWNER_BYTES:
                    os.rmdir(owner.path)


def _scan(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:
        return


def _key(owner: str, name: str) -> bytes | None:
    """The key of a file's name, None for other files."""
    try:
        key = bytes.fromhex(owner) + bytes.fromhex(name[: -len(SUFFIX)])
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES and name.endswith(SUFFIX) and len(owner) == 2 * OWNER_BYTES else None


def _read(file: Any, n_bytes: int) -> bytes:
    parts, left = [], n_bytes
    while left > 0 and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write(path: str, raw: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
    for left in (2, 1, 0):
        try:
            descriptor = os.open(path, flags, 0o600)
            break
        except FileNotFoundError:  # the owner's first block, or another process has just removed the empty folder
            if not left:
                raise
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        view = memoryview(raw)
        while view:
            view = view[file.write(view) :]


@dataclass(frozen=True)
class Disk(Technique):
    path: str = tune("", help="folder, open to nobody else; by default paceline/kv in the user's cache folder")
    size_mib: int = tune(8192, 1, 1 << 30, log=True, help="MiB that blocks may take on disk")
    max_age_h: float = tune(168.0, 0.001, 1e6, log=True, help="hours after their last use that blocks are kept")
    fetch: str = tune(
        "measured", choices=FETCH, help="bring blocks back when that is quicker than computing, always or never"
    )
    through: bool = tune(
        True, help="write blocks when they are computed, so that they outlive the process however it ends"
    )

    def manifest(self) -> Manifest:
        return Manifest(frozenset({"kv_tier"}), needs=frozenset({Fact.PREFIX_PURE}), paper="2510.09665")

    def why_not(self, context: Any) -> str | None:
        return why_no_prefix(context)

    def build(self, context: Any) -> Tier:
        folder = Path(self.path).expanduser() if self.path else default_folder()
        return Tier(DiskStore(folder, self.size_mib * MIB, self.max_age_h * HOUR), self.fetch, self.through)
