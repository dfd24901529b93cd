"""What a parser tells of an answer, and the whole answer again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from msgspec import Struct


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


def joined(events: list[Event]) -> list[Event]:
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
