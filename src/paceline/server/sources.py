"""Where settings come from: flag beats environment variable beats file beats default. Everything wrong is told at once, with its origin.

The file is TOML: `model`, `recipe` and `use` at the top, a table per group of `ServeSettings`, and `[engine]` for the other fields of
`EngineConfig`:

model = "./Llama-3.2-1B"
use = ["serving/radix"]
[engine]
kv_memory = "4GiB"
[listen]
port = 8080
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.core import units
from paceline.core.config import EngineConfig
from paceline.core.errors import ConfigError
from paceline.core.recipe import Recipe
from paceline.server.settings import GROUPS, Declared, Option, ServeSettings, options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
ENGINE_UNITS = {"kv_memory": "bytes", "adapter_memory": "bytes"}


@dataclass(frozen=True)
class Top:
    """The keys above the tables. use: None where nobody named any."""

    model: str | None = None
    recipe: str | None = None
    use: tuple[str, ...] = ()


def _engine() -> dict[str, Option]:
    found = options("engine", EngineConfig)
    del found["use"]  # at the top of the file
    return {k: replace(o, declared=Declared(unit=ENGINE_UNITS.get(k, ""))) for k, o in found.items()}


TABLES: Mapping[str, Mapping[str, Option]] = {
    "": options("", Top),
    "engine": _engine(),
    **{name: options(name, cls) for name, cls in GROUPS.items()},
}


@dataclass(frozen=True)
class Effective:
    """What was asked for, from wherever."""

    top: Top
    engine: EngineConfig
    settings: ServeSettings

    @property
    def config(self) -> EngineConfig:
        """The engine's options with the techniques of the recipe and of `use`. Raises ConfigError on an unreadable recipe."""
        recipe = Recipe.read(Path(self.top.recipe)).use if self.top.recipe else ()
        return replace(self.engine, use=(*recipe, *self.top.use))


class _Found:
    """Values by (group, field) with their origins, and what was wrong on the way."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []

    def put(self, o: Option, raw: Any, origin: str) -> None:
        try:
            self.values[o.group, o.name] = convert(o, raw)
            self.origins[o.name] = origin
        except ConfigError as e:
            self.problems += [f"{p} (from {origin})" for p in e.problems]

    def group(self, name: str, cls: type) -> Any:
        return cls(**{field: value for (group, field), value in self.values.items() if group == name})

    def located(self, problem: str) -> str:
        field = re.match(r"\w+", problem)
        origin = self.origins.get(field[0]) if field else None
        return f"{problem} (from {origin})" if origin else problem


def gather(flags: Mapping[str, Any], environ: Mapping[str, str], path: Path | None = None) -> Effective:
    """The effective settings. flags: those given, by field name, as text (lists and booleans as such).

    Raises ConfigError with everything that is wrong in any of the sources.
    """
    found = _Found()
    if path is not None:
        _from_file(path, found)
    for table in TABLES.values():
        for o in table.values():
            text = environ.get(o.variable, "")
            if text.strip():
                found.put(o, text, o.variable)
    for table in TABLES.values():
        for o in table.values():
            if flags.get(o.name) is not None and flags[o.name] != []:
                found.put(o, flags[o.name], "--" + o.name.replace("_", "-"))
    top, engine = found.group("", Top), found.group("engine", EngineConfig)
    settings = ServeSettings(**{name: found.group(name, cls) for name, cls in GROUPS.items()})
    effective = Effective(top, engine, settings)
    problems = found.problems + [found.located(p) for p in engine.problems() + settings.problems()]
    try:
        _ = effective.config
    except ConfigError as e:
        problems += e.problems
    if problems:
        raise ConfigError(problems)
    return effective


def convert(o: Option, raw: Any) -> Any:
    """A text (flag, variable) or a TOML value as the option's type. Raises ConfigError."""
    unit, seen = o.declared.unit, "a value not shown" if o.declared.secret else repr(raw)
    hint = "; Kubernetes sets it for a service of this name: rename that, or set enableServiceLinks: false"
    hint = hint if isinstance(raw, str) and raw.startswith("tcp://") else ""
    bad = ConfigError(f"{o.name} = {seen}: must be {_wanted(o)}{hint}")
    if o.kind is tuple:
        rows = raw.split() if isinstance(raw, str) else raw
        if not isinstance(rows, (list, tuple)) or not all(isinstance(r, str) for r in rows):
            raise bad
        return tuple(rows)
    if isinstance(raw, str) and o.kind in (int, float):
        if unit == "bytes":
            return units.size(raw, o.name)
        if unit == "seconds":
            return units.seconds(raw, o.name)
        try:
            return o.kind(raw)
        except ValueError:
            raise bad from None
    if isinstance(raw, str) and o.kind is bool:
        raw = _TRUTH.get(raw.strip().lower(), raw)
    if o.kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw)
    if not isinstance(raw, o.kind) or (isinstance(raw, bool) and o.kind is not bool):
        raise bad
    return raw


