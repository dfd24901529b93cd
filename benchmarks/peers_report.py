"""Results to tables: ratios to the best peer, shares of the machine's bound, and the part of the README that the script writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "paceline"
BEGIN, END = "<!-- results: begin (written by peers.py --write-readme) -->", "<!-- results: end -->"
KEY = ("isa", "shape", "bits", "work")

Cell = Mapping[str, Any]


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Median rate of runs that have `tokens` and `seconds`, and their spread (max - min) / median."""
    rates = [r["tokens"] / r["seconds"] for r in runs]
    middle = statistics.median(rates)
    return {"tokens_per_s": middle, "spread": (max(rates) - min(rates)) / middle, "runs": rates}


def rate(cell: Cell, peer: str) -> float | None:
    return cell["results"].get(peer, {}).get("tokens_per_s")


def best_peer(cell: Cell) -> tuple[str, float] | None:
    """The fastest engine other than ours."""
    rates = [(p, r) for p in cell["results"] if p != OURS and (r := rate(cell, p)) is not None]
    return max(rates, key=lambda x: x[1]) if rates else None


def ratio(cell: Cell) -> float | None:
    """Ours over the best peer."""
    ours, best = rate(cell, OURS), best_peer(cell)
    return None if ours is None or best is None else ours / best[1]


def share(cell: Cell) -> float | None:
    """Ours over the bound."""
    ours, bound = rate(cell, OURS), cell.get("bound_tokens_per_s")
    return None if ours is None or not bound else ours / bound


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`: whole cells, workers and checks are replaced, so that a cell's engines were always measured together."""
    out = {**old, **new}
    for field, key in (("cells", KEY), ("workers", (*KEY[:3], "peer")), ("checks", (*KEY[:3], "peer"))):
        rows = {tuple(r[k] for k in key): r for r in (*old.get(field, ()), *new.get(field, ()))}
        out[field] = list(rows.values())
    out["environments"] = {**old.get("environments", {}), **new.get("environments", {})}
    return out


def number(x: float | None) -> str:
    """Three significant digits."""
    if x is None:
        return "-"
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f} %"


def bits_of(row: Mapping[str, Any]) -> str:
    return row["bits"] + ("" if row["isa"] == "native" else f" {row['isa']}")


def columns(cells: Sequence[Cell]) -> list[str]:
    """Engines that have a figure in any cell, ours first."""
    names = {p: None for c in cells for p in c["results"] if rate(c, p) is not None}
    return [OURS, *(p for p in names if p != OURS)]


def rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table."""
    engines = columns(cells)
    header = ["shape", "bits", "work", *engines, "best peer", "ours / best", "bound", "ours / bound"]
    out = []
    for c in cells:
        best = best_peer(c)
        out.append(
            [c["shape"], bits_of(c), c["work"]]
            + [number(rate(c, p)) for p in engines]
            + [best[0] if best else "-", number(ratio(c)), number(c.get("bound_tokens_per_s")), percent(share(c))]
        )
    return header, out


def check_rows(checks: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["shape", "bits", "engine", "top-1", "mean regret", "worst regret", "control"]
    return header, [
        [c["shape"], bits_of(c), c["peer"]]
        + ([f"not checked: {c['error']}", "", "", ""] if "error" in c else [percent(c["top1"]), *_regrets(c)])
        for c in checks
    ]


def _regrets(c: Mapping[str, Any]) -> list[str]:
    return [f"{c[name]:.2f}" for name in ("mean", "worst", "control")]


def judged(regrets: Sequence[Sequence[float]], control: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of regrets per sequence and token: the share of tokens that are the reference's own, mean, worst; and the control's mean."""
    flat = [x for row in regrets for x in row]
    return {
        "top1": sum(x == 0 for x in flat) / len(flat),
        "mean": statistics.fmean(flat),
        "worst": max(flat),
        "control": statistics.fmean(x for row in control for x in row),
    }


def problems(results: Mapping[str, Any]) -> list[str]:
    """Every engine or cell that gave no figure, with its reason."""
    out = [f"{name}: {e['error']}" for name, e in results["environments"].items() if "error" in e]
    said = {name: e.get("error") for name, e in results["environments"].items()}
    failed: dict[tuple[str, str], list[str]] = {}
    for c in results["cells"]:
        for peer, r in c["results"].items():
            if "error" in r and r["error"] != said.get(peer):
                failed.setdefault((peer, r["error"]), []).append(f"{c['shape']} {c['bits']} {c['work']}")
    return out + [f"{peer}: {error} ({', '.join(where)})" for (peer, error), where in failed.items()]


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(results: Mapping[str, Any]) -> str:
    """The README's part: machine, table, checks, versions, what failed."""
    m = results["machine"]
    versions = [
        f"{name} ({', '.join(f'{k} {v}' for k, v in e['versions'].items())}{_compiler(e)})"
        for name, e in results["environments"].items()
        if "versions" in e
    ]
    parts = [
        f"{m['date']} · {m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB, {m['isa']} · {m['threads']} threads · "
        f"{limits(results['cells'])} · {m['system']}",
        markdown(*rows(results["cells"])),
        "Outputs against transformers in float32, of the bfloat16 weights:",
        markdown(*check_rows(results["checks"])),
        "Versions: " + "; ".join(versions) + ".",
        "Without a figure:\n\n" + "\n".join(f"- {p}" for p in problems(results) or ["nothing"]),
    ]
    return "\n\n".join(parts)


def limits(cells: Sequence[Cell]) -> str:
    """What the cells' own measurements of the machine ranged over."""
    seen: dict[str, list[float]] = {}
    for c in cells:
        for name, value in ({"read": c.get("bandwidth")} | dict(c.get("peaks", {}))).items():
            if value:
                seen.setdefault(name, []).append(1e-9 * value)
    spans = [
        f"{name} {min(v):,.0f}-{max(v):,.0f} {'GB/s' if name == 'read' else 'GFLOP/s'}" for name, v in seen.items()
    ]
    return ", ".join(spans) or "limits not measured"


def _compiler(environment: Mapping[str, Any]) -> str:
    return f", built by {environment['compiler']}" if environment.get("compiler") else ""


def write_between(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between two markers. Raises ValueError when they are not there, once each and in order."""
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{path}: must contain {begin!r} and after it {end!r}, once each; restore them")
    head, tail = old[: old.index(begin)], old[old.index(end) :]
    path.write_text(f"{head}{begin}\n\n{text}\n\n{tail}", encoding="utf-8")
