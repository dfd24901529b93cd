"""`paceline bench`: how fast a model or a shape is here, and what share of the machine that is."""

from __future__ import annotations

import time
from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import JSON, engine_options
from paceline.core.config import EngineConfig


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Understand")
    @engine_options
    def bench(
        model: str | None,
        config: EngineConfig,
        shape: str = typer.Option(
            None, help="Random weights in a shape: smollm2-135m, qwen3-0.6b, llama-3.2-1b, or a config.json."
        ),
        prefill: list[int] = typer.Option([512, 2048], help="Prompt lengths. Repeatable."),
        batch: list[int] = typer.Option([1, 8, 32], help="Sequences decoding at once. Repeatable."),
        prompt: int = typer.Option(128, help="Prompt length before decoding."),
        tokens: int = typer.Option(32, help="Tokens decoded per sequence."),
        runs: int = typer.Option(3, help="Repetitions; the median counts."),
        json: bool = JSON,
    ) -> None:
        """Measure prefill and decode, with the share of the measured memory bandwidth and peak arithmetic.

        Example: paceline bench --shape llama-3.2-1b --format int4
        """
        from paceline.analysis import speed
        from paceline.analysis.synthetic import RandomCheckpoint
        from paceline.llm import LLM

        start = time.perf_counter()
        source: Any = RandomCheckpoint(shape) if shape else model
        with show.progress(not json) as update, LLM(source, config, progress=update) as llm:
            load_s = time.perf_counter() - start
            limits = speed.measure_limits(llm)
            jobs = [("prefill", n) for n in prefill] + [("decode", n) for n in batch]
            cells = []
            for i, (kind, n) in enumerate(jobs):
                if update:
                    update(i, len(jobs), "measuring")
                cells.append(
                    speed.prefill(llm, n, runs, limits)
                    if kind == "prefill"
                    else speed.decode(llm, n, prompt, tokens, runs, limits)
                )
            result = {
                "model": llm.plan.model.name,
                "formats": llm.plan.model.formats,
                "weight_bytes": llm.plan.model.weight_bytes,
                "backend": llm.plan.backend,
                "isa": llm.plan.isa,
                "threads": llm.plan.threads,
                "load_s": load_s,
                "peak_memory_bytes": show.peak_memory(),
                "bandwidth_gb_s": limits and limits.bandwidth / 1e9,
                "peak_tflop_s": limits and limits.peak / 1e12,
                "cells": [c.describe() for c in cells],
            }
        if json:
            show.print_json(result)
            return
        rows = [
            (
                c.work,
                f"{c.tokens_per_s:.1f}",
                f"{100 * c.spread:.0f} %",
                number(c.bound_tokens_per_s),
                share(c.share_of_bandwidth),
                share(c.share_of_peak),
            )
            for c in cells
        ]
        title = f"{result['model']} · {result['formats']} · {result['backend']} {result['isa'] or ''} · {result['threads']} threads"
        show.table(title, ("work", "tokens/s", "spread", "bound", "of bandwidth", "of peak"), rows)
        show.out.print(f"loaded in {load_s:.1f} s, peak memory {show.size(show.peak_memory())}", highlight=False)


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}"


def share(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f} %"