def _wanted(o: Option) -> str:
    if o.declared.unit:
        return "a size such as 16MiB" if o.declared.unit == "bytes" else "a duration such as 30s"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", tuple: "a list of texts"}[o.kind]


def _from_file(path: Path, found: _Found) -> None:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"config {path}: larger than {_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config {path}: cannot be read: {e}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"config {path}: not valid TOML: {e}") from None
    top = {k: v for k, v in data.items() if k not in TABLES}
    for name, table in [("", top), *((k, v) for k, v in data.items() if k in TABLES)]:
        if not isinstance(table, dict):
            found.problems.append(f"{path}: {name} must be a table, [{name}]")
            continue
        for key, value in table.items():
            where = f"{path}, line {_line(text, name, key)}: {f'[{name}] ' if name else ''}{key}"
            option = TABLES[name].get(key)
            if option is None:
                found.problems.append(f"{where}: unknown key{_near(name, key, isinstance(value, dict))}")
                continue
            found.put(option, value, where)
    if (("access", "api_key") in found.values) and path.stat().st_mode & 0o004:
        found.problems.append(f"{path}: holds api_key and everyone may read it; run: chmod 600 {path}")


def _near(table: str, key: str, is_table: bool) -> str:
    """A suggestion: the very key in another table, else one like it, in the same table first."""
    if is_table:
        close = difflib.get_close_matches(key, [t for t in TABLES if t], 1)
        return (
            f"; did you mean the table [{close[0]}]?"
            if close
            else f"; the tables are {', '.join(t for t in TABLES if t)}"
        )
    tables = (table, *(t for t in TABLES if t != table))
    for name in sorted(tables, key=lambda t: key not in TABLES[t]):
        close = difflib.get_close_matches(key, list(TABLES[name]), 1)
        if close:
            place = f" in [{name}]" if name and name != table else " above the tables" if name != table else ""
            return f"; did you mean {close[0]}{place}?"
    return ""


def _line(text: str, table: str, key: str) -> int:
    """The line that gives the key (of a dotted or inline one: its table's), for messages; 1 where it is not found."""
    here, header = "", 1
    for i, line in enumerate(text.splitlines(), 1):
        if m := re.match(r"\s*\[+\s*([\w.\"-]+)\s*\]+", line):
            here = m[1].strip('"')
            header = i if here in (table, key) else header
        elif here == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return i
    return header


def toml(e: Effective) -> str:
    """The effective settings as a file that `gather` reads back to the same; secrets and unset fields are comments."""
    parts = []
    for name, table in TABLES.items():
        group: Any = e.top if not name else e.engine if name == "engine" else getattr(e.settings, name)
        rows = [_row(o, getattr(group, o.name)) for o in table.values()]
        parts.append("\n".join([*([f"[{name}]"] if name else []), *rows]) + "\n")
    return "\n".join(parts)


def _row(o: Option, value: Any) -> str:
    if o.declared.secret:
        return f"# {o.name}: {len(value)} given, not shown"
    if value is None:
        return f"# {o.name}: not set"
    if o.kind is tuple:
        return f"{o.name} = [{', '.join(_quote(v) for v in value)}]"
    text = shown(o, value)
    return f"{o.name} = {_quote(text) if o.kind is str or o.declared.unit == 'bytes' else text}"


def shown(o: Option, value: Any) -> str:
    """A value as a person writes it on the command line."""
    if o.declared.unit == "bytes":
        power = next((p for p in (3, 2, 1) if value and value % 1024**p == 0), 0)
        return f"{value >> 10 * power}{('', 'KiB', 'MiB', 'GiB')[power]}"
    if o.kind is float:
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if o.kind is bool else str(value)


def _quote(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's, but for DEL."""
    return json.dumps(text).replace("\x7f", "\\u007f")
