"""Results of serving.py to a table, a plot (SVG) and its part of the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from peers_report import OURS, markdown, number, percent

BEGIN, END = "<!-- serving: begin (written by serving.py --write-readme) -->", "<!-- serving: end -->"
KEY = ("shape", "bits", "trace", "load")
GROUP = KEY[:3]

Cell = Mapping[str, Any]


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`: whole cells and groups, so that a cell's engines were always measured together."""
    out = {**old, **new}
    for field, key in (("cells", KEY), ("groups", GROUP)):
        rows = {tuple(r[k] for k in key): r for r in (*old.get(field, ()), *new.get(field, ()))}
        out[field] = list(rows.values())
    return out


def milliseconds(x: float | None) -> str:
    return "-" if x is None else f"{1e3 * x:,.0f}"


HEADER = ["shape", "bits", "trace", "offered/s", "engine", "goodput/s", "in target", "TTFT p50", "TTFT p99", "TPOT p50",
          "TPOT p99", "gap p99", "E2E p50", "E2E p99", "tokens/s", "failed"]  # fmt: skip


def rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """One row per engine and cell; times in milliseconds."""
    out = []
    for c in cells:
        head = [c["shape"], c["bits"], c["trace"], number(c["rate"])]
        for name, r in c["results"].items():
            if "error" in r:
                continue
            times = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "gap_p99", "e2e_p50", "e2e_p99")
            failed = f"{r['errors']} of {r['requests']}"
            figures = [number(r["goodput"]), percent(r["met"]), *(milliseconds(r[t]) for t in times)]
            out.append([*head, name, *figures, number(r["tokens_per_s"]), failed])
    return HEADER, out


def most(cells: Sequence[Cell], engine: str) -> float | None:
    """An engine's highest goodput over the offered rates of a group."""
    found = [c["results"][engine]["goodput"] for c in cells if "goodput" in c["results"].get(engine, {})]
    return max(found) if found else None


def groups(cells: Sequence[Cell]) -> dict[tuple[str, ...], list[Cell]]:
    """Cells by shape, bits and trace, ascending rates."""
    out: dict[tuple[str, ...], list[Cell]] = {}
    for c in cells:
        out.setdefault(tuple(c[k] for k in GROUP), []).append(c)
    return {key: sorted(found, key=lambda c: c["rate"]) for key, found in out.items()}


