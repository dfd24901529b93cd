"""What an attack must leave as it was: a server that answers meanwhile and afterwards, and its memory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from served import Served

STEADY_S = 1.0  # the loop may compute so long without looking up
PATIENCE_S = 30.0  # for an answer, on a machine that others use as well
BEAT_S = 0.02


@dataclass
class Watch:
    """gaps: CPU seconds this process computed between two beats of the server's loop. Others' load on the machine does not count."""

    gaps: list[float] = field(default_factory=lambda: [0.0])
    n_healthy: int = 0

    @property
    def longest(self) -> float:
        return max(self.gaps)


@contextlib.contextmanager
def unshaken(server: Served, bound: float = STEADY_S) -> Iterator[Watch]:
    """While the block runs, /health is asked again and again from another thread, and once more at its end.

    Raises AssertionError when the event loop was held up by our own work for longer than `bound`, or /health did not answer.
    """
    watch, ended = Watch(), threading.Event()
    failed: list[BaseException] = []

    async def beat() -> None:
        last = time.process_time()
        while not ended.is_set():
            await asyncio.sleep(BEAT_S)
            now = time.process_time()
            watch.gaps.append(now - last)
            last = now

    def ask() -> None:
        with server.client() as c:
            while True:
                over = ended.is_set()
                try:
                    assert c.get("/health", timeout=PATIENCE_S).status_code == 200
                except BaseException as e:
                    failed.append(e)
                    return
                watch.n_healthy += 1
                if over:
                    return
                ended.wait(0.1)

    beating = asyncio.run_coroutine_threadsafe(beat(), server.loop)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield watch
    finally:
        ended.set()
        asking.join(2 * PATIENCE_S)
        beating.result(PATIENCE_S)
    assert not failed, failed
    assert watch.n_healthy > 0
    assert watch.longest < bound, f"the event loop stood still for {watch.longest:.2f} s of computing"


def rss(pid: int | None = None) -> int:
    """Bytes of anonymous memory of a process (this one: None), after what is free was given back."""
    if pid is None:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
    with open(f"/proc/{pid or os.getpid()}/status", encoding="ascii") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon"))


def growth(server: Served, attack: Callable[[], Any], times: int = 50, warm: int = 12) -> int:
    """Bytes by which front (with the test's own client) and worker have grown after `times` attacks, the first few aside."""

    def both() -> int:
        return rss() + rss(server.supervisor.pid)

    for _ in range(warm):
        attack()
    before = both()
    for _ in range(times):
        attack()
    return both() - before


def is_error(r: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error of an answer, which has one of these statuses and OpenAI's shape."""
    assert r.status_code in statuses, (r.status_code, r.text[:500])
    body = r.json()
    if body.get("type") == "error":  # Anthropic's
        assert set(body) == {"type", "error", "request_id"}, body
        assert set(body["error"]) == {"type", "message"}, body
        return dict(body["error"])
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert len(r.content) < 64 << 10
    return dict(body["error"])


def post(c: httpx.Client, path: str, body: Any) -> httpx.Response:
    """body: as JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return c.post(path, content=content, headers={"content-type": "application/json"}, timeout=2 * PATIENCE_S)


def processes() -> set[int]:
    """Every process below this one."""
    return {p.pid for p in psutil.Process().children(recursive=True)}
