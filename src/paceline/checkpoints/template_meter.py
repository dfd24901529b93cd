"""What a chat template may use, counted: steps, characters and time.

The length of a result is paid before it is computed, and a container is paid for by walking it, as often as each part
is reached, because printing or comparing it would do the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, Iterator, KeysView, Sized, ValuesView
from dataclasses import dataclass
from typing import Any

from jinja2.runtime import Undefined
from jinja2.utils import Namespace

from paceline.core.errors import TemplateError

MAX_INT_BITS = 4096
MAX_WIDTH = 10_000  # of padding, indentation and number formats


@dataclass(frozen=True)
class Limits:
    """What one rendering may use. Lengths are characters; a step is one iteration, call, comparison or element
    looked at."""

    seconds: float = 5.0
    source: int = 256 << 10
    output: int = 8 << 20  # of the result, and of any one string on the way
    steps: int = 4_000_000
    characters: int = 256 << 20  # read and written in all


class Meter:
    """Counts down; raises TemplateError at zero and when the time is over."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._steps = limits.steps
        self._characters = limits.characters
        self._end = time.monotonic() + limits.seconds
        self._unseen = 0  # work since the clock was looked at

    def step(self, n: int = 1) -> None:
        self._steps -= n
        if self._steps < 0:
            raise TemplateError(
                f"chat template: takes more than {self.limits.steps:,} steps; it probably loops without end"
            )
        self._work(n)

    def read(self, n: int) -> None:
        """Pay for looking at or writing n characters."""
        self._characters -= n
        if self._characters < 0:
            raise TemplateError(
                f"chat template: handles more than {self.limits.characters:,} characters; it multiplies its text"
            )
        self._work(1 + (n >> 6))

    def write(self, n: int) -> None:
        """Pay for a string of n characters."""
        if n > self.limits.output:
            raise TemplateError(
                f"chat template: makes a text of {n:,} characters, more than the {self.limits.output:,} allowed"
            )
        self.read(n)

    def _work(self, n: int) -> None:
        self._unseen += n
        if self._unseen > 500:
            self._unseen = 0
            if time.monotonic() > self._end:
                raise TemplateError(f"chat template: takes longer than {self.limits.seconds:g} s")

    def elements(self, value: Any) -> Any:
        """Pay for the elements of `value`, at once if it has a length, else one by one."""
        if isinstance(value, Undefined):
            return value
        if isinstance(value, Sized):
            self.step(len(value))
            return value
        return self._each(value) if isinstance(value, Iterator) else value

    def _each(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def drain(self, value: Any) -> Any:
        """A list in place of an iterator, so that it can be weighed."""
        return list(self._each(value)) if isinstance(value, Iterator) else value

    def weigh(self, value: Any) -> tuple[int, int]:
        """Pay for all that `value` holds, as often as it is reached: (elements, characters). A list that holds another
        twice, and so on forty times, ends here and not in its printout."""
        n_elements = n_characters = 0
        stack = [value]
        while stack:
            v = stack.pop()
            n_elements += 1
            if isinstance(v, str):
                n_characters += len(v)
                self.read(len(v))
                continue
            inner = contents(v)
            if inner is not None:
                self.step(len(inner))
                stack.extend(inner)
            elif isinstance(v, int):
                n_characters += small(v).bit_length() // 3
        return n_elements, n_characters

    def text(self, value: Any) -> int:
        """Pay for `str(value)`: an upper bound of its length."""
        if type(value) is str:
            self.read(len(value))
            return len(value)
        n_elements, n_characters = self.weigh(value)
        # Inside a container text is printed escaped, and elements have brackets, commas and names around them.
        bound = n_characters if isinstance(value, str) else 10 * n_characters + 32 * n_elements
        self.write(bound)
        return bound


def contents(v: Any) -> list[Any] | None:
    """The elements of a container, None for anything else."""
    if isinstance(v, dict):
        return [*v.keys(), *v.values()]
    if isinstance(v, (list, tuple, KeysView, ValuesView, ItemsView)):
        return list(v)
    if isinstance(v, Namespace):
        inner: dict[str, Any] = object.__getattribute__(v, "_Namespace__attrs")
        return [*inner.keys(), *inner.values()]
    if isinstance(v, range):
        return [0] * min(len(v), 1 << 17)
    return None


def small(value: int) -> int:
    if value.bit_length() > MAX_INT_BITS:
        raise TemplateError(
            f"chat template: computes with an integer of {value.bit_length()} bits, more than {MAX_INT_BITS}"
        )
    return value


def width_of(value: Any, what: str) -> int:
    if isinstance(value, int) and abs(value) > MAX_WIDTH:
        raise TemplateError(f"chat template: {what} {value} is beyond {MAX_WIDTH}")
    return abs(value) if isinstance(value, int) else 0


NUMBER = re.compile(r"[0-9]+")


def widths_in(spec: str, what: str) -> int:
    """The sum of the numbers in a format; a width taken from an argument is refused."""
    found = [n for n in NUMBER.findall(spec) if len(n) > 5 or int(n) > MAX_WIDTH]
    if found:
        raise TemplateError(f"chat template: {what} asks for a width of {found[0][:20]}, beyond {MAX_WIDTH}")
    return sum(int(n) for n in NUMBER.findall(spec))
