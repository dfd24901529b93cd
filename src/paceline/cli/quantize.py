"""`paceline quantize`: write a quantised checkpoint that loads by mmap."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from paceline.cli import show
from paceline.cli.options import JSON
from paceline.core.config import EngineConfig


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Use a model")
    def quantize(
        model: str = typer.Argument(..., help="Folder, .gguf file, hub name, or an embedded model."),
        out: Path = typer.Argument(..., help="The folder to write; it must not exist."),
        format: str = typer.Option(
            "int4", "--format", "-f", help="int8, int8:group=0 (per channel), int4, int4g:group=64,mins, ..."
        ),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier quantised folder of ours."),
        offline: bool = typer.Option(None, "--offline/--online", help="Never contact the hub."),
        json: bool = JSON,
    ) -> None:
        """Quantise a model's weights by rounding to nearest, and save them as the kernels read them.

        Example: paceline quantize ./Llama-3.2-1B ./Llama-3.2-1B-int4 --format int4g:group=64
        """
        from paceline.quantize import quantize as work

        start = time.perf_counter()
        with show.progress(not json) as update:
            done = work(model, out, EngineConfig(format=format, offline=offline), overwrite=overwrite, progress=update)
        seconds = time.perf_counter() - start
        if json:
            show.print_json({**done, "seconds": seconds})
        else:
            show.out.print(
                f"{out}: {done['formats']}, {show.size(done['bytes'])} "
                f"({done['bits_per_weight']:.2f} bits a weight) in {seconds:.1f} s"
            )
