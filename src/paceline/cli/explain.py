"""`paceline explain`: the resolved plan, or every reason against it, without loading weights."""

from __future__ import annotations

from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import JSON, engine_options
from paceline.core.config import EngineConfig, Plan


def rows(plan: Plan) -> list[tuple[str, Any]]:
    limits = plan.limits
    techniques = ", ".join(t.name for t in plan.techniques) or "none"
    return [
        ("model", f"{plan.model.name} ({plan.model.model_type}, {plan.model.n_params / 1e6:.1f} M parameters)"),
        ("weights", f"{plan.model.formats}, {show.size(plan.model.weight_bytes)}"),
        ("backend", f"{plan.backend}{f' ({plan.isa})' if plan.isa else ''}, {plan.threads} threads"),
        ("context", f"{plan.context} tokens (the model's: {plan.model.context})"),
        (
            "KV cache",
            f"{plan.kv_dtype}, {show.size(plan.kv_bytes_per_token)} a token, room for {plan.n_pages * plan.page_size} tokens",
        ),
        ("memory", f"at most {show.size(plan.peak_bytes)} of {show.size(plan.machine.memory)} available"),
        ("a step", f"{limits.max_rows} rows, {limits.max_seqs} sequences, {limits.chunk} rows of one prompt"),
        ("techniques", techniques),
        *(("switched off", f"{name}: {why}") for name, why in plan.refused.items()),
        *(("note", n) for n in (*plan.notes, *plan.model.notes)),
    ]


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Understand")
    @engine_options
    def explain(model: str | None, config: EngineConfig, json: bool = JSON) -> None:
        """Show what would run and why, or every reason against it. Reads no weights.

        Example: paceline explain -m ./Llama-3.2-1B --format int4 --context 131072
        """
        from paceline.assemble import inspect

        seen = inspect(model, config)
        if json:
            show.print_json({**seen.plan.describe(), "fingerprint": seen.plan.fingerprint})
        else:
            show.table("Plan", ("what", "value"), rows(seen.plan))
        seen.checkpoint.close()
