"""A real `paceline serve` for the chaos and leak runs: its start, what the kernel says of its processes, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from paceline.server import keys

TEMPLATE = """{%- if tools %}<|im_start|>system
Functions: {{ tools | tojson }}. Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or "" }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
IDENTITIES: dict[str, dict[str, Any]] = {
    "ann": {},
    "ben": {},
    "eve": {"priority": -1},
    "poor": {"requests_per_minute": 10},
    "root": {"admin": True},
}
OPTIONS = {
    "context": "1024", "threads": "1", "max-seqs": "16", "kv-memory": "14MiB", "max-queue": "64", "max-body": "1MiB",
    "write-timeout": "3s", "keep-alive": "1s", "body-timeout": "5s", "drain": "60s", "max-restarts": "1000",
}  # fmt: skip


@dataclass
class Sample:
    """One process at a time: memory in bytes that is its own (RssAnon + VmSwap)."""

    role: str
    pid: int
    own: int
    n_fds: int
    n_threads: int


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    keys: dict[str, str]
    folder: Path
    samples: list[tuple[float, list[Sample]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def client(self, identity: str = "ann", **more: Any) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.keys[identity]}"}
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=20)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=180, limits=limits, **more)

    def workers(self) -> list[int]:
        return [s.pid for s in self.look() if s.role == "worker"]

    def zombies(self) -> list[int]:
        return [p for p, (_, state) in self._children().items() if state == "Z"]

    def _children(self) -> dict[int, tuple[int, str]]:
        """pid: (parent, state) of all that descends from the front."""
        found, family = {}, {self.process.pid}
        for entry in sorted(int(p) for p in os.listdir("/proc") if p.isdigit()):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                found[entry] = (int(fields[1]), fields[0])
        grown = True
        while grown:
            more = {p for p, (parent, _) in found.items() if parent in family} - family
            family |= more
            grown = bool(more)
        return {p: found[p] for p in family if p in found and p != self.process.pid}

    def look(self) -> list[Sample]:
        """How its processes stand; one that is just ending is left out."""
        seen = []
        for pid in (self.process.pid, *self._children()):
            with contextlib.suppress(OSError, KeyError, ValueError, StopIteration):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                role = "front" if pid == self.process.pid else "worker" if b"server.worker" in command else "helper"
                lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                said = {name: value.split() for name, value in lines}
                own = 1024 * (int(said["RssAnon"][0]) + int(said["VmSwap"][0]))
                n_fds = len(os.listdir(f"/proc/{pid}/fd"))
                seen.append(Sample(role, pid, own, n_fds, int(said["Threads"][0])))
        return seen

    async def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name, labels left out and summed over."""
        async with self.client() as http:
            text = (await http.get("/metrics")).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    async def idle(self, seconds: float = 30.0) -> dict[str, float]:
        """What is still in hand after so long at most; all zero is idle."""
        end = time.monotonic() + seconds
        while True:
            found = await self.metrics()
            async with self.client() as http:
                left = {"in_hand": (await http.get("/load")).json()["server_load"]}
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                left[name] = found[f"paceline_{name}"]
            if not any(left.values()) or time.monotonic() > end:
                return left
            await asyncio.sleep(0.3)


@contextlib.asynccontextmanager
async def started(folder: Path, model: str | None = None, **options: str) -> AsyncIterator[Server]:
    """A server of its own folder, stopped at the end by force if it is still there."""
    made = {name: keys.make(name, **rest) for name, rest in IDENTITIES.items()}
    key_file = folder / "keys.json"
    key_file.touch(mode=0o600)
    key_file.write_bytes(msgspec.json.encode(keys.KeyFile(tuple(record for _, record in made.values()))))
    (folder / "template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {**OPTIONS, "port": str(port), "keys-file": str(key_file), "chat-template": str(folder / "template.jinja")}
    flags = [part for name, value in (given | options).items() for part in (f"--{name}", value)]
    tiers = ["--use", "kvcache/ram:size_mib=4", "--use", f"kvcache/disk:path={folder / 'kv'},size_mib=64"]
    command = [sys.executable, "-m", "paceline", "serve", *([model] if model else []), *flags, *tiers]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    server = Server(process, port, {name: key for name, (key, _) in made.items()}, folder)
    try:
        await _ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


async def _ready(server: Server) -> None:
    async with server.client() as http:
        for _ in range(600):
            if server.process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get("/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.1)
    raise RuntimeError("the server did not start:\n" + server.log.read_text()[-3000:])


async def stopped(server: Server, seconds: float) -> list[str]:
    """End it as an operator would; what is wrong with how it ended."""
    family = [s.pid for s in server.look()]
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + seconds
    while server.process.poll() is None and time.monotonic() < end:
        await asyncio.sleep(0.1)
    code = server.process.poll()
    if code is None:
        return [f"the server had not stopped {seconds:g} s after SIGTERM"]
    left = [p for p in family if Path(f"/proc/{p}/cmdline").exists() and Path(f"/proc/{p}/cmdline").read_bytes()]
    problems = [f"the server stopped with exit code {code}"] if code not in (0, -signal.SIGTERM) else []
    return problems + ([f"processes left behind: {left}"] if left else [])
