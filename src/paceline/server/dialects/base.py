"""Reading a model's text as it arrives: content, reasoning and calls of functions.

A dialect's `_run` is a generator that reads the text from left to right, once, and yields when it needs more of it. What
it has read and not yet told is held; if it then raises Malformed, what is held is given back as content, verbatim. So
work and memory are linear in the text, whatever the text is, and none of it is lost.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar, TypeVar

from msgspec import Struct

from paceline.server.dialects.grammar import Form

MAX_CALLS = 128  # of one answer
MAX_DEPTH = 64  # of nested values in arguments
MAX_NAME = 256
MAX_SCALAR = 1024  # characters of one number

T = TypeVar("T")
Reading = Generator[None, None, T]  # a part of `_run`: yields when it needs more text


class Content(Struct, frozen=True):
    """A piece of the answer."""

    text: str


class Reasoning(Struct, frozen=True):
    """A piece of what the model thought before its answer."""

    text: str


class CallStart(Struct, frozen=True):
    """The model calls the function `name`. index: 0, 1, ... in one answer."""

    index: int
    id: str
    name: str


class CallArguments(Struct, frozen=True):
    """A piece of the arguments of call `index`; all joined are the text of one JSON object."""

    index: int
    text: str


class CallEnd(Struct, frozen=True):
    """The arguments of call `index` are complete and valid."""

    index: int


class CallBroken(Struct, frozen=True):
    """Call `index` proved malformed, or the text ended, after some of its arguments were told.

    text: all that was read of it, verbatim. `collect` takes the call back; a stream cannot, and leaves it unfinished.
    """

    index: int
    text: str


Event = Content | Reasoning | CallStart | CallArguments | CallEnd | CallBroken


@dataclass(frozen=True)
class Call:
    """arguments: the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """All of an answer. A broken call is part of the content, where it stood."""

    content: str
    reasoning: str
    calls: list[Call]


def collect(events: Iterable[Event]) -> Answer:
    """The answer that `events`, from the first push to `finish`, tell of."""
    content: list[str] = []
    reasoning: list[str] = []
    starts: dict[int, CallStart] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, CallStart):
            starts[event.index], arguments[event.index] = event, []
        elif isinstance(event, CallArguments):
            arguments[event.index].append(event.text)
        elif isinstance(event, CallBroken):
            del starts[event.index]
            content.append(event.text)
    calls = [Call(s.id, s.name, "".join(arguments[i])) for i, s in starts.items()]
    return Answer("".join(content), "".join(reasoning), calls)


class Malformed(Exception):
    """What looked like a call is none."""


@dataclass
class _Open:
    """The call being read. text: arguments not told yet."""

    name: str | None = None
    id: str | None = None
    index: int | None = None  # once it is told
    text: list[str] = field(default_factory=list)
    begun: bool = False  # the arguments are
    complete: bool = False
    ended: bool = False
    nested: bool = False


_SPACE = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # of a JSON string
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")


