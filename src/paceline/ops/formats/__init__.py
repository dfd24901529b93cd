"""Weight formats, one file each; the file name registers it. `get("int8").pack(w, group=64)` gives a `Packed`.

A format with its options has one text form everywhere: "bf16", "int8:group=64", "int4g:group=32,mins".
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import dataclass
from functools import cache

import numpy as np

from paceline.core.errors import ConfigError
from paceline.ops.formats.base import Arrays, Format
from paceline.ops.packed import Codes, Packed

__all__ = ["Arrays", "Format", "Spec", "get", "names", "nbytes", "pack", "parse", "placeholder"]

ALIASES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@cache
def names() -> tuple[str, ...]:
    """Every format's name, found by walking the folder."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return tuple(sorted(n for n in found if n != "base" and not n.startswith("_")))


@cache
def get(name: str) -> Format:
    """The format of this name. Raises ConfigError when there is none."""
    if name not in names():
        raise ConfigError(f"format = {name!r}: unknown; there are {', '.join(names())}")
    found: Format = importlib.import_module(f"{__name__}.{name}").FORMAT
    assert found.name == name, f"formats/{name}.py names its format {found.name}"
    return found


def pack(w: np.ndarray | Codes, name: str, group: int | None = None, mins: bool = False) -> Packed:
    """`get(name).pack(w, group, mins)`."""
    return get(name).pack(w, group, mins)


@dataclass(frozen=True)
class Spec:
    """A format with its options; `str` gives the text that `parse` reads."""

    name: str
    group: int = 0
    mins: bool = False

    def __str__(self) -> str:
        options = [*([f"group={self.group}"] if self.group else []), *(["mins"] if self.mins else [])]
        if not options and get(self.name).default_group:
            options = ["group=0"]
        return self.name + (":" + ",".join(options) if options else "")

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return get(self.name).bits(self.group, self.mins)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return get(self.name).why_not(shape, self.group, self.mins)

    def arrays(self, shape: tuple[int, int]) -> Arrays:
        return get(self.name).arrays(shape, self.group, self.mins)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed matrix (n_out, n_in), padding included."""
        return sum(math.prod(s) * dtype.itemsize for s, dtype in self.arrays(shape).values())

    def pack(self, w: np.ndarray | Codes) -> Packed:
        return get(self.name).pack(w, self.group, self.mins)


def parse(text: str) -> Spec:
    """`name[:group=N][,mins]`. Raises ConfigError that says what is wrong and what is possible."""
    name, _, rest = text.strip().partition(":")
    name = ALIASES.get(name, name)
    if name not in names():
        raise ConfigError(
            f"format = {text!r}: {name!r} is unknown; use {', '.join(names())}, as in int4g:group=32,mins"
        )
    fmt = get(name)
    group, mins = fmt.default_group, False
    for option in filter(None, rest.split(",")):
        key, _, value = (s.strip() for s in option.partition("="))
        if key == "group" and value.isascii() and value.isdigit():
            group = int(value[:9])
        elif key == "mins" and value in ("", "0", "1"):
            mins = value != "0"
        else:
            raise ConfigError(f"format = {text!r}: option {option!r} is unknown or no number; use group=N or mins")
    if why := fmt.why_not((1, 1), group, mins):
        raise ConfigError(f"format = {text!r}: {why}")
    return Spec(name, group, mins)


def spec(p: Packed) -> Spec:
    return Spec(p.format, p.group, p.mins is not None)


def nbytes(p: Packed) -> int:
    """Bytes of a packed matrix from its shape alone, so that placeholders count too."""
    return spec(p).nbytes(p.shape)


def placeholder(form: Spec, shape: tuple[int, int]) -> Packed:
    """A matrix without data, for counting (ops/count.py). Raises CheckpointError where the format refuses the shape."""
    empty = {name: np.empty(0, dtype) for name, (_, dtype) in form.arrays(shape).items()}
    return Packed(
        form.name, shape, empty["data"], empty.get("scales"), empty.get("mins"), form.group, empty.get("factors")
    )
