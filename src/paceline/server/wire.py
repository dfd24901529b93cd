"""Messages between the front process and a worker, and how they lie on the socket.

A frame is a length (uint32, little-endian) and a msgpack body of one of the types below: typed, bounded, and without any code in it.
Times are those of the monotonic clock, which processes of one machine share.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from paceline.core.config import EngineConfig
from paceline.core.engine import Serving
from paceline.core.types import Delta, Request, Resumed, Timing, TokenLogprob

MAX_FRAME = 1 << 30
_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, tag=True, array_like=True):
    """Base of all messages."""


# ---- front to worker


class Start(Message):
    """The first message: what to load."""

    model: str | None
    config: EngineConfig


class Submit(Message):
    """Serve a request; resumed: what its completions had before a worker was lost."""

    request: Request
    resumed: tuple[Resumed, ...] = ()


class Abort(Message):
    id: str


class Ask(Message):
    """A question or an order besides requests (`worker.VERBS`); answered by Told of the same id."""

    id: int
    verb: str
    arguments: dict[str, Any] = {}  # msgspec copies defaults


class Stop(Message):
    """End now; also what the end of the socket means."""


# ---- worker to front


class Loading(Message):
    done: int
    total: int
    title: str


class Ready(Message):
    """The model is loaded. plan: `Plan.describe()`."""

    serving: Serving
    plan: dict[str, Any]
    notes: tuple[str, ...]
    fingerprint: str
    load_s: float
    adapters: dict[str, str] = {}  # digests by name


class Failed(Message):
    """The model cannot be served as asked: a user's error, all of its problems."""

    kind: str
    problems: tuple[str, ...]


class Ended(Message):
    """A request came to its end; error: why it could not be served to it."""

    id: str
    n_cached: int = 0
    n_preempted: int = 0
    timing: Timing = Timing()
    error: str | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    pooled: bytes | None = None  # float32 (d_model,): the sum or the last of the hidden states


class Refused(Message):
    """A request was not taken in."""

    id: str
    message: str


class Gauge(Message):
    """How the engine stands. counters: totals since its start, by name."""

    n_running: int
    n_waiting: int
    kv_used: float  # share of pages in use, 0 to 1
    counters: dict[str, float]
    rows: int = 0  # of the last step


class Stepped(Message):
    """What one step brought."""

    deltas: list[Delta]
    ended: list[Ended]
    gauge: Gauge | None = None


class Told(Message):
    """The answer to Ask; error: what was wrong with it."""

    id: int
    result: Any = None
    error: str | None = None


ToWorker = Start | Submit | Abort | Ask | Stop
ToFront = Loading | Ready | Failed | Refused | Stepped | Told


class Codec:
    """Encodes any message; decodes those of one direction."""

    TO_WORKER: ClassVar[Any] = ToWorker
    TO_FRONT: ClassVar[Any] = ToFront

    def __init__(self, incoming: Any):
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def frame(self, message: Message) -> bytes:
        """A message as it goes onto the socket."""
        buffer = bytearray(_LENGTH.size)
        self._encoder.encode_into(message, buffer, _LENGTH.size)
        _LENGTH.pack_into(buffer, 0, len(buffer) - _LENGTH.size)
        return bytes(buffer)

    def decode(self, body: bytes) -> Any:
        return self._decoder.decode(body)


def length(header: bytes) -> int:
    """Bytes of the body that follows a header. Raises ValueError for one that no message has."""
    (n,) = _LENGTH.unpack(header)
    if not 0 < n <= MAX_FRAME:
        raise ValueError(f"a frame of {n} bytes")
    return int(n)


HEADER = _LENGTH.size


def receive(sock: socket.socket, codec: Codec) -> Any:
    """The next message of a blocking socket; None at its end."""
    header = _exactly(sock, HEADER)
    body = None if header is None else _exactly(sock, length(header))
    return None if body is None else codec.decode(body)


def _exactly(sock: socket.socket, n: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < n:
        piece = sock.recv(min(n - len(parts), 1 << 20))
        if not piece:
            return None
        parts += piece
    return bytes(parts)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A description as msgpack can carry it: what is no plain data becomes text."""
    done: dict[str, Any] = msgspec.to_builtins(values, enc_hook=str)
    return done