class Parser:
    """One answer's text to events. A subclass is a dialect: its `_run` reads, its attributes say how calls are written.

    names: the functions that may be called; a call of any other is content. None: any.
    """

    markers: ClassVar[tuple[str, ...]] = ()  # to be seen by the parser even where they are special tokens
    marked: ClassVar[bool] = True  # a marker says that a call comes; else JSON that is no call is an answer like others

    def __init__(self, names: Collection[str] | None = None):
        self._names = None if names is None else frozenset(names)
        self._text = ""  # what came and is not read, from `_at`
        self._at = 0
        self._ended = False
        self._held: list[str] = []  # read, not told
        self._kind: type[Content] | type[Reasoning] = Content
        self._strip = False  # whitespace counts only between other texts
        self._told = False
        self._events: list[Event] = []
        self._n_calls = 0
        self._call = _Open(ended=True)
        self._steps: Iterable[None] = self._run()

    def push(self, text: str) -> list[Event]:
        """What `text`, the next of the answer, completes."""
        assert not self._ended, "text after the end"
        self._text = self._text[self._at :] + text
        self._at = 0
        return self._advance()

    def finish(self) -> list[Event]:
        """What was held back. Nothing may be pushed afterwards."""
        self._ended = True
        events = self._advance()
        self._steps = ()
        return events

    @staticmethod
    def form(parallel: bool, tokens: Collection[str]) -> Form | None:
        """How a call is written, to constrain one; None: this dialect has none. tokens: the tokenizer's added ones."""
        return None

    @staticmethod
    def call_id(given: str | None = None) -> str:
        """An id for a new call, or `given`, one from anywhere, in a form that the model's template takes."""
        return given or f"call_{secrets.token_hex(12)}"

    def _run(self) -> Reading[None]:
        raise NotImplementedError

    def _advance(self) -> list[Event]:
        for _ in self._steps:
            break
        self._tell_arguments()
        events, self._events = self._events, []
        return _joined(events)

    # --- text ---

    def _more(self) -> Reading[bool]:
        """Whether there is another character; waits for it."""
        while self._at >= len(self._text):
            if self._ended:
                return False
            yield
        return True

    def _peek(self) -> Reading[str]:
        if not (yield from self._more()):
            raise Malformed
        return self._text[self._at]

    def _take(self, n: int) -> str:
        piece = self._text[self._at : self._at + n]
        self._at += n
        self._held.append(piece)
        return piece

    def _space(self, out: list[str] | None = None) -> Reading[None]:
        while (yield from self._more()) and (found := _SPACE.match(self._text, self._at)):
            piece = self._take(found.end() - self._at)
            if out is not None:
                out.append(piece)

    def _skip(self, literal: str) -> Reading[bool]:
        """Read `literal`, if that is what comes."""
        while len(self._text) - self._at < len(literal) and literal.startswith(self._text[self._at :]):
            if self._ended:
                return False
            yield
        if not self._text.startswith(literal, self._at):
            return False
        self._take(len(literal))
        return True

    def _expect(self, literal: str) -> Reading[None]:
        if not (yield from self._skip(literal)):
            raise Malformed

    def _until(self, marker: str | None) -> Reading[bool]:
        """Tell the text up to `marker`; hold the whitespace before it, and the marker. False when the text ends first."""
        while True:
            at = self._text.find(marker, self._at) if marker else -1
            if marker and at >= 0:
                self._tell(at)
                self._take(len(marker))
                return True
            keep = _overlap(self._text, self._at, marker) if marker and not self._ended else 0
            self._tell(len(self._text) - keep)
            if self._ended:
                self._give_back()
                return False
            yield

    # --- telling ---

    def _tell(self, end: int) -> None:
        """Tell the text up to `end`, and hold the whitespace that it ends with."""
        piece = self._text[self._at : end]
        self._at = end
        if self._strip and not self._told:
            piece = piece.lstrip()
        body = piece.rstrip()
        if body:
            self._strip, self._told = False, True
            self._events += [self._kind("".join(self._held)), self._kind(body)]
            self._held.clear()
        if len(body) < len(piece):
            self._held.append(piece[len(body) :])

    def _give_back(self) -> None:
        """What is held was no call: as content, or as the rest of a call already told of."""
        text = "".join(self._held)
        self._held.clear()
        call, self._call = self._call, _Open(ended=True)
        if call.index is not None and not call.ended:
            self._tell_arguments(call)
            self._events.append(CallBroken(call.index, text))
        elif text.strip() or not self._strip:
            self._strip, self._told = False, True
            self._events.append(self._kind(text))

    def _tell_arguments(self, call: _Open | None = None) -> None:
        call = call or self._call
        if call.index is not None and call.text:
            self._events.append(CallArguments(call.index, "".join(call.text)))
            call.text.clear()

    def _settle(self) -> None:
        """Tell what is known of the call now."""
        call = self._call
        if call.name is not None and call.begun and call.index is None:
            if self._n_calls >= MAX_CALLS or not (self._names is None or call.name in self._names):
                raise Malformed
            call.index = self._n_calls
            self._n_calls += 1
            self._events.append(CallStart(call.index, self.call_id(call.id), call.name))
        if call.index is not None and call.complete:
            self._tell_arguments()
            self._events.append(CallEnd(call.index))
            call.ended = self._strip = True
            self._held.clear()

    # --- calls ---

    def _object(self) -> Reading[None]:
        """A call {"name": ..., "arguments": {...}}, in any order, or with "parameters"."""
        call = self._call = _Open()
        yield from self._members(call)
        if call.ended:
            self._held.clear()
            return
        if not self.marked or call.name is None or call.complete:
            raise Malformed
        call.text.append("{}")  # a function without parameters
        call.begun = call.complete = True
        self._settle()

    def _members(self, call: _Open) -> Reading[None]:
        yield from self._expect("{")
        while True:
            raw: list[str] = []
            yield from self._key(raw)
            yield from self._space()
            yield from self._member(call, _decoded(raw))
            yield from self._space()
            if not (yield from self._skip(",")):
                break
        yield from self._expect("}")

    def _member(self, call: _Open, key: str) -> Reading[None]:
        if key == "name":
            raw: list[str] = []
            yield from self._string(raw)
            name = _decoded(raw)
            if call.name is not None or not 0 < len(name) <= MAX_NAME or any("\ud800" <= c <= "\udfff" for c in name):
                raise Malformed
            call.name = name
            self._settle()  # its arguments may have come before
        elif key in ("arguments", "parameters"):
            yield from self._arguments(call)
        elif key == "function" and not call.nested:
            call.nested = True
            yield from self._members(call)
        elif self.marked or key in ("id", "type"):
            yield from self._value([])
        else:
            raise Malformed

    def _arguments(self, call: _Open) -> Reading[None]:
        """An object, or a string with the text of one."""
        if call.begun:
            raise Malformed
        first = yield from self._peek()
        if first == "{":
            call.begun = True
            self._settle()
            yield from self._value(call.text)
        elif first == '"':
            raw: list[str] = []
            yield from self._string(raw)
            call.text.append(_object_text(_decoded(raw)))
        else:
            raise Malformed
        call.begun = call.complete = True
        self._settle()

    def _list(self) -> Reading[None]:
        """[call, call, ...]"""
        yield from self._expect("[")
        while True:
            yield from self._space()
            yield from self._object()
            yield from self._space()
            if not (yield from self._skip(",")):
                break
        yield from self._expect("]")
        self._held.clear()

    # --- JSON (RFC 8259); `out` gets the text read ---

    def _value(self, out: list[str]) -> Reading[None]:
        closers: list[str] = []
        while True:
            yield from self._space(out)
            first = yield from self._peek()
            if first in "{[":
                if len(closers) >= MAX_DEPTH:
                    raise Malformed
                out.append(self._take(1))
                closers.append("}" if first == "{" else "]")
                yield from self._space(out)
                if (yield from self._peek()) != closers[-1]:
                    if first == "{":
                        yield from self._key(out)
                    continue
            elif first == '"':
                yield from self._string(out)
            else:
                yield from self._scalar(out)
            if not (yield from self._after(closers, out)):
                return

    def _after(self, closers: list[str], out: list[str]) -> Reading[bool]:
        """Past what may follow a value; whether another one does."""
        while closers:
            yield from self._space(out)
            if (yield from self._peek()) == closers[-1]:
                out.append(self._take(1))
                closers.pop()
                continue
            yield from self._expect(",")
            out.append(",")
            if closers[-1] == "}":
                yield from self._key(out)
            return True
        return False

    def _key(self, out: list[str]) -> Reading[None]:
        yield from self._space(out)
        yield from self._string(out)
        yield from self._space(out)
        yield from self._expect(":")
        out.append(":")

    def _string(self, out: list[str]) -> Reading[None]:
        """Raw control characters, which models write into code, become escapes."""
        yield from self._expect('"')
        out.append('"')
        while (char := (yield from self._peek())) != '"':
            if found := _PLAIN.match(self._text, self._at):
                out.append(self._take(found.end() - self._at))
            elif char == "\\":
                yield from self._wait(2)
                if self._text[self._at + 1] == "u":
                    yield from self._wait(6)
                if not (found := _ESCAPE.match(self._text, self._at)):
                    raise Malformed
                out.append(self._take(found.end() - self._at))
            else:
                out.append(json.dumps(self._take(1))[1:-1])
        out.append(self._take(1))

    def _wait(self, n: int) -> Reading[None]:
        while len(self._text) - self._at < n:
            if self._ended:
                raise Malformed
            yield

    def _scalar(self, out: list[str]) -> Reading[None]:
        """A number or a name, whole."""
        word = ""
        while (yield from self._more()) and (found := _WORD.match(self._text, self._at)):
            if found.end() - self._at + len(word) > MAX_SCALAR:
                raise Malformed
            word += self._take(found.end() - self._at)
        if not _SCALAR.fullmatch(word):
            raise Malformed
        out.append(word)