def best_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Each group's highest goodput by engine, and ours over the best peer's."""
    engines = _engines(results["cells"])
    body = []
    for key, cells in groups(results["cells"]).items():
        found = {e: most(cells, e) for e in engines}
        peers = [v for e, v in found.items() if e != OURS and v is not None]
        ours = found.get(OURS)
        ratio = ours / max(peers) if ours is not None and peers and max(peers) > 0 else None
        targets = cells[0]["targets"]
        within = f"{targets['ttft']:g} s, {1e3 * targets['tpot']:g} ms"
        body.append([*key, within, *(number(found[e]) for e in engines), number(ratio)])
    return [*GROUP, "TTFT, TPOT within", *engines, "ours / best peer"], body


def _engines(cells: Sequence[Cell]) -> list[str]:
    """Engines that have a figure, ours first."""
    names = {e: None for c in cells for e, r in c["results"].items() if "error" not in r}
    return [*(e for e in names if e == OURS), *(e for e in names if e != OURS)]


def problems(results: Mapping[str, Any]) -> list[str]:
    out = []
    for g in results.get("groups", ()):
        where = " ".join(g[k] for k in GROUP)
        out += [f"{name} ({where}): {e['error']}" for name, e in g["engines"].items() if "error" in e]
    for c in results["cells"]:
        where = f"{' '.join(c[k] for k in GROUP)} at {number(c['rate'])}/s"
        for name, r in c["results"].items():
            if r.get("errors"):
                out.append(f"{name} ({where}): {r['errors']} of {r['requests']}, first: {r['first_error']}")
    return list(dict.fromkeys(out))


def report(results: Mapping[str, Any], plot: str) -> str:
    """The README's part. plot: the SVG's file name."""
    m = results["machine"]
    cells = results["cells"]
    cpu = [r["client_cpu"] for c in cells for r in c["results"].values() if "client_cpu" in r]
    late = [r["late_p99"] for c in cells for r in c["results"].values() if r.get("late_p99") is not None]
    parts = [
        f"{m['date']} · {m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB · {m['threads']} threads · {m['system']}",
        f"![goodput against offered rate]({plot})",
        "Highest goodput (answers within the targets, per second) over the offered rates:",
        markdown(*best_rows(results)),
        "Every rate; times in milliseconds:",
        markdown(*rows(cells)),
        f"The client took up to {percent(max(cpu, default=0.0))} of a core, and sent 99 % of requests at most "
        f"{milliseconds(max(late, default=0.0))} ms late.",
        "Settings that won the burst: " + "; ".join(_settings(results)) + ".",
        "Failed or without a figure:\n\n" + "\n".join(f"- {p}" for p in problems(results) or ["nothing"]),
    ]
    return "\n\n".join(parts)


def _settings(results: Mapping[str, Any]) -> list[str]:
    out = []
    for g in results["groups"]:
        known = [f"{n} {number(e['capacity'])}/s{_variant(e)}" for n, e in g["engines"].items() if "capacity" in e]
        out.append(f"{' '.join(g[k] for k in GROUP)}: {', '.join(known)}")
    return out


def _variant(e: Mapping[str, Any]) -> str:
    return f" ({e['variant']})" if e.get("variant") else ""


# ---- plot

WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 200, 56, 40, 70
COLOURS = {OURS: "#c0392b", "vllm": "#2471a3", "llama-server": "#1e8449", "openvino": "#7d3c98"}


def svg(cells: Sequence[Cell]) -> str:
    """Goodput against offered rate, one panel per group, no reference to anything outside; the dashed line is all that was offered."""
    panels = groups(cells)
    columns = min(3, max(1, len(panels)))
    lines = -(-len(panels) // columns)
    width, height = columns * (WIDTH + GAP) + GAP, lines * (HEIGHT + GAP) + TOP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(_engines(cells)),
    ]
    for i, (key, found) in enumerate(panels.items()):
        x, y = LEFT + (i % columns) * (WIDTH + GAP), TOP + (i // columns) * (HEIGHT + GAP)
        parts += [f'<g transform="translate({x},{y})">', *_panel(" ".join(key), found), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _legend(engines: Sequence[str]) -> list[str]:
    out = []
    for i, name in enumerate(engines):
        x = LEFT + 120 * i
        out.append(f'<rect x="{x}" y="8" width="12" height="4" fill="{COLOURS.get(name, "#555")}"/>')
        out.append(f'<text x="{x + 18}" y="14">{escape(name)}</text>')
    return out


def _panel(title: str, cells: Sequence[Cell]) -> list[str]:
    top = 1.05 * max(c["rate"] for c in cells)

    def at(x: float, y: float) -> str:
        return f"{WIDTH * x / top:.1f},{HEIGHT * (1 - y / top):.1f}"

    out = [
        f'<text x="0" y="-6" font-weight="bold">{escape(title)}</text>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
        f'<polyline points="{at(0, 0)} {at(top, top)}" fill="none" stroke="#bbb" stroke-dasharray="4 4"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT + 30}" text-anchor="middle">offered requests/s</text>',
        f'<text transform="translate(-40,{HEIGHT / 2}) rotate(-90)" text-anchor="middle">goodput/s</text>',
    ]
    for i in range(5):
        value = top * i / 4
        x, y = at(value, value).split(",")
        out.append(f'<text x="{x}" y="{HEIGHT + 14}" text-anchor="middle">{number(value)}</text>')
        out.append(f'<text x="-6" y="{y}" text-anchor="end" dominant-baseline="middle">{number(value)}</text>')
    for name in _engines(cells):
        points = [(c["rate"], c["results"][name]["goodput"]) for c in cells if "goodput" in c["results"].get(name, {})]
        colour = COLOURS.get(name, "#555")
        line = " ".join(at(*p) for p in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        dots = (at(*p).split(",") for p in points)
        out += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"><title>{escape(name)}</title></circle>' for x, y in dots
        ]
    return out
