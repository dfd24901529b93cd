"""The adapters of an engine: which are loaded, and what they may take of memory.

An adapter changes what the model computes for the requests that name it (LoRA, arXiv:2106.09685). Sequences hold theirs, so that one
which is unloaded serves those that have begun to their end, and its memory goes with the last of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.core.errors import RequestError

MAX_ADAPTERS = 1024
MAX_NAME = 128
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. digest: of what it computes; n_bytes: memory; sites: the parameters it changes; weights: `Ops.adapter`'s."""

    name: str
    path: str
    digest: str
    rank: int
    n_bytes: int
    sites: frozenset[str]
    weights: Any


Reader = Callable[[str, Path, int], Adapter]
"""Reads the adapter of a name from a folder if it takes at most so many bytes; raises PacelineError subclasses."""


def parse(text: str) -> tuple[str, str]:
    """`name=path` into both."""
    name, _, path = text.partition("=")
    return name, path


def problems(texts: Sequence[str]) -> list[str]:
    """What is wrong with a list of `name=path`."""
    out = []
    names = [parse(text)[0] for text in texts]
    for text, name in zip(texts, names, strict=True):
        if not parse(text)[1]:
            out.append(f"adapters = {text!r}: must be name=path")
        elif (problem := name_problem(name)) is not None:
            out.append(f"adapters = {text!r}: {problem}")
    out += [f"adapters: {name!r} is given more than once" for name in sorted(set(names)) if names.count(name) > 1]
    return out


def name_problem(name: Any) -> str | None:
    if not isinstance(name, str) or not name or len(name) > MAX_NAME or not name.isprintable():
        return f"name = {name!r}: must be 1 to {MAX_NAME} printable characters"
    return None


class Adapters:
    """Loaded adapters by name. `memory`: bytes that all of them may take, those included that only running sequences hold."""

    def __init__(self, read: Reader, memory: int):
        self._read, self.memory = read, memory
        self.loaded: dict[str, Adapter] = {}
        self.sites: frozenset[str] = frozenset()  # of all that were ever loaded: the program has room for these
        self._alive: weakref.WeakSet[Adapter] = weakref.WeakSet()

    @property
    def n_bytes(self) -> int:
        return sum(a.n_bytes for a in self._alive)

    def load(self, name: str, path: str | Path) -> Adapter:
        """Read an adapter. Raises RequestError (name, memory) and CheckpointError (its files); nothing is changed then."""
        if (problem := name_problem(name)) is not None:
            raise RequestError(f"adapter: {problem}")
        if name in self.loaded:
            raise RequestError(f"adapter = {name!r}: is loaded already, from {self.loaded[name].path}; unload it first")
        if len(self.loaded) >= MAX_ADAPTERS:
            raise RequestError(f"adapter = {name!r}: {MAX_ADAPTERS} adapters are loaded; unload one first")
        adapter = self._read(name, Path(path), self.memory - self.n_bytes)
        self.loaded[name] = adapter
        self.sites |= adapter.sites
        self._alive.add(adapter)
        return adapter

    def unload(self, name: str) -> None:
        """New requests cannot name it any more; those being served keep it. Raises RequestError when it is not loaded."""
        if (problem := self.problem(name)) is not None:
            raise RequestError(problem)
        del self.loaded[name]

    def problem(self, name: str) -> str | None:
        """Why a request cannot have this adapter; None if it can."""
        if name in self.loaded:
            return None
        known = ", ".join(sorted(self.loaded)) or "none"
        return f"adapter = {name!r}: is not loaded; loaded are: {known}"
