"""API keys: who a key belongs to and what that identity may do; the file they are kept in, hashed.

A key is 256 random bits, so its SHA-256 can be neither inverted nor guessed: salt and slow hashes protect what people choose, which can be
tried word by word, and would cost every request milliseconds. Equal keys, which a salt would hide, do not occur. The file thus gives
nobody access, but who can change it can add keys: it is written with mode 0600 and refused when others may read or change it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import msgspec

from paceline.core.errors import ConfigError
from paceline.server.quota import Quotas

PREFIX = "pk-"
MAX_KEYS = 4096
MAX_PRESENTED = 512  # characters
_MAX_BYTES = 8 << 20

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]


@dataclass(frozen=True)
class Identity:
    """Who asks. The name is the owner in fair scheduling and the salt of the prefix cache: nobody learns by timing what others sent.

    priority: larger goes first. models: those it may use; empty: all. admin: may use the administrative routes.
    """

    name: str
    priority: int = 0
    quotas: Quotas = field(default_factory=Quotas)
    models: tuple[str, ...] = ()
    admin: bool = False

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A key as the file has it. created, expires: seconds since 1970 (UTC). Counts as in `Quotas`; None: unbounded."""

    name: Name
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    created: int
    expires: int | None = None
    priority: Annotated[int, msgspec.Meta(ge=-1000, le=1000)] = 0
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    max_concurrent: Count | None = None
    models: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=256)], ...] = ()
    admin: bool = False

    def identity(self) -> Identity:
        quotas = Quotas(self.requests_per_minute, self.tokens_per_minute, self.tokens_per_day, self.max_concurrent)
        return Identity(self.name, self.priority, quotas, self.models, self.admin)


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[Record, ...]
    version: int = 1


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def make(name: str, now: float | None = None, **options: Any) -> tuple[str, Record]:
    """A new key and its record. Raises ConfigError on a bad name or option."""
    key = new_key()
    row = {"name": name, "sha256": digest(key).hex(), "created": int(time.time() if now is None else now), **options}
    try:
        return key, msgspec.convert(row, Record)
    except msgspec.ValidationError as e:
        raise ConfigError(f"key {name!r}: {e}") from None


Signature = tuple[int, int, int]  # of a file's state: time of change (ns), size, inode


def signature(path: Path) -> Signature | None:
    """None where there is no such file."""
    try:
        s = path.stat()
    except OSError:
        return None
    return s.st_mtime_ns, s.st_size, s.st_ino


def read(path: Path) -> tuple[Record, ...]:
    """The records of a key file. Raises ConfigError when it is missing, too open, too large or malformed."""
    try:
        with path.open("rb") as f:
            _refuse_open_file(path, os.fstat(f.fileno()))
            raw = f.read(_MAX_BYTES + 1)
    except OSError as e:
        raise ConfigError(
            f"keys file {path}: cannot be read: {e.strerror}; make one with `paceline keys create`"
        ) from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"keys file {path}: larger than {_MAX_BYTES} bytes")
    try:
        found = msgspec.json.decode(raw, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"keys file {path}: {e}") from None
    names = [r.name for r in found.keys]
    twice = sorted(n for n, count in Counter(names).items() if count > 1)
    problems = [f"keys file {path}: {n!r} is there twice; remove one" for n in twice]
    if len({r.sha256 for r in found.keys}) < len(set(names)):
        problems.append(f"keys file {path}: two names have the same key; revoke one")
    if found.version != 1:
        problems.append(f"keys file {path}: version {found.version} is not known; this Paceline reads version 1")
    if len(names) > MAX_KEYS:
        problems.append(f"keys file {path}: {len(names)} keys, at most {MAX_KEYS} are allowed")
    if problems:
        raise ConfigError(problems)
    return found.keys


def _refuse_open_file(path: Path, s: os.stat_result) -> None:
    """Group may read (mounted secrets are often so), others nothing; nobody but the owner may write."""
    if os.name == "posix" and s.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(
            f"keys file {path}: mode {stat.S_IMODE(s.st_mode):04o} lets others read or change it; run: chmod 600 {path}"
        )


def write(path: Path, records: Sequence[Record]) -> None:
    """Replace the file as a whole, mode 0600: a reader sees the old keys or the new ones. Raises ConfigError."""
    text = msgspec.json.format(msgspec.json.encode(KeyFile(tuple(records))), indent=2) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise ConfigError(f"keys file {path}: cannot be written: {e.strerror}") from None


def read_plain(path: Path) -> tuple[str, ...]:
    """Keys as they are, one a line; empty lines and lines that begin with # do not count. Raises ConfigError."""
    try:
        with path.open("rb") as f:
            _refuse_open_file(path, os.fstat(f.fileno()))
            text = f.read(1 << 20).decode("ascii")
    except OSError as e:
        raise ConfigError(f"api_key_file {path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file {path}: keys are ASCII") from None
    found = tuple(k for line in text.splitlines() if (k := line.strip()) and not k.startswith("#"))
    if not found or any(not 8 <= len(k) <= MAX_PRESENTED or " " in k for k in found):
        raise ConfigError(f"api_key_file {path}: must hold keys of 8 to {MAX_PRESENTED} characters, one a line")
    return found


class Keyring:
    """The keys in force. plain: given at start, all with the same rights; path: a key file, read again when it changes.

    A file that became unreadable or malformed leaves the keys read before in force, and `warn` is told; one that is gone takes its keys
    with it. Raises ConfigError when the file cannot be read at the start.
    """

    def __init__(
        self,
        plain: Sequence[str] = (),
        path: Path | None = None,
        wall: Callable[[], float] = time.time,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self.path, self.wall, self.warn = path, wall, warn
        names = [f":key-{i + 1}" for i in range(len(plain))]  # no key of a file can be called so
        self._plain = [(digest(k), Identity(n), None) for k, n in zip(plain, names, strict=True)]
        self._signature: Signature | None = None
        self._kept: list[tuple[bytes, Identity, int | None]] = []
        if path is not None:
            self._signature = signature(path)
            self._kept = self._load(path)

    def _load(self, path: Path) -> list[tuple[bytes, Identity, int | None]]:
        return [(bytes.fromhex(r.sha256), r.identity(), r.expires) for r in read(path)]

    def refresh(self) -> None:
        """Look whether the file changed (one stat)."""
        if self.path is None or (now := signature(self.path)) == self._signature:
            return
        self._signature = now
        try:
            self._kept = self._load(self.path) if now is not None else []
        except ConfigError as e:
            self.warn(f"{e}; the keys read before stay in force")
        if now is None:
            self.warn(f"keys file {self.path}: is gone, and its keys with it")

    def find(self, presented: str) -> Identity | None:
        """Whose key it is, unless it has expired. The time taken does not depend on which key, or how much of one, agrees."""
        if len(presented) > MAX_PRESENTED:
            return None
        asked, found = digest(presented), None
        for known, identity, expires in (*self._plain, *self._kept):
            if hmac.compare_digest(asked, known):
                found = (identity, expires)
        if found is None or (found[1] is not None and self.wall() >= found[1]):
            return None
        return found[0]


def day(t: int | None) -> str:
    """A time as people read it, UTC."""
    return "" if t is None else datetime.fromtimestamp(t, timezone.utc).strftime("%Y-%m-%d %H:%M")
