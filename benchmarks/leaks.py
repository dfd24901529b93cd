"""Leaks: memory, descriptors and threads of a real server over thousands of short requests of every kind.

    python benchmarks/leaks.py --requests 10000 --clients 8 [--json leaks.json] [--model PATH]

Among them requests that are aborted, refused or wrong, constraints that were never seen, prefixes that were never seen, and other models
names,. What a process has for itself (RssAnon + VmSwap) is read after every round at rest; the
slope over the rounds behind the warm-up is what is lost. Exit code 1 when a process grows by more than `MAX_SLOPE` for 1,000 requests,
or has more descriptors or threads than after the warm-up. How it works is measured from outside: nothing is switched on in the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chaos_attacks as attacks
import httpx
import numpy as np
from chaos_server import Server, started, stopped

MIB = 1 << 20
MAX_SLOPE = {"front": 0.5 * MIB, "worker": 0.5 * MIB, "helper": 0.5 * MIB}  # for 1,000 requests
WARM = 0.4  # of the rounds
N_ROUNDS = 20

Body = Callable[[random.Random], tuple[str, dict[str, Any]]]


def _plain(draw: random.Random) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": _words(draw), "max_tokens": 4, "logprobs": draw.choice([None, 2])}


def _several(draw: random.Random) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": _words(draw), "max_tokens": 3, "n": 3, "stop": [str(draw.random())]}


def _chat(draw: random.Random) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": _words(draw)}]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 4, "cache_salt": str(draw.random())}


def _grammar(draw: random.Random) -> tuple[str, dict[str, Any]]:
    kind = draw.choice(["regex", "json", "choice"])
    value = {
        "regex": f"[a-{draw.choice('fgh')}]{{1,{draw.randrange(2, 9)}}}{draw.randrange(10**9)}",
        "json": {"type": "object", "properties": {f"p{draw.randrange(10**9)}": {"type": "integer"}}},
        "choice": [str(draw.random()), "b"],
    }[kind]
    return "/v1/completions", {"prompt": "a", "max_tokens": 6, "structured_outputs": {kind: value}}


def _wrong(draw: random.Random) -> tuple[str, dict[str, Any]]:
    return draw.choice(
        [
            ("/v1/completions", {"prompt": "a", f"field{draw.random()}": 1}),
            ("/v1/completions", {"prompt": "a", "model": f"model{draw.random()}"}),
            ("/v1/completions", {"prompt": [draw.randrange(1 << 40)]}),
            (f"/v1/nowhere/{draw.random()}", {}),
            ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": f"({draw.random()}"}}),
        ]
    )


def _words(draw: random.Random) -> str:
    return " ".join(str(draw.randrange(1000)) for _ in range(draw.randrange(3, 40)))


async def one(
    server: Server, http: httpx.AsyncClient, draw: random.Random, counts: Counter[str], problems: list[str]
) -> None:
    """One request of any kind, streamed, whole, or left."""
    path, body = draw.choices([_plain, _several, _chat, _grammar, _wrong], [4, 2, 4, 3, 2])[0](draw)
    stream = draw.random() < 0.5 and path.startswith(("/v1/completions", "/v1/chat"))
    how = draw.choices(["read", "leave"], [5, 1])[0]
    if how == "leave":
        data = json.dumps({**body, "max_tokens": 200, "stream": stream}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(attacks.head(server, len(data), path) + data)
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            await asyncio.wait_for(reader.read(draw.randrange(1, 900)), draw.choice([0.0, 0.02, 0.2]))
        writer.transport.abort()
        counts["left"] += 1
        return
    try:
        found = await http.post(path, json={**body, "stream": True} if stream else body)
    except httpx.HTTPError as e:
        problems.append(f"{type(e).__name__}: stream={stream} {path} {json.dumps(body)}")
        return
    counts[f"{path.rpartition('nowhere')[0] or path}: {found.status_code}"] += 1


async def client(left: Iterator[int], *shared: Any) -> None:
    for _ in left:
        await one(*shared)


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    draw = random.Random(options.seed)
    counts: Counter[str] = Counter()
    rounds: list[dict[str, dict[str, int]]] = []
    problems: list[str] = []
    async with started(folder, options.model, **{"max-queue": "1024", "max-auth-failures": "1000000"}) as server:
        start = time.monotonic()
        async with server.client("ann") as http:
            for _ in range(N_ROUNDS):
                left = iter(range(options.requests // N_ROUNDS))
                shared = (server, http, draw, counts, problems)
                await asyncio.gather(*(client(left, *shared) for _ in range(options.clients)))
                rest = await server.idle()
                await asyncio.sleep(0.5)
                rounds.append(_state(server))
                print(f"{sum(counts.values()):7d} requests  {json.dumps(rounds[-1])}", flush=True)
        took = time.monotonic() - start
        problems += [f"not idle: {rest}"] if any(rest.values()) else []
        problems += await stopped(server, 90)
    slopes = {role: _slope(rounds, role, options.requests) for role in rounds[-1]}
    problems += [
        f"{role}: grows by {s / MIB:.2f} MiB for 1,000 requests" for role, s in slopes.items() if s > MAX_SLOPE[role]
    ]
    warm = rounds[int(WARM * N_ROUNDS)]
    for role, now in rounds[-1].items():
        for what, slack in (("n_fds", 4), ("n_threads", 2)):
            if now[what] > warm[role][what] + slack:
                problems.append(f"{role}: {what} {warm[role][what]} after the warm-up, {now[what]} at the end")
    kib = {role: round(s / 1024, 1) for role, s in slopes.items()}
    return {
        "counts": dict(sorted(counts.items())),
        "kib_per_1000": kib,
        "rounds": rounds,
        "took_s": took,
        "problems": problems,
    }


def _state(server: Server) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for s in server.look():
        one = found.setdefault(s.role, {"own": 0, "n_fds": 0, "n_threads": 0, "n": 0})
        for name, value in (("own", s.own), ("n_fds", s.n_fds), ("n_threads", s.n_threads), ("n", 1)):
            one[name] += value
    return found


def _slope(rounds: list[dict[str, dict[str, int]]], role: str, n: int) -> float:
    """Bytes for 1,000 requests, by Theil and Sen: the median over all pairs of rounds behind the warm-up."""
    values = [r[role]["own"] for r in rounds[int(WARM * N_ROUNDS) :] if role in r]
    pairs = [(b - a) / (j - i) for i, a in enumerate(values) for j, b in enumerate(values) if j > i]
    return float(np.median(pairs)) * 1000 * N_ROUNDS / n if pairs else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--keep-log", type=Path, help="copy the server's log here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = asyncio.run(run(options, Path(folder)))
        finally:
            if options.keep_log is not None:
                options.keep_log.write_bytes((Path(folder) / "log").read_bytes())
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
