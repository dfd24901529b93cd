"""`paceline list`: what there is: models, techniques, formats, machines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import JSON


def techniques() -> list[dict[str, Any]]:
    from paceline import techniques as registry

    found = []
    for name in registry.names():
        t = registry.get(name)()
        m = t.manifest()
        text = (inspect.getdoc(inspect.getmodule(t)) or "").splitlines()
        found.append(
            {
                "name": name,
                "area": name.split("/")[0],
                "seams": sorted(m.seams),
                "paper": m.paper,
                "needs": sorted(f.value for f in m.needs),
                "breaks": sorted(f.value for f in m.breaks),
                "gives": sorted(f.value for f in m.gives),
                "summary": text[0] if text else "",
            }
        )
    return found


def formats() -> list[dict[str, Any]]:
    from paceline.ops import formats as registry

    return [
        {"name": n, "bits_per_weight": registry.get(n).bits(registry.get(n).default_group, False)}
        for n in registry.names()
    ]


def models() -> list[dict[str, Any]]:
    from paceline import lab
    from paceline import models as registry

    rows = [{"name": n, "kind": "embedded", "path": str(lab.path(n))} for n in lab.names()]
    return rows + [{"name": n, "kind": "architecture (model_type)", "path": ""} for n in registry.names()]


def machines() -> list[dict[str, Any]]:
    from paceline.analysis.hardware.catalogue import catalogue

    return [m.describe() for m in catalogue()]


KINDS = {"models": models, "techniques": techniques, "formats": formats, "machines": machines}


def _command(kind: str, find: Callable[[], list[dict[str, Any]]]) -> Callable[..., None]:
    def command(json: bool = JSON) -> None:
        rows = find()
        if json:
            show.print_json(rows)
            return
        columns = list(rows[0]) if rows else ["name"]
        cells = [[", ".join(r[c]) if isinstance(r[c], list) else r[c] for c in columns] for r in rows]
        show.table(kind, columns, cells)

    return command


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="What there is: models, techniques, formats, machines.", no_args_is_help=True)
    app.add_typer(group, name="list", rich_help_panel="Understand")
    for kind, find in KINDS.items():
        group.command(kind, help=f"List {kind}.")(_command(kind, find))
