"""The options of `paceline serve`, made from the declarations in `server/settings.py` and the engine's options."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from paceline.cli.options import ENGINE
from paceline.server import sources
from paceline.server.settings import Option

PANELS = {
    "": "Model",
    "engine": "Engine",
    "listen": "Listening",
    "access": "Access",
    "bounds": "Bounds",
    "life": "Starting and stopping",
    "observe": "Observing",
    "serving": "Models",
}
CONFIG = "A TOML file of these settings. A flag beats its variable, PACELINE_<FLAG>, which beats the file."
TOP = {
    "model": "Folder, .gguf file, hub name, or an embedded model; default: lab-8m.",
    "recipe": "A recipe file (TOML) of techniques.",
    "use": ENGINE["use"][2],
}


def _flags(o: Option) -> tuple[str, ...]:
    if o.name == "model":
        return ("--model", "-m")
    if o.name in ENGINE:
        return ENGINE[o.name][1]
    flag = "--" + o.name.replace("_", "-")
    return (f"{flag}/--no-{o.name.replace('_', '-')}",) if o.kind is bool else (flag,)


def _parameter(o: Option) -> inspect.Parameter:
    """All values come as text: they are converted, and refused, together with those of the other sources."""
    text = o.declared.help or TOP.get(o.name) or ENGINE[o.name][2]
    if o.default not in (None, (), False, ""):
        text += f" Default: {sources.shown(o, o.default)}."
    metavar = o.declared.unit.upper() or {int: "INTEGER", float: "NUMBER"}.get(o.kind) or "|".join(o.declared.choices)
    kind: Any = bool | None if o.kind is bool else list[str] | None if o.kind is tuple else str | None
    option = typer.Option(
        None,
        *_flags(o),
        help=text,
        metavar=None if o.kind is bool else metavar or "TEXT",
        rich_help_panel=PANELS[o.group],
    )
    return inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def serve_options(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every option of serving; it receives `model: str | None`, `config: EngineConfig`, `settings: ServeSettings`.

    Flag beats environment variable beats `--config` file beats default. `--print-config` prints what would be in force and ends.
    """
    given = {"model", "config", "settings"}
    own = [p for p in inspect.signature(fn).parameters.values() if p.name not in given]
    shared = [
        _parameter(o)
        for table in sources.TABLES.values()
        for o in table.values()
        if o.group != "engine" or o.name in ENGINE
    ]
    config_file = typer.Option(None, "--config", envvar="PACELINE_CONFIG", help=CONFIG)
    print_config = typer.Option(False, "--print-config", help="Print the settings in force as a file, and exit.")
    extra = [
        inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, default=config_file, annotation=Path | None),
        inspect.Parameter("print_config", inspect.Parameter.KEYWORD_ONLY, default=print_config, annotation=bool),
    ]

    @functools.wraps(fn)
    def command(**kwargs: Any) -> Any:
        flags = {p.name: kwargs.pop(p.name) for p in shared}
        effective = sources.gather(flags, os.environ, kwargs.pop("config_file"))
        if kwargs.pop("print_config"):
            typer.echo(sources.toml(effective), nl=False)
            raise typer.Exit
        return fn(model=effective.top.model, config=effective.config, settings=effective.settings, **kwargs)

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([*keyword, *extra, *shared])  # type: ignore[attr-defined]
    return command
