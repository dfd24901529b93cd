"""`paceline batch`: a file of requests, answered as fast as the machine can."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import JSON, engine_options
from paceline.core.config import EngineConfig


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Use a model")
    @engine_options
    def batch(
        model: str | None,
        config: EngineConfig,
        requests: Path = typer.Argument(..., help="Requests in OpenAI's batch format (JSON lines)."),
        output: Path = typer.Option(
            None, "--output", "-o", help="Answers; default: REQUESTS with .out.jsonl. Goes on where it stopped."
        ),
        at_once: int = typer.Option(None, min=1, max=4096, help="Requests in hand at a time; default: twice max-seqs."),
        json: bool = JSON,
    ) -> None:
        """Answer a file of requests; an interrupted run goes on where it stopped.

        Examples:

          paceline batch requests.jsonl

          paceline batch requests.jsonl -m ./Llama-3.2-1B --format int4 -o answers.jsonl
        """
        from paceline.server import batch as batches

        lines = batches.read(requests)
        target = output or requests.with_suffix(".out.jsonl")
        before = batches.done_before(target)
        todo = batches.tasks([line for line in lines if line.custom_id not in before])
        counts = {"requests": 0, "failed": 0}
        start = time.perf_counter()
        if todo:
            counts = asyncio.run(_run(model, config, todo, target, at_once or 2 * config.max_seqs, quiet=json))
        result = {
            **counts,
            "output": str(target),
            "skipped": len(before),
            "computed_once": sum(len(t.ids) - 1 for t in todo),
            "seconds": time.perf_counter() - start,
        }
        if json:
            show.print_json(result)
        else:
            again = f", {len(before)} answered before" if before else ""
            show.err.print(
                f"{counts['requests']} requests in {result['seconds']:.1f} s, {counts['failed']} failed{again}: {target}",
                highlight=False,
            )
        if counts["failed"]:
            raise typer.Exit(1)


async def _run(
    model: str | None, config: EngineConfig, todo: Any, target: Path, at_once: int, *, quiet: bool
) -> dict[str, int]:
    from paceline.cli.serve import offers
    from paceline.server import batch as batches
    from paceline.server.app import Server, make_app
    from paceline.server.settings import Bounds, Observe, ServeSettings

    bounds = Bounds(max_queue=1 << 20, max_connections=1 << 20, max_body=batches.MAX_LINE)
    settings = ServeSettings(bounds=bounds, observe=Observe(dashboard=False))
    server = Server(offers(model, config, settings), settings)
    await server.start()
    try:
        show.notes(server.models.loaded[server.models.first.names[0]].ready.notes)
        with show.progress(not quiet) as update, target.open("ab") as f:
            told = (lambda done, n: None) if update is None else (lambda done, n: update(done, n, "requests"))
            return await batches.run(make_app(server), todo, f, at_once, told)
    finally:
        await server.models.stop()
