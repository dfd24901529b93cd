"""Text that arrives in pieces, read once from left to right by generators that yield when they need more of it."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import TypeVar

MAX_DEPTH = 64  # of nested values
MAX_SCALAR = 1024  # characters of one number

T = TypeVar("T")
Reading = Generator[None, None, T]  # a reader's part: yields when it needs more text


class Malformed(Exception):
    """What looked like a call is none."""


_SPACE = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # of a JSON string
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")


class Reader:
    """text[at:] is what came and is not read; held, what was read and is neither told nor forgotten."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.at = 0
        self.ended = False
        self.held: list[str] = []

    def push(self, text: str) -> None:
        self.text = self.text[self.at :] + text
        self.at = 0

    def more(self) -> Reading[bool]:
        """Whether there is another character; waits for it."""
        while self.at >= len(self.text):
            if self.ended:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        if not (yield from self.more()):
            raise Malformed
        return self.text[self.at]

    def take(self, n: int) -> str:
        piece = self.text[self.at : self.at + n]
        self.at += n
        self.held.append(piece)
        return piece

    def space(self, out: list[str] | None = None) -> Reading[None]:
        while (yield from self.more()) and (found := _SPACE.match(self.text, self.at)):
            piece = self.take(found.end() - self.at)
            if out is not None:
                out.append(piece)

    def skip(self, literal: str) -> Reading[bool]:
        """Read `literal`, if that is what comes."""
        while len(self.text) - self.at < len(literal) and literal.startswith(self.text[self.at :]):
            if self.ended:
                return False
            yield
        if not self.text.startswith(literal, self.at):
            return False
        self.take(len(literal))
        return True

    def expect(self, literal: str) -> Reading[None]:
        if not (yield from self.skip(literal)):
            raise Malformed

    # --- JSON (RFC 8259); `out` gets the text read ---

    def value(self, out: list[str]) -> Reading[None]:
        closers: list[str] = []
        while True:
            yield from self.space(out)
            first = yield from self.peek()
            if first in "{[":
                if len(closers) >= MAX_DEPTH:
                    raise Malformed
                out.append(self.take(1))
                closers.append("}" if first == "{" else "]")
                yield from self.space(out)
                if (yield from self.peek()) != closers[-1]:
                    if first == "{":
                        yield from self.key(out)
                    continue
            elif first == '"':
                yield from self.string(out)
            else:
                yield from self.scalar(out)
            if not (yield from self.after(closers, out)):
                return

    def after(self, closers: list[str], out: list[str]) -> Reading[bool]:
        """Past what may follow a value; whether another one does."""
        while closers:
            yield from self.space(out)
            if (yield from self.peek()) == closers[-1]:
                out.append(self.take(1))
                closers.pop()
                continue
            yield from self.expect(",")
            out.append(",")
            if closers[-1] == "}":
                yield from self.key(out)
            return True
        return False

    def key(self, out: list[str]) -> Reading[None]:
        yield from self.space(out)
        yield from self.string(out)
        yield from self.space(out)
        yield from self.expect(":")
        out.append(":")

    def string(self, out: list[str]) -> Reading[None]:
        """Raw control characters, which models write into code, become escapes."""
        yield from self.expect('"')
        out.append('"')
        while (char := (yield from self.peek())) != '"':
            if found := _PLAIN.match(self.text, self.at):
                out.append(self.take(found.end() - self.at))
            elif char == "\\":
                yield from self.wait(2)
                if self.text[self.at + 1] == "u":
                    yield from self.wait(6)
                if not (found := _ESCAPE.match(self.text, self.at)):
                    raise Malformed
                out.append(self.take(found.end() - self.at))
            else:
                out.append(json.dumps(self.take(1))[1:-1])
        out.append(self.take(1))

    def wait(self, n: int) -> Reading[None]:
        while len(self.text) - self.at < n:
            if self.ended:
                raise Malformed
            yield

    def scalar(self, out: list[str]) -> Reading[None]:
        """A number or a name, whole."""
        word = ""
        while (yield from self.more()) and (found := _WORD.match(self.text, self.at)):
            if found.end() - self.at + len(word) > MAX_SCALAR:
                raise Malformed
            word += self.take(found.end() - self.at)
        if not _SCALAR.fullmatch(word):
            raise Malformed
        out.append(word)


def decoded(raw: list[str]) -> str:
    """The value of a JSON string, or of a key, which has a colon behind it."""
    text: str = json.loads("".join(raw).rstrip(": \t\r\n"))
    return text


def object_text(text: str) -> str:
    """`text` with its control characters escaped, if it is a JSON object. Raises Malformed if it is none."""
    reader = Reader(text.strip())
    reader.ended = True
    out: list[str] = []
    for _ in reader.value(out):
        raise AssertionError("waits for text after its end")
    if reader.at < len(reader.text) or not out[0].startswith("{"):
        raise Malformed
    return "".join(out)