class _Text(Parser):
    """Whether a text is a JSON object; `out` is its repaired text."""

    def _run(self) -> Reading[None]:
        self.out: list[str] = []
        self.valid = False
        try:
            yield from self._space()
            if (yield from self._peek()) == "{":
                yield from self._value(self.out)
                yield from self._space()
                self.valid = not (yield from self._more())
        except Malformed:
            pass


def _object_text(text: str) -> str:
    """The text of a JSON object. Raises Malformed if it is none."""
    reader = _Text()
    reader.push(text)
    reader.finish()
    if not reader.valid:
        raise Malformed
    return "".join(reader.out)


def _decoded(raw: list[str]) -> str:
    """The value of a JSON string; of a key with the space and colon that follow it."""
    text: str = json.loads("".join(raw).rstrip(": \t\r\n"))
    return text


def _overlap(text: str, start: int, marker: str) -> int:
    """How many characters at the end of text[start:] may be the beginning of `marker`."""
    for n in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:n]):
            return n
    return 0


def _joined(events: list[Event]) -> list[Event]:
    """The same with neighbouring pieces of text in one."""
    out: list[Event] = []
    for kind, run in groupby(events, key=type):
        if kind is Content or kind is Reasoning:
            text = "".join(e.text for e in run)  # type: ignore[union-attr]
            if text:
                out.append(kind(text))  # type: ignore[call-arg, arg-type]
        else:
            out += run
    return out
