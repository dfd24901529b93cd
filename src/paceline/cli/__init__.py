"""The command line. Each file of this folder is one command (or group of commands) with a `register(app)`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import typer

from paceline.cli import errors

HELP = """Run open language models fast on your own machine.

Examples:

  paceline run --prompt "What is the capital of France?"

  paceline run --model ./Llama-3.2-1B --format int4 --prompt "Once upon a time" --max-tokens 64

  paceline chat --model user/repo:Q4_K_M

  paceline explain --model ./Llama-3.2-1B --format int8 --context 32768
"""


def make_app() -> typer.Typer:
    app = typer.Typer(
        help=HELP, no_args_is_help=True, add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False
    )
    for module in sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])):
        register = getattr(importlib.import_module(f"{__name__}.{module}"), "register", None)
        if register is not None:
            register(app)

    @app.callback(invoke_without_command=True)
    def top(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            from paceline import __version__

            typer.echo(__version__)
            raise typer.Exit

    return app


def main() -> None:
    """Entry point: exit code 0 done, 1 a fault of ours, 2 the user's to mend, 130 interrupted."""
    sys.exit(errors.guard(make_app()))
