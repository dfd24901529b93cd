"""Techniques, one file each. The path registers it: `techniques/<area>/<name>.py` is `<area>/<name>`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from pathlib import Path

from paceline.core.errors import ConfigError
from paceline.core.technique import Technique

_ROOT = Path(__file__).parent


@cache
def names() -> tuple[str, ...]:
    """Every technique's name, found by walking the folder."""
    found = []
    for area in pkgutil.iter_modules([str(_ROOT)]):
        if area.ispkg and area.name != "parts":
            found += [f"{area.name}/{m.name}" for m in pkgutil.iter_modules([str(_ROOT / area.name)]) if not m.ispkg]
    return tuple(sorted(found))


@cache
def get(name: str) -> type[Technique]:
    """The technique of this name. Raises ConfigError with near matches when there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see `paceline list techniques`"
        raise ConfigError(f"use = {name!r}: no such technique; {hint}")
    module = importlib.import_module(f"{__name__}.{name.replace('/', '.')}")
    own = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Technique) and c.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{name}: a technique file defines exactly one Technique"
    own[0].name = name
    return own[0]
