"""Paceline's server beside its peers under recorded traffic: the same model, bits, prompts and arrivals, every engine in turns.

    python benchmarks/serving.py --install                             # the peers, once
    python benchmarks/serving.py --prepare                             # the checkpoints, once
    python benchmarks/serving.py --quick                               # two engines, one small model: a smoke test
    python benchmarks/serving.py --shapes llama-3.2-1b --bits w8a8 --json serving.json --write-readme

What is measured and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peers
import peers_checkpoints as checkpoints
import peers_report
import serving_client as client
import serving_engines as engines
import serving_report as report
from rich.console import Console
from rich.table import Table

from paceline.analysis.traffic import Arrival, read_trace, scale

HERE = Path(__file__).resolve().parent
MAX_PROMPT, MAX_OUTPUT = 1500, 256
WARM = 4  # requests before those that count
LONGEST = (
    32768  # requests of a trace that are longer are left out, since scaling them down would leave nothing of the others
)
TRACES = {"azure": "azure_conversation_2023.csv", "mooncake": "mooncake_conversation.jsonl"}
TARGETS = {
    "smollm2-135m": client.Targets(1.0, 0.05),
    "qwen3-0.6b": client.Targets(1.5, 0.075),
    "llama-3.2-1b": client.Targets(2.0, 0.1),
}

Say = Callable[[str], None]


class Group:
    """The engines of one shape, bits and trace, each started, and paused while it is not its turn."""

    def __init__(self, a: argparse.Namespace, shape: str, bits: str, trace: Sequence[Arrival], say: Say):
        self.a, self.shape, self.bits, self.trace, self.say = a, shape, bits, trace, say
        self.n_vocab = checkpoints.config_of(shape)["vocab_size"] - 2  # without the special ones
        self.servers: dict[str, engines.Server] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def start(self) -> None:
        """All engines, each in its fastest variant; why one has none goes to `facts`."""
        for name in self.a.engines:
            self.facts[name] = {}
            try:
                if name in self.a.missing:
                    raise RuntimeError(self.a.missing[name])
                self._start(name)
            except RuntimeError as e:
                self.facts[name]["error"] = str(e)
                self.say(f"{self.shape} {self.bits}: {name}: {e}")

    def _start(self, name: str) -> None:
        found: dict[str, float] = {}
        variants = engines.starts(self.a, name, self.shape, self.bits)
        for variant, start in variants.items():
            server = start()
            try:
                self._burst(name, server, 0, WARM)
                found[variant] = self._burst(name, server, 1)
            except RuntimeError as e:
                self.say(f"{self.shape} {self.bits}: {name} {variant}: {e}")
                self.facts[name]["failed_variants"] = [*self.facts[name].get("failed_variants", []), f"{variant}: {e}"]
            finally:
                if len(variants) > 1 or variant not in found:
                    server.close()
                else:
                    server.pause()
                    self.servers[name] = server
        if not found:
            raise RuntimeError("; ".join(self.facts[name]["failed_variants"]))
        best = max(found, key=found.__getitem__)
        self.facts[name] |= {"variant": best, "variants": found}
        if name not in self.servers:
            server = variants[best]()
            self._burst(name, server, 0, WARM)
            server.pause()
            self.servers[name] = server
        self.say(f"{self.shape} {self.bits}: {name} {best} ready")

    def _burst(self, name: str, server: engines.Server, turn: int, n: int | None = None) -> float:
        """Requests per second when all come at once."""
        arrivals = client.window(self.trace, n or self.a.burst, 1e9, turn)
        work = client.jobs(arrivals, self.n_vocab, turn, engines.ENGINES[name].fields)
        return client.capacity(asyncio.run(client.offer(server.port, work, 600.0)))

    def capacities(self) -> dict[str, float]:
        """By engine: the better of two bursts, in turns."""
        for turn in (2, 3):
            for name, server in self.servers.items():
                server.resume()
                rate = self._burst(name, server, turn)
                server.pause()
                self.facts[name]["capacity"] = max(rate, self.facts[name].get("capacity", 0.0))
        return {n: f["capacity"] for n, f in self.facts.items() if "capacity" in f}

    def measure(self, rate: float, turn: int) -> dict[str, Any]:
        """Every engine under the same load, `rounds` times; each round begins with another engine and takes another part of the trace."""
        names = list(self.servers)
        runs: dict[str, list[client.Run]] = {n: [] for n in names}
        n = max(8, round(rate * self.a.seconds))
        for i in range(self.a.rounds):
            arrivals = client.window(self.trace, n, rate, turn + i)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                work = client.jobs(arrivals, self.n_vocab, turn + i, engines.ENGINES[name].fields)
                server = self.servers[name]
                server.resume()
                runs[name].append(asyncio.run(client.offer(server.port, work, self.a.drain)))
                time.sleep(1.0)  # what was given up is dropped
                server.pause()
        targets = self.a.targets[self.shape]
        failed = {n: {"error": f["error"]} for n, f in self.facts.items() if "error" in f}
        return {n: client.summary(r, targets) for n, r in runs.items()} | failed

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


def run(a: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Measure what was asked for; results are saved after every rate."""
    results = json.loads(a.json.read_text(encoding="utf-8")) if a.json and a.json.exists() else {}
    results = report.merge(results, {"machine": peers.machine(a, [])})
    for name in a.traces:
        trace = prepared(a.trace_dir / TRACES[name])
        for shape in a.shapes:
            for bits in a.bits:
                results = _group(a, name, Group(a, shape, bits, trace, say), results)
    return results


