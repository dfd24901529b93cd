"""Chaos: a real server under load while its processes are killed, its files damaged and its clients hostile.

    python benchmarks/chaos.py --minutes 10 --seed 1 --clients 6 [--json chaos.json] [--model PATH]

Innocent neighbours ask for streams and whole answers of all kinds (several completions, constraints, tools, log-probabilities, sampled
with a seed) that the server has answered before, at rest. Every token, text, log-probability and end must be equal, whatever happens
meanwhile. Besides, /health must answer, nothing may be left in hand at the end, and no process, file descriptor or memory may be
lost. Exit code 1 and what is needed to reproduce it on any violation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import chaos_attacks as attacks
import httpx
from chaos_attacks import World
from chaos_clients import Known, Refused, Wrong, answer, asks, difference, oracle
from chaos_server import Server, started, stopped

MIB = 1 << 20
MAX_GROWTH = 48 * MIB  # of the front from the second quarter of a run to its last; `leaks.py` is exact
MAX_PROBLEMS = 20


async def neighbour(world: World, known: list[Known], seed: int, counts: Counter[str]) -> None:
    """Ask for what is known, one after the other, and compare."""
    draw = random.Random(seed)
    async with world.server.client(draw.choice(["ann", "ben"])) as http:
        while not world.stop.is_set():
            one = draw.choice(known)
            stream = one.streamed is not None and draw.random() < 0.7
            try:
                got = await answer(http, one.ask, stream)
            except Refused:
                counts["refused, tried again"] += 1
                await asyncio.sleep(0.3)
                continue
            except (Wrong, httpx.HTTPError) as e:
                counts["lost"] += 1
                world.problems.append(_told(one, stream, f"lost: {type(e).__name__}: {e}"))
                continue
            counts[f"{one.ask.kind}, {'stream' if stream else 'whole'}"] += 1
            problem = difference(one.streamed if stream and one.streamed else one.whole, got)
            if problem is not None:
                counts["mismatches"] += 1
                world.problems.append(_told(one, stream, problem))


def _told(one: Known, stream: bool, problem: str) -> str:
    return f"{one.ask.kind}, stream={stream}: {problem}\n  POST {one.ask.path} {json.dumps(one.ask.body, ensure_ascii=False)}"


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    async with started(folder, options.model) as server:
        world = World(server, random.Random(options.seed))
        async with server.client() as http:
            known = await oracle(http, asks(options.seed, options.requests))
        calm = server.look()
        counts: Counter[str] = Counter()
        latencies: list[float] = []
        seeds = [world.draw.randrange(1 << 30) for _ in range(options.clients)]
        tasks = [
            *(neighbour(world, known, s, counts) for s in seeds),
            *(attacks.attacker(world) for _ in range(options.attackers)),
            attacks.saboteur(world, options.pause),
            attacks.observer(world, latencies),
        ]
        running = [asyncio.ensure_future(t) for t in tasks]
        done, _ = await asyncio.wait(running, timeout=60 * options.minutes, return_when=asyncio.FIRST_EXCEPTION)
        world.problems += [f"the run itself failed: {t.exception()!r}" for t in done if t.exception()]
        world.stop.set()
        for task in (await asyncio.wait(running, timeout=200))[1]:
            world.problems.append(f"still waiting 200 s after the end: {task.get_coro()!r}")
            task.cancel()
        return await verdict(world, known, calm, counts, latencies)


async def verdict(
    world: World, known: list[Known], calm: list[Any], counts: Counter[str], latencies: list[float]
) -> dict[str, Any]:
    """What is left, how it ends, and everything counted."""
    server = world.server
    left = await server.idle()
    if any(left.values()):
        world.problems.append(f"not idle at the end: {left}")
    async with server.client() as http:
        for one in known:
            problem = difference(one.whole, await answer(http, one.ask, False))
            if problem is not None:
                world.problems.append(_told(one, False, f"at rest afterwards: {problem}"))
    await server.idle()
    await asyncio.sleep(1.5)
    final, metrics = server.look(), await server.metrics()
    world.problems += _leaks(server, calm, final)
    world.problems += await stopped(server, 90)
    log = server.log.read_text(errors="replace")
    faults = re.findall(r"^.*(?:failed$|Traceback|graceful shutdown exceeded).*$", log, re.MULTILINE)
    world.problems += [f"the log has an unexpected fault: {m}" for m in faults[:5]]
    ordered = sorted(latencies) or [0.0]
    memory = {
        role: {
            "start_mib": _own(calm, role) / MIB,
            "minutes_mib": [round(_own(look, role) / MIB, 1) for _, look in server.samples[::60]],
            "end_mib": _own(final, role) / MIB,
        }
        for role in ("front", "worker", "helper")
    }
    return {
        "innocent": dict(sorted(counts.items())),
        "attacks": {
            f"{name}: {status or 'closed'}": n for (name, status), n in sorted(world.statuses.items(), key=str)
        },
        "faults": dict(sorted(world.faults.items())),
        "deaths_in_log": log.count("the worker died"),
        "refused_as_guilty": log.count("it ends the worker"),
        "preemptions": metrics["paceline_num_preemptions_total"],
        "cache_hits": metrics["paceline_prefix_cache_hits_total"],
        "health_ms": {
            f"p{p}": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99, 100)
        },
        "memory": memory,
        "left": left,
        "problems": world.problems,
    }


def _own(samples: list[Any], role: str) -> int:
    """Of all processes of a role together."""
    return sum(s.own for s in samples if s.role == role)


def _leaks(server: Server, calm: list[Any], final: list[Any]) -> list[str]:
    front, end = (next(s for s in look if s.role == "front") for look in (calm, final))
    quarter = max(1, len(server.samples) // 4)
    early, late = (
        statistics.median(_own(look, "front") for _, look in part)
        for part in (server.samples[quarter : 2 * quarter] or server.samples, server.samples[-quarter:])
    )
    found = []
    if late - early > MAX_GROWTH:
        found.append(f"the front grew by {(late - early) / MIB:.0f} MiB")
    if end.n_fds > front.n_fds + 8:  # what clients keep open
        found.append(f"the front had {front.n_fds} file descriptors and has {end.n_fds}")
    if end.n_threads > front.n_threads + 8:
        found.append(f"the front had {front.n_threads} threads and has {end.n_threads}")
    counts = Counter(s.role for s in final)
    if counts["worker"] != 1 or counts["helper"] > 2:
        found.append(f"processes at the end: {dict(counts)}")
    return found


def show(result: dict[str, Any]) -> None:
    for title in ("innocent", "attacks", "faults"):
        print(f"\n{title}")
        for name, n in result[title].items():
            print(f"  {n:7d}  {name}")
    print()
    for name in ("deaths_in_log", "refused_as_guilty", "preemptions", "cache_hits", "health_ms", "memory", "left"):
        value = result[name]
        print(f"{name:>18}  {json.dumps(value, default=str) if isinstance(value, dict) else value}")
    n = sum(v for k, v in result["innocent"].items() if ", " in k and "again" not in k)
    verdict = {
        "answers compared": n,
        "mismatches": result["innocent"].get("mismatches", 0),
        "lost": result["innocent"].get("lost", 0),
    }
    print(f"{'verdict':>18}  {json.dumps(verdict)}, {len(result['problems'])} problems")
    for problem in result["problems"][:MAX_PROBLEMS]:
        print(f"\nPROBLEM {problem[:6000]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6, help="innocent neighbours at a time")
    parser.add_argument("--attackers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=48, help="different innocent requests")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between two faults of the worker")
    parser.add_argument("--model", help="a model with at least 1024 tokens of context; default: the embedded one")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep-log", type=Path, help="copy the server's log here")
    options = parser.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = asyncio.run(run(options, Path(folder)))
        finally:
            if options.keep_log is not None:
                options.keep_log.write_bytes((Path(folder) / "log").read_bytes())
    result = {"seed": options.seed, "minutes": options.minutes, "took_s": time.time() - start, **result}
    show(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
