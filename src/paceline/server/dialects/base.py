"""A dialect: how calls of functions are read from a model's text, and written.

`_run` is a generator that reads the text from left to right, once. What it has read and not yet told is held; if it then
raises Malformed, what is held is given back as content, verbatim. So work and memory are linear in the text, whatever
the text is, and none of it is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from paceline.server.dialects.events import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    joined,
)
from paceline.server.dialects.grammar import MAX_CALLS, Form
from paceline.server.dialects.reading import Malformed, Reader, Reading, decoded, object_text

MAX_NAME = 256  # characters


@dataclass
class OpenCall:
    """The call being read. text: arguments not told yet."""

    name: str | None = None
    id: str | None = None
    index: int | None = None  # once it is told
    text: list[str] = field(default_factory=list)
    begun: bool = False  # the arguments are
    complete: bool = False
    ended: bool = False
    nested: bool = False


class Parser:
    """One answer's text to events. A subclass is a dialect: its `_run` reads, its attributes say how calls are written.

    names: the functions that may be called; a call of any other is content. None: any.
    """

    markers: ClassVar[tuple[str, ...]] = ()  # to be seen by the parser even where they are special tokens
    marked: ClassVar[bool] = True  # a marker says that a call comes; else JSON that is no call is an answer like others

    def __init__(self, names: Collection[str] | None = None):
        self._names = None if names is None else frozenset(names)
        self._input = Reader()
        self._kind: type[Content] | type[Reasoning] = Content
        self._strip = False  # whitespace counts only between other texts
        self._told = False
        self._events: list[Event] = []
        self._n_calls = 0
        self._call = OpenCall(ended=True)
        self._steps: Iterable[None] = self._run()

    def push(self, text: str) -> list[Event]:
        """What `text`, the next of the answer, completes."""
        assert not self._input.ended, "text after the end"
        self._input.push(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """What was held back. Nothing may be pushed afterwards."""
        self._input.ended = True
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
        return joined(events)

    def _until(self, marker: str | None) -> Reading[bool]:
        """Tell the text up to `marker`; hold the whitespace before it, and the marker. False when the text ends first."""
        while True:
            at = self._input.text.find(marker, self._input.at) if marker else -1
            if marker and at >= 0:
                self._tell(at)
                self._input.take(len(marker))
                return True
            keep = _overlap(self._input.text, self._input.at, marker) if marker and not self._input.ended else 0
            self._tell(len(self._input.text) - keep)
            if self._input.ended:
                self._give_back()
                return False
            yield

    # --- telling ---

    def _tell(self, end: int) -> None:
        """Tell the text up to `end`, and hold the whitespace that it ends with."""
        piece = self._input.text[self._input.at : end]
        self._input.at = end
        if self._strip and not self._told:
            piece = piece.lstrip()
        body = piece.rstrip()
        if body:
            self._strip, self._told = False, True
            self._events += [self._kind("".join(self._input.held)), self._kind(body)]
            self._input.held.clear()
        if len(body) < len(piece):
            self._input.held.append(piece[len(body) :])

    def _give_back(self) -> None:
        """What is held was no call: as content, or as the rest of a call already told of."""
        text = "".join(self._input.held)
        self._input.held.clear()
        call, self._call = self._call, OpenCall(ended=True)
        if call.index is not None and not call.ended:
            self._tell_arguments(call)
            self._events.append(CallBroken(call.index, text))
        elif text.strip() or not self._strip:
            self._strip, self._told = False, True
            self._events.append(self._kind(text))

    def _tell_arguments(self, call: OpenCall | None = None) -> None:
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
            self._input.held.clear()

    # --- calls ---

    def _object(self) -> Reading[None]:
        """A call {"name": ..., "arguments": {...}}, in any order, or with "parameters"."""
        call = self._call = OpenCall()
        yield from self._members(call)
        if call.ended:
            self._input.held.clear()
            return
        if not self.marked or call.name is None or call.complete:
            raise Malformed
        call.text.append("{}")  # a function without parameters
        call.begun = call.complete = True
        self._settle()

    def _members(self, call: OpenCall) -> Reading[None]:
        yield from self._input.expect("{")
        while True:
            raw: list[str] = []
            yield from self._input.key(raw)
            yield from self._input.space()
            yield from self._member(call, decoded(raw))
            yield from self._input.space()
            if not (yield from self._input.skip(",")):
                break
        yield from self._input.expect("}")

    def _member(self, call: OpenCall, key: str) -> Reading[None]:
        if key == "name":
            raw: list[str] = []
            yield from self._input.string(raw)
            name = decoded(raw)
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
            yield from self._input.value([])
        else:
            raise Malformed

    def _arguments(self, call: OpenCall) -> Reading[None]:
        """An object, or a string with the text of one."""
        if call.begun:
            raise Malformed
        first = yield from self._input.peek()
        if first == "{":
            call.begun = True
            self._settle()
            yield from self._input.value(call.text)
        elif first == '"':
            raw: list[str] = []
            yield from self._input.string(raw)
            call.text.append(object_text(decoded(raw)))
        else:
            raise Malformed
        call.begun = call.complete = True
        self._settle()

    def _list(self) -> Reading[None]:
        """[call, call, ...]"""
        yield from self._input.expect("[")
        while True:
            yield from self._input.space()
            yield from self._object()
            yield from self._input.space()
            if not (yield from self._input.skip(",")):
                break
        yield from self._input.expect("]")
        self._input.held.clear()


def _overlap(text: str, start: int, marker: str) -> int:
    """How many characters at the end of text[start:] may be the beginning of `marker`."""
    for n in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:n]):
            return n
    return 0