def prepared(path: Path) -> list[Arrival]:
    """The trace with lengths for this machine, arrivals as they were."""
    return scale([x for x in read_trace(path) if x.n_prompt <= LONGEST], max_prompt=MAX_PROMPT, max_output=MAX_OUTPUT)


def _group(a: argparse.Namespace, trace: str, group: Group, results: dict[str, Any]) -> dict[str, Any]:
    key = {"shape": group.shape, "bits": group.bits, "trace": trace}
    try:
        group.start()
        found = group.capacities()
        if not found:
            return report.merge(results, {"groups": [{**key, "engines": group.facts}]})
        best = max(found.values())
        results = report.merge(results, {"groups": [{**key, "engines": group.facts}]})
        for i, load in enumerate(a.loads):
            rate = load * best
            group.say(f"{group.shape} {group.bits} {trace}: {rate:.2f} requests/s")
            cell = {**key, "load": load, "rate": rate, "targets": asdict(a.targets[group.shape])}
            measured = group.measure(rate, 10 + i * a.rounds)
            results = report.merge(results, {"cells": [{**cell, "results": measured}]})
            peers.save(a, results)
    finally:
        group.close()
    return results


def show(results: Mapping[str, Any], console: Console) -> None:
    for title, (header, body) in (
        ("highest goodput, requests/s", report.best_rows(results)),
        ("times in ms", report.rows(results["cells"])),
    ):
        table = Table(title=title)
        for name in header:
            table.add_column(name)
        for row in body:
            table.add_row(*row)
        console.print(table)
    for problem in report.problems(results):
        console.print(problem, highlight=False, markup=False)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--install", action="store_true", help="install the engines, nothing else")
    p.add_argument("--prepare", action="store_true", help="install, write, convert and compile, nothing else")
    p.add_argument("--report", action="store_true", help="show (and --write-readme) what is in --json; measure nothing")
    p.add_argument(
        "--quick", action="store_true", help="a smoke test: smollm2-135m, llama-server, two rates of 8 s, one round"
    )
    p.add_argument("--shapes", nargs="+", choices=list(TARGETS))
    p.add_argument("--bits", nargs="+", choices=peers.BITS)
    p.add_argument("--traces", nargs="+", choices=list(TRACES))
    p.add_argument("--engines", nargs="+", choices=list(engines.ENGINES), help="besides ours")
    p.add_argument(
        "--loads", nargs="+", type=float, help="offered rates, in capacities of the fastest (0.25 0.5 1 1.5)"
    )
    p.add_argument("--seconds", type=float, help="load of one turn (60)")
    p.add_argument("--drain", type=float, default=30.0, help="seconds for what is unfinished when the load ends (30)")
    p.add_argument("--rounds", type=int, help="turns of each engine at each rate (2)")
    p.add_argument("--burst", type=int, help="requests that tell the capacity (48)")
    p.add_argument("--ttft", type=float, help="target in seconds; default: by shape")
    p.add_argument("--tpot", type=float, help="target in seconds; default: by shape")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--env-dir", type=Path, default=Path.home() / ".cache" / "paceline-peers")
    p.add_argument("--trace-dir", type=Path, default=HERE.parent.parent / "shared" / "data" / "traces")
    p.add_argument("--json", type=Path, help="results are merged into this file, cell by cell")
    p.add_argument(
        "--write-readme", action="store_true", help="replace the results in benchmarks/README.md, and serving.svg"
    )
    a = p.parse_args()
    full = {"shapes": list(TARGETS), "bits": ["w8a8", "int4"], "traces": list(TRACES), "engines": list(engines.ENGINES)}
    full |= {"loads": [0.25, 0.5, 1.0, 1.5], "seconds": 60.0, "rounds": 2, "burst": 48}
    quick = {"shapes": ["smollm2-135m"], "bits": ["int8"], "traces": ["azure"], "engines": ["llama-server"]}
    quick |= {"loads": [0.5, 1.5], "seconds": 8.0, "rounds": 1, "burst": 12}
    for name, value in (quick if a.quick else full).items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    a.engines = [peers_report.OURS, *(e for e in a.engines if e != peers_report.OURS)]
    a.env_dir, a.isa = a.env_dir.expanduser().resolve(), "native"
    a.targets = {s: client.Targets(a.ttft or t.ttft, a.tpot or t.tpot) for s, t in TARGETS.items()}
    if min(*a.loads, a.seconds, a.drain, a.rounds, a.burst, a.threads) <= 0:
        p.error("--loads, --seconds, --drain, --rounds, --burst and --threads must be positive")
    return a


