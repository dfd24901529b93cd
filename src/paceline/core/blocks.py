"""Blocks: what one full page of tokens left in the cache, as bytes that survive the process, and the keys they are found by.

A key is 48 bytes: 16 of the owner, and 32 of a SHA-256 chain over everything the bytes depend on:

    seed   = SHA-256(domain, space, length of salt, salt)      owner = seed[:16]
    hash_i = SHA-256(hash_{i-1}, tokens of page i), hash_{-1} = seed

`space` stands for model, formats and cache layout, `salt` for the identity that may share; so neither different models nor
different identities ever meet. The chain is that of LMCache (arXiv:2510.09665) with pages for chunks. A block repeats its
space, key, parent hash and tokens, all of which are compared on reading: a reader that walks from the first page on has compared
every token, and relies on the hash only to find the bytes.

Layout, little-endian: magic, version, n_tokens, n_payload, space, key, parent, SHA-256 of all other bytes; tokens int32; payload.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"PLKV\r\n\x1a\n"
VERSION = 1
OWNER_BYTES = 16
KEY_BYTES = OWNER_BYTES + 32
_HEADER = struct.Struct("<8sIIQ32s48s32s32s")
_CHECKSUM = slice(_HEADER.size - 32, _HEADER.size)


class BlockError(Exception):
    """Bytes that are not the block that was asked for."""


@dataclass(frozen=True)
class Link:
    """One page in a chain: where it is found, and what it must contain. parent: hash of the page before; tokens: int32, little-endian;
    index: pages before it."""

    key: bytes
    parent: bytes
    tokens: bytes
    index: int

    def next(self, tokens: Sequence[int]) -> Link:
        """The page of these tokens behind this one."""
        return _link(self.key[:OWNER_BYTES], self.key[OWNER_BYTES:], _raw(tokens), self.index + 1)


def seed(space: bytes, salt: str) -> bytes:
    """The start of the chains of one identity."""
    name = salt.encode("utf-8", "surrogatepass")
    return hashlib.sha256(b"paceline kv\0" + space + len(name).to_bytes(8, "little") + name).digest()


def owner(space: bytes, salt: str) -> bytes:
    """What the keys of one identity begin with."""
    return seed(space, salt)[:OWNER_BYTES]


def first(space: bytes, salt: str, tokens: Sequence[int]) -> Link:
    """The first page of a chain."""
    start = seed(space, salt)
    return _link(start[:OWNER_BYTES], start, _raw(tokens), 0)


def chain(space: bytes, salt: str, tokens: Sequence[int], page_size: int) -> Iterator[Link]:
    """The full pages of a text."""
    start = seed(space, salt)
    n = len(tokens) // page_size
    raw, step, parent = _raw(tokens[: n * page_size]), 4 * page_size, start
    for i in range(n):
        link = _link(start[:OWNER_BYTES], parent, raw[i * step : (i + 1) * step], i)
        yield link
        parent = link.key[OWNER_BYTES:]


def size(page_size: int, n_payload: int) -> int:
    """Bytes of a block."""
    return _HEADER.size + 4 * page_size + n_payload


def encode(space: bytes, link: Link, payload: Any) -> bytes:
    """The block of this link; payload: a contiguous buffer."""
    payload = memoryview(payload).cast("B")
    head = (MAGIC, VERSION, len(link.tokens) // 4, payload.nbytes, space, link.key, link.parent)
    checksum = _checksum(_HEADER.pack(*head, b""), link.tokens, payload)
    return b"".join((_HEADER.pack(*head, checksum), link.tokens, payload))


def decode(space: bytes, link: Link, raw: bytes, n_payload: int) -> memoryview:
    """The payload of a block. Raises BlockError when these bytes are damaged or are another block."""
    if len(raw) != _HEADER.size + len(link.tokens) + n_payload:
        raise BlockError(f"{len(raw)} bytes, of {_HEADER.size + len(link.tokens) + n_payload}")
    magic, version, n_tokens, n, of_space, key, parent, checksum = _HEADER.unpack_from(raw)
    if (magic, version) != (MAGIC, VERSION):
        raise BlockError("not a block of this version")
    if of_space != space or key != link.key or parent != link.parent:
        raise BlockError("a block of another model, identity or text")
    body = memoryview(raw)[_HEADER.size :]
    tokens, payload = body[: len(link.tokens)], body[len(link.tokens) :]
    if n_tokens != len(link.tokens) // 4 or n != n_payload or tokens != link.tokens:
        raise BlockError("a block of other tokens")
    if checksum != _checksum(bytes(raw[: _HEADER.size]), tokens, payload):
        raise BlockError("the checksum differs")
    return payload


def _raw(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def _link(owner: bytes, parent: bytes, raw: bytes, index: int) -> Link:
    return Link(owner + hashlib.sha256(parent + raw).digest(), parent, raw, index)


def _checksum(header: bytes, tokens: Any, payload: Any) -> bytes:
    h = hashlib.sha256(header[: _CHECKSUM.start])
    h.update(tokens)
    h.update(payload)
    return h.digest()
