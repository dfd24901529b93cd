"""`paceline doctor`: what this machine offers, what was chosen and why, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import Any

import typer

from paceline.cli import show
from paceline.cli.options import JSON

# module, what for, remedy
OPTIONAL = (
    ("torch", "GPU through the reference ops, training of the lab models", "pip install 'paceline[torch]'"),
    ("hf_xet", "faster downloads from the hub", "pip install hf_xet"),
)


def findings() -> dict[str, Any]:
    """Everything `doctor` knows, as plain data."""
    from paceline import __version__, lab
    from paceline.analysis.hardware import host
    from paceline.assemble import native_isas

    h = host.detect()
    isas = native_isas()
    asked = os.environ.get("PACELINE_ISA")
    chosen = asked if asked in isas else (isas[-1] if isas else None)
    missing = [
        {"what": name, "for": why, "remedy": remedy}
        for name, why, remedy in OPTIONAL
        if importlib.util.find_spec(name) is None
    ]
    if not isas:
        missing.insert(
            0,
            {
                "what": "native core",
                "for": "speed: without it everything runs on slow NumPy ops",
                "remedy": "install a C++ compiler (apt-get install g++), then: pip install --force-reinstall --no-cache-dir paceline",
            },
        )
    if asked and asked not in isas:
        missing.append(
            {
                "what": f"PACELINE_ISA={asked}",
                "for": "it names an ISA this machine lacks",
                "remedy": f"choose from {', '.join(isas)}",
            }
        )
    return {
        "paceline": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": h.cpu,
        "cores": {
            "logical": h.n_logical,
            "physical": h.n_physical,
            "affinity": list(h.affinity),
            "quota": h.quota,
            "used": h.n_cores,
        },
        "numa": list(h.numa),
        "memory": {"total": h.memory_total, "available": h.memory_available, "cgroup_limit": h.memory_limit},
        "isa": {"available": list(isas), "chosen": chosen, "why": why_isa(isas, asked, h.flags)},
        "models": {name: str(lab.path(name)) for name in lab.names()},
        "missing": missing,
    }


def why_isa(isas: tuple[str, ...], asked: str | None, flags: frozenset[str]) -> str:
    if not isas:
        return "the native core is not built"
    if asked in isas:
        return f"PACELINE_ISA={asked}"
    has = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if f in flags]
    return f"the best that passed its self-test here (the CPU has {', '.join(has) or 'no vector extension we use'})"


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Understand")
    def doctor(json: bool = JSON) -> None:
        """Check the machine: CPU, instruction sets, quota, memory, and what is missing with its remedy."""
        found = findings()
        if json:
            show.print_json(found)
            return
        memory, cores = found["memory"], found["cores"]
        quota = "no quota" if cores["quota"] is None else f"cgroup quota {cores['quota']:g} cores"
        limit = "" if memory["cgroup_limit"] is None else f", cgroup limit {show.size(memory['cgroup_limit'])}"
        rows = [
            ("paceline", f"{found['paceline']} on Python {found['python']}, {found['platform']}"),
            ("CPU", found["cpu"]),
            (
                "cores",
                f"{cores['used']} used: {cores['logical']} logical, {cores['physical']} physical, affinity {cores['affinity']}, {quota}",
            ),
            ("NUMA", "; ".join(found["numa"]) or "one node"),
            ("memory", f"{show.size(memory['available'])} available of {show.size(memory['total'])}{limit}"),
            (
                "ISA",
                f"{found['isa']['chosen'] or 'none'}: {found['isa']['why']}; available {', '.join(found['isa']['available']) or 'none'}",
            ),
            ("models", ", ".join(found["models"]) or "none"),
        ]
        show.table("doctor", ("what", "finding"), rows)
        for m in found["missing"]:
            show.out.print(
                f"missing: {m['what']} ({m['for']}): {m['remedy']}", highlight=False, markup=False, soft_wrap=True
            )