def prepare(a: argparse.Namespace, say: Say) -> None:
    """Write and convert the checkpoints; with --prepare, also start once what compiles when it first starts."""
    for shape in a.shapes:
        for bits in a.bits:
            for name in (e for e in a.engines if e not in a.missing):
                say(f"{shape} {bits}: checkpoint of {name}")
                peer = peers.PEERS[engines.ENGINES[name].peer]
                try:
                    peers.model_of(a, shape, peer, bits, convert=True)
                    if a.prepare and peer.compiles:
                        next(iter(engines.starts(a, name, shape, bits).values()))().close()
                except RuntimeError as e:
                    say(f"{shape} {bits} {name}: {e}")  # said again when it is measured


def main() -> None:
    a = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    console = Console(width=None if sys.stdout.isatty() else 220)
    say: Say = lambda text: Console(stderr=True).print(text, highlight=False, markup=False)  # noqa: E731
    if a.report:
        results = json.loads(a.json.read_text(encoding="utf-8"))
    else:
        (a.env_dir / "logs").mkdir(parents=True, exist_ok=True)
        reasons = {n: engines.install(a, n, say) for n in a.engines}
        a.missing = {n: why for n, why in reasons.items() if why}
        for name, why in a.missing.items():
            say(f"{name}: {why}")
        if a.install:
            return
        prepare(a, say)
        if a.prepare:
            return
        results = run(a, say)
    if not results.get("cells"):
        sys.exit("; ".join(report.problems({"cells": [], **results})) or "nothing was measured")
    show(results, console)
    if a.write_readme:
        (HERE / "serving.svg").write_text(report.svg(results["cells"]), encoding="utf-8")
        text = report.report(results, "serving.svg")
        peers_report.write_between(HERE / "README.md", text, report.BEGIN, report.END)


if __name__ == "__main__":
    main()
