"""`paceline bench`: how fast a model or a shape is here, and what share of the machine that is."""

from __future__ import annotations

import time
from dataclasses import asdict
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
        prompt: int = typer.Option(512, help="Tokens of each sequence before decoding, and of the prefill."),
        batch: list[int] = typer.Option([1], help="Sequences decoding at once. Repeatable."),
        prefill: list[int] = typer.Option([], help="Prompt lengths to prefill; default: --prompt. Repeatable."),
        verify: list[int] = typer.Option([], help="Draft tokens to verify in one step, against one row. Repeatable."),
        tokens: int = typer.Option(32, min=1, help="Tokens decoded per sequence and run."),
        runs: int = typer.Option(3, min=1, help="Repetitions; the median counts."),
        profile: bool = typer.Option(False, "--profile", help="Where a step's time goes, operator by operator."),
        json: bool = JSON,
    ) -> None:
        """Measure prefill and decode, with the share of the measured memory bandwidth and peak arithmetic.

        Example: paceline bench --shape llama-3.2-1b --format int4 --prompt 512 --batch 1
        """
        from paceline.analysis.synthetic import RandomCheckpoint
        from paceline.llm import LLM

        work = {"prompt": prompt, "batch": batch, "prefill": prefill or [prompt], "verify": verify}
        start = time.perf_counter()
        source: Any = RandomCheckpoint(shape) if shape else model
        with show.progress(not json) as update, LLM(source, config, progress=update) as llm:
            load_s = time.perf_counter() - start
            result = measure(llm, work, tokens, runs, profile, update)
        result = {"shape": shape, **result, "load_s": load_s}
        if json:
            show.print_json(result)
        else:
            print_result(result)


def measure(llm: Any, work: dict[str, Any], tokens: int, runs: int, profile: bool, update: Any) -> dict[str, Any]:
    """All that was asked for; the flat numbers are those of the first prompt length and the first batch size."""
    from paceline.analysis import speed

    prompt = work["prompt"]
    jobs: list[Any] = [lambda n=n: speed.prefill(llm, n, runs) for n in work["prefill"]]
    jobs += [lambda b=b: speed.decode(llm, b, prompt, tokens, runs) for b in work["batch"]]
    jobs += [lambda n=n: speed.verification(llm, n, prompt, tokens, runs) for n in work["verify"]]
    done = []
    for i, job in enumerate(jobs):
        if update:
            update(i, len(jobs), "measuring")
        done.append(job())
    peak = show.peak_memory()  # before the limits are measured, which needs memory of its own
    limits = speed.measure_limits(llm)
    n_cells = len(work["prefill"]) + len(work["batch"])
    cells = [speed.judge(llm, times, limits) for times in done[:n_cells]]
    first_prefill, first_decode = cells[0], cells[len(work["prefill"])]
    operators = {}
    if profile and limits is not None:
        operators = {f"prefill {n}": speed.profile_prefill(llm, n, limits) for n in work["prefill"]}
        operators |= {f"decode b{b}": speed.profile_decode(llm, b, prompt, limits) for b in work["batch"]}
    plan = llm.plan
    return {
        "model": plan.model.name,
        "prompt": first_prefill.tokens,
        "batch": first_decode.batch,
        "context": first_decode.context,
        "prefill_tok_s": first_prefill.tokens_per_s,
        "decode_tok_s": first_decode.tokens_per_s,
        "bandwidth_share": first_decode.bandwidth_share,
        "peak_share": first_prefill.peak_share,
        "peak_rss_bytes": peak,
        "weight_bytes": plan.model.weight_bytes,
        "kernels": {
            "backend": plan.backend,
            "isa": plan.isa,
            "threads": plan.threads,
            "formats": plan.model.formats,
            "kv_dtype": plan.kv_dtype,
            "page_size": plan.page_size,
            "max_rows": plan.limits.max_rows,
        },
        "bandwidth_bytes_s": limits and limits.bandwidth,
        "peak_flop_s": limits and dict(limits.peaks),
        "cells": [asdict(c) for c in cells],
        "verify": [asdict(v) for v in done[n_cells:]],
        "operators": {name: [asdict(r) for r in rows] for name, rows in operators.items()},
    }


def print_result(r: dict[str, Any]) -> None:
    k = r["kernels"]
    rows = [
        (
            c["work"],
            c["context"] or "",
            f"{c['tokens_per_s']:.1f}",
            share(c["spread"]),
            "-" if c["bound_tokens_per_s"] is None else f"{c['bound_tokens_per_s']:.1f}",
            share(c["bandwidth_share"]),
            share(c["peak_share"]),
        )
        for c in r["cells"]
    ]
    title = f"{r['model']} · {k['formats']} · {k['backend']} {k['isa'] or ''} · {k['threads']} threads"
    show.table(title, ("work", "context", "tokens/s", "spread", "bound", "of bandwidth", "of peak"), rows)
    if r["verify"]:
        checks = [
            (
                v["draft"],
                v["context"],
                f"{1e3 * v['seconds']:.3f}",
                f"{1e3 * v['seconds_of_one']:.3f}",
                f"{v['ratio']:.2f}",
            )
            for v in r["verify"]
        ]
        show.table("verifying a draft", ("draft tokens", "context", "ms", "ms of one row", "ratio"), checks)
    for name, operators in r["operators"].items():
        print_operators(name, operators)
    show.out.print(f"loaded in {r['load_s']:.1f} s, peak memory {show.size(r['peak_rss_bytes'])}", highlight=False)


def print_operators(name: str, operators: list[dict[str, Any]]) -> None:
    total = sum(o["seconds"] for o in operators)
    rows = [
        (
            o["name"],
            f"{o['calls']:.0f}",
            f"{1e6 * o['seconds']:.0f}",
            share(o["seconds"] / total),
            f"{o['bytes'] / o['seconds'] / 1e9:.1f}" if o["bytes"] else "-",
            f"{o['flops'] / o['seconds'] / 1e9:.1f}" if o["flops"] else "-",
            o["bound"] or "-",
            share(o["share"]),
        )
        for o in operators
    ]
    title = f"a step of {name}: {1e3 * total:.3f} ms in operators"
    show.table(title, ("operator", "calls", "us", "of step", "GB/s", "GFLOP/s", "bound", "of its bound"), rows)


def share(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f} %"
