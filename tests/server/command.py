"""A real server for tests: its own process, the embedded model, a free port."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Served:
    url: str
    pid: int


@contextlib.contextmanager
def serve(*flags: str) -> Iterator[Served]:
    """`paceline serve` with these flags, ready."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "paceline",
        "serve",
        "--port",
        str(port),
        "--context",
        "4096",
        "--drain",
        "0",
        *flags,
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PACELINE_")}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _until_ready(process, url)
        yield Served(url, process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _until_ready(process: subprocess.Popen[str], url: str) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {process.stderr.read() if process.stderr else ''}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the server does not get ready")
