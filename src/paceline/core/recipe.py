"""A recipe is a named list of techniques with options, as a TOML file: what is run, served, compared, and what the tuner returns.

name = "long-context"
use = ["serving/radix", "kvcache/snapkv:budget=512"]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.core.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """`use`: technique texts, `area/name:key=value,...`."""

    name: str
    use: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str, source: str) -> Recipe:
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise ConfigError(f"recipe {source}: not valid TOML: {e}") from None
        unknown = sorted(set(data) - {"name", "use"})
        use = data.get("use", [])
        problems = [f"recipe {source}: unknown key {k!r}; a recipe has name and use" for k in unknown]
        if not isinstance(use, list) or not all(isinstance(u, str) for u in use):
            problems.append(f'recipe {source}: use must be a list of strings such as "serving/radix"')
        if problems:
            raise ConfigError(problems)
        return Recipe(str(data.get("name", source)), tuple(use))

    @staticmethod
    def read(path: Path) -> Recipe:
        """Raises ConfigError when the file is missing, too large or malformed."""
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ConfigError(f"recipe {path}: larger than {_MAX_BYTES} bytes")
            return Recipe.parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"recipe {path}: cannot be read: {e}") from None

    def text(self) -> str:
        rows = ",\n  ".join(_quote(u) for u in self.use)
        return f"name = {_quote(self.name)}\nuse = [\n  {rows}\n]\n"


def _quote(s: str) -> str:
    return '"' + s.replace("\\", "\\\\").replace('"', '\\"') + '"'


def merge(defaults: Sequence[str], asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """(defaults that the asked ones do not replace or switch off, asked). `no:area/name` switches a default off."""
    off = {u[3:] for u in asked if u.startswith("no:")}
    wanted = [u for u in asked if not u.startswith("no:")]
    named = {u.split(":")[0] for u in wanted}
    return [d for d in defaults if d.split(":")[0] not in named | off], wanted
