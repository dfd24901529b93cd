"""Token ids to text while they arrive: no character broken, nothing said that a later token would change.

Each way of decoding has a stream that does a bounded amount of work per token, and whose pieces joined equal the
decoding of all ids at once. Byte-level vocabularies are bytes under an incremental UTF-8 decoder. With byte fallback a
run of <0xNN> tokens becomes text only when it is valid as a whole (that is what `tokenizers` does), so a run is held
until the token after it. Other decoders are run on a short window.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tokenizers.decoders import Decoder

from paceline.core.errors import RequestError

if TYPE_CHECKING:
    from paceline.checkpoints.tokenizer import Tokenizer

MAX_STOP = 1024  # characters of one stop string
MAX_STOPS = 256


class Stream(Protocol):
    """The text of one sequence in the making; `push` takes a token as the vocabulary writes it."""

    def push(self, piece: str) -> str: ...

    def finish(self) -> str: ...


class Scheme(Protocol):
    """How a vocabulary writes text."""

    @property
    def joins(self) -> bool:
        """Whether a text is the bytes of its tokens joined, whatever stands beside them."""

    def open(self) -> Stream: ...

    def bytes_of(self, piece: str) -> bytes: ...


class Detokenizer:
    """Incremental `tokenizer.decode`: the pushes and `finish` joined are the text of all ids.

    A push returns only text that no later token can change. One object per sequence.
    show_special: special tokens that are not skipped.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, show_special: Iterable[int] = ()):
        self._piece = tokenizer.piece
        self._skip = tokenizer.special_ids.difference(show_special) if skip_special_tokens else frozenset()
        self._stream = tokenizer.scheme.open()

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        out = []
        for i in ids:
            piece = None if i in self._skip else self._piece(i)
            if piece is not None:
                out.append(self._stream.push(piece))
        return "".join(out)

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD. The object starts over."""
        return self._stream.finish()


def scheme_of(spec: Mapping[str, Any] | None, decoder: Decoder | None) -> Scheme:
    """The scheme of a decoder, given as tokenizer.json writes it and as an object."""
    if spec is None or decoder is None:
        return _Spaced()
    steps = spec.get("decoders", []) if spec.get("type") == "Sequence" else [spec]
    if [s.get("type") for s in steps] == ["ByteLevel"]:
        return _ByteLevel()
    return _fallback(steps) or _Window(decoder)


# --- byte-level BPE ------------------------------------------------------------------------------


def _byte_table() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters stand for themselves, the others for U+0100 onwards in
    order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    return {**{chr(b): b for b in visible}, **{chr(256 + n): b for n, b in enumerate(hidden)}}


_BYTES = _byte_table()


class _ByteLevel:
    joins = True

    def open(self) -> Stream:
        return _ByteStream()

    def bytes_of(self, piece: str) -> bytes:
        return _byte_level(piece)


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_BYTES[c] for c in piece])
    except KeyError:  # an added token, written as it is
        return piece.encode("utf-8")


class _ByteStream:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: str) -> str:
        return self._utf8.decode(_byte_level(piece))

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


# --- byte fallback -------------------------------------------------------------------------------

_HEX = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # the sign because that is how the library parses numbers


@dataclass(frozen=True)
class _Fallback:
    """Replace, ByteFallback and stripping of the first spaces, in the one order in which SentencePiece models use
    them."""

    replace: tuple[tuple[str, str], ...]
    has_bytes: bool
    strip: str
    n_strip: int
    joins: ClassVar[bool] = True  # but for the spaces at the start of a text

    def open(self) -> Stream:
        return _FallbackStream(self)

    def written(self, piece: str) -> str:
        for old, new in self.replace:
            piece = piece.replace(old, new)
        return piece

    def byte(self, piece: str) -> int | None:
        found = _HEX.fullmatch(piece) if self.has_bytes else None
        return int(found[1], 16) if found else None

    def bytes_of(self, piece: str) -> bytes:
        piece = self.written(piece)
        byte = self.byte(piece)
        return piece.encode("utf-8") if byte is None else bytes([byte])


def _fallback(steps: Sequence[Mapping[str, Any]]) -> _Fallback | None:
    """The steps Replace* ByteFallback? Fuse (Strip at the start)?; None for anything else."""
    rest = list(steps)
    replace = []
    while rest and rest[0].get("type") == "Replace" and set(rest[0].get("pattern", {})) == {"String"}:
        step = rest.pop(0)
        if not step["pattern"]["String"]:
            return None
        replace.append((step["pattern"]["String"], step["content"]))
    has_bytes = bool(rest) and rest[0].get("type") == "ByteFallback"
    rest = rest[has_bytes:]
    if not rest or rest.pop(0).get("type") != "Fuse":
        return None
    strip, n_strip = "", 0
    if rest and rest[0].get("type") == "Strip" and rest[0].get("stop") == 0:
        step = rest.pop(0)
        strip, n_strip = step["content"], step["start"]
    return None if rest else _Fallback(tuple(replace), has_bytes, strip, n_strip)


class _FallbackStream:
    def __init__(self, scheme: _Fallback):
        self._scheme = scheme
        self._run = bytearray()
        self._to_strip = scheme.n_strip

    def push(self, piece: str) -> str:
        piece = self._scheme.written(piece)
        byte = self._scheme.byte(piece)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._emit(self._flush() + piece)

    def finish(self) -> str:
        text = self._emit(self._flush())
        self._to_strip = self._scheme.n_strip
        return text

    def _flush(self) -> str:
        """The run of bytes so far: text when it is UTF-8 as a whole, else one U+FFFD for each byte."""
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _emit(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._scheme.strip):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


# --- other decoders ------------------------------------------------------------------------------


class _Spaced:
    """No decoder: tokens with a space between them."""

    joins = False

    def open(self) -> Stream:
        return _SpacedStream()

    def bytes_of(self, piece: str) -> bytes:
        return piece.encode("utf-8")


class _SpacedStream:
    def __init__(self) -> None:
        self._first = True

    def push(self, piece: str) -> str:
        text = piece if self._first else " " + piece
        self._first = False
        return text

    def finish(self) -> str:
        self._first = True
        return ""


@dataclass(frozen=True)
class _Window:
    """Any decoder whose text for a token depends on few neighbours."""

    decoder: Decoder
    n_context: int = 16
    n_pending: int = 16
    joins: ClassVar[bool] = False

    def open(self) -> Stream:
        return _WindowStream(self)

    def bytes_of(self, piece: str) -> bytes:
        return self.decoder.decode([piece]).encode("utf-8")


class _WindowStream:
    """Decodes the last tokens with and without the new ones and emits the difference, once it ends in a whole
    character."""

    def __init__(self, scheme: _Window):
        self._scheme = scheme
        self._context: list[str] = []
        self._pending: list[str] = []

    def push(self, piece: str) -> str:
        self._pending.append(piece)
        before, after = self._texts()
        settled = after.startswith(before) and not after.endswith("\ufffd")
        return self._take(before, after) if settled or len(self._pending) >= self._scheme.n_pending else ""

    def finish(self) -> str:
        text = self._take(*self._texts())
        self._context = []
        return text

    def _texts(self) -> tuple[str, str]:
        decode = self._scheme.decoder.decode
        return decode(self._context), decode(self._context + self._pending)

    def _take(self, before: str, after: str) -> str:
        self._context = (self._context + self._pending)[-self._scheme.n_context :]
        self._pending = []
        return after[len(before) :]


# --- stop strings --------------------------------------------------------------------------------


class StopScanner:
    """Looks for stop strings in text that arrives in parts.

    The match is the stop that is complete first, the longest of those that end at the same place; so the result does
    not depend on where the parts are cut. Text that may be the beginning of a stop is held back, nothing else.

    stops: non-empty strings of at most MAX_STOP characters; include_stop: let the text end with the stop. RequestError
    otherwise.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False):
        if isinstance(stops, str) or len(stops) > MAX_STOPS:
            raise RequestError(f"stop: must be a list of at most {MAX_STOPS} strings")
        for stop in stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP:
                raise RequestError(f"stop: {stop!r:.80} is not a string of 1 to {MAX_STOP} characters")
        self._stops = tuple(stops)
        self._include = include_stop
        self._starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text to emit, and the stop found or None. After a stop nothing more is emitted."""
        if self.matched is not None:
            return "", self.matched
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start], self.matched
        keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if text[-n:] in self._starts), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """The text still held, when the sequence ended without a stop."""
        text, self._held = self._held, ""
        return text
