"""What the chaos run does to a server besides using it: hostile requests, clients that leave or stall, and faults of its processes.

Every attack says which statuses it may be answered with; None is a connection that was closed without an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from chaos_server import Server

NINES = "9" * 400
DEEP: Any = {"type": "string"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}


@dataclass
class World:
    """What attacks share. problems: whatever must not have happened."""

    server: Server
    draw: random.Random
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    statuses: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def saw(self, attack: str, status: int | None, allowed: set[int | None], more: str = "") -> None:
        self.statuses[attack, status] += 1
        if status not in allowed:
            self.problems.append(f"{attack}: status {status}, expected one of {allowed}: {more[:1500]}")


# ---- bodies


def bombs(draw: random.Random) -> dict[str, tuple[str, str, set[int | None]]]:
    """name: (route, body, statuses) of bodies that cost little to send and could cost much to serve."""
    v1 = "/v1/completions"
    one = {"prompt": f"a {draw.random()}", "max_tokens": 4}
    hostile = "(" * 30 + "a{0,99}" + "){1,40}" * 30
    nested = f"(x{{1,{draw.randrange(200, 1000)}}}y{{1,900}}){{1,900}}"

    def body(**more: Any) -> str:
        return json.dumps({**one, **more})

    return {
        "n = 5e6": (v1, body(n=5_000_000), {400}),
        "logprobs = 1e9": (v1, body(logprobs=10**9), {400}),
        "prompt_logprobs = -1": (v1, body(prompt_logprobs=-1), {400}),
        "priority of 400 digits": (v1, f'{{"prompt": "a", "priority": {NINES}}}', {400}),
        "top_k of 400 digits": (v1, f'{{"prompt": "a", "top_k": {NINES}}}', {400}),
        "seed of 400 digits": (v1, f'{{"prompt": "a", "seed": {NINES}}}', {400}),
        "bias of 1e400": (v1, '{"prompt": "a", "logit_bias": {"5": 1e400}}', {400}),
        "lone surrogate": (v1, '{"prompt": "a", "stop": ["\\ud800"]}', {400}),
        "500k stops": (v1, body(stop=["x"] * 200_000), {400, 413}),
        "ids outside the vocabulary": (v1, body(prompt=[1, 1 << 40, -5]), {400}),
        "ids to bias outside": (v1, body(logit_bias={"99999999": 5}), {400}),
        "empty prompt": (v1, body(prompt=[]), {400}),
        "too many prompts": (v1, body(prompt=["a"] * 5000), {400}),
        "prompt beyond the context": (v1, body(prompt="word " * 20_000), {400}),
        "regex bomb": (v1, body(structured_outputs={"regex": hostile}), {400}),
        "regex bomb, repeats": (v1, body(structured_outputs={"regex": nested}), {200, 400, 500}),
        "grammar without end": (v1, body(structured_outputs={"grammar": 'start: a\na: a "x" | a a'}), {200, 400, 500}),
        "schema nested deeply": (v1, body(structured_outputs={"json": DEEP}), {200, 400}),
        "schema of 3000 properties": (
            v1,
            body(structured_outputs={"json": {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}}),
            {200, 400, 500},
        ),
        "schema that refers to itself": (v1, body(structured_outputs={"json": {"$ref": "#"}}), {400}),
        "JSON nested deeply": (v1, '{"prompt": ' + "[" * 100_000, {400}),
        "JSON cut off": (v1, '{"prompt": "a", "max_tok', {400}),
        "no JSON": (v1, "\x00\x01<xml>", {400}),
        "unknown field": (v1, body(frobnicate=1), {400}),
        "foreign template": ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}', {400}),
        "messages of 4097": ("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "a"}] * 4097}), {400}),
        "no such model": (v1, body(model="../../etc/passwd"), {404}),
        "no such route": ("/v1/../admin/reload", body(), {403, 404}),
        "admin without right": ("/admin/reload", "{}", {403}),
    }  # fmt: skip


async def bomb(world: World) -> None:
    name, (route, body, allowed) = world.draw.choice(sorted(bombs(world.draw).items()))
    async with world.server.client("eve") as http:
        found = await http.post(route, content=body.encode(), headers={"content-type": "application/json"})
    told = found.status_code != 500 or '"engine_fault"' in found.text  # a constraint that fails half-way says so
    world.saw(name, found.status_code, {*allowed, 503} if told else {400}, f"{body[:300]} -> {found.text}")
    if found.status_code == 503 and "retry-after" not in found.headers:
        world.problems.append(f"{name}: 503 without Retry-After: {found.text}")


# ---- connections


async def raw(world: World, data: bytes, listen_s: float, receive_buffer: int = 0) -> bytes | None:
    """What comes back for these bytes within so long, if the connection is closed by then; None while it is open."""
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    with contextlib.closing(sock):
        await loop.sock_connect(sock, ("127.0.0.1", world.server.port))
        with contextlib.suppress(OSError):
            await asyncio.wait_for(loop.sock_sendall(sock, data), 30)
        if receive_buffer:
            await asyncio.sleep(listen_s)
        found = b""
        try:
            while piece := await asyncio.wait_for(loop.sock_recv(sock, 1 << 16), listen_s):
                found += piece
        except asyncio.TimeoutError:
            return None
        except OSError:
            pass
        return found


def head(server: Server, length: int, path: str = "/v1/completions", who: str = "eve", more: str = "") -> bytes:
    key = server.keys[who]
    lines = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    )
    return f"{lines}content-length: {length}\r\n{more}\r\n".encode()


def _status(answer: bytes | None) -> int | None:
    return int(answer[9:12]) if answer and answer.startswith(b"HTTP/1.1 ") else None


async def garbage(world: World) -> None:
    draw = world.draw
    body = b'{"prompt": "a", "max_tokens": 2}'
    kinds: dict[str, tuple[bytes, set[int | None]]] = {
        "random bytes": (draw.randbytes(draw.randrange(1, 5000)) + b"\r\n\r\n", {400, 431, None}),
        "TLS to a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500) + b"\r\n\r\n", {400, None}),
        "headers of 1 MB": (b"GET / HTTP/1.1\r\nx: " + b"a" * (1 << 20) + b"\r\n\r\n", {400, 431, None}),
        "200 headers": (head(world.server, 2, more="".join(f"x-{i}: 1\r\n" for i in range(200))) + b"{}", {431}),
        "body of 2 MB": (head(world.server, 2 << 20) + b"a" * (2 << 20), {413, None}),
        "body of 2 MB in chunks": (
            head(world.server, 0).replace(b"content-length: 0", b"transfer-encoding: chunked")
            + b"10000\r\n" + b"a" * 65536 + b"\r\n" + b"fffffffff0\r\n" + b"b" * (2 << 20), {400, 413, None}),
        "two lengths": (head(world.server, len(body), more="content-length: 5\r\n") + body, {400, None}),
        "length and chunks": (head(world.server, len(body), more="transfer-encoding: chunked\r\n") + body, {400, None}),
        "negative length": (head(world.server, -5) + body, {400, None}),
        "HTTP/0.9": (b"GET /health\r\n\r\n", {400, None}),
        "foreign host": (head(world.server, 2).replace(b"host: localhost", b"host: evil.example") + b"{}", {421}),
        "foreign page": (head(world.server, len(body), more="origin: https://evil.example\r\n") + body, {403}),
        "compressed": (head(world.server, 2, more="content-encoding: gzip\r\n") + b"{}", {415}),
        "half a body": (head(world.server, 500) + body, {408, None}),
        "websocket": (
            b"GET /v1/completions HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
            {401, 404, 405, None},
        ),
    }  # fmt: skip
    name = draw.choice(sorted(kinds))
    data, allowed = kinds[name]
    world.saw(name, _status(await raw(world, data, 8.0 if name == "half a body" else 1.0)), {*allowed, None}, name)


LONG = {"prompt": "print", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0}


async def leave(world: World) -> None:
    """Close the connection somewhere: in the head, in the body, in the queue, in the stream."""
    draw = world.draw
    asked = {**LONG, "stream": draw.random() < 0.7, "n": draw.choice([1, 1, 4]), "seed": draw.randrange(1 << 30)}
    if draw.random() < 0.3:
        asked["structured_outputs"] = {"regex": f"[a-{draw.choice('xyz')}]{{50,{draw.randrange(200, 300)}}}"}
    body = json.dumps(asked).encode()
    data = head(world.server, len(body)) + body
    if draw.random() < 0.2:
        data = data[: draw.randrange(1, len(data))]
    reader, writer = await asyncio.open_connection("127.0.0.1", world.server.port)
    writer.write(data)
    with contextlib.suppress(asyncio.TimeoutError, OSError):
        await asyncio.wait_for(reader.read(draw.randrange(1, 4000)), draw.choice([0.01, 0.1, 1.0]))
    if draw.random() < 0.5:
        writer.transport.abort()  # a reset instead of an orderly end
    writer.close()
    world.saw("left", None, {None})


async def stall(world: World) -> None:
    """Ask for much and take nothing: the server must close the connection, or have written all into the kernel's buffers."""
    body = json.dumps({**LONG, "stream": True, "n": 8, "logprobs": 20}).encode()
    found = await raw(
        world, head(world.server, len(body), more="connection: close\r\n") + body, 20.0, receive_buffer=4096
    )
    world.saw("slow reader", _status(found), {200, 503}, "the connection was still open")


async def intrude(world: World) -> None:
    """Wrong keys from an address of their own, beyond the number of failures that is forgiven."""
    transport = httpx.AsyncHTTPTransport(local_address="127.0.0.66")
    async with httpx.AsyncClient(base_url=world.server.url, transport=transport, timeout=60) as http:
        for _ in range(30):
            key = f"Bearer pk-{world.draw.randrange(1 << 60)}"
            found = await http.get("/v1/models", headers={"authorization": key})
            world.saw("wrong key", found.status_code, {401, 429}, found.text)
            if found.status_code == 429 and "retry-after" not in found.headers:
                world.problems.append("wrong key: 429 without Retry-After")


async def overrun(world: World) -> None:
    async with world.server.client("poor") as http:
        for _ in range(13):
            found = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            world.saw("quota", found.status_code, {200, 429, 503}, found.text)
            if found.status_code == 429 and "retry-after" not in found.headers:
                world.problems.append("quota: 429 without Retry-After")


async def flood(world: World) -> None:
    """More requests at once than may wait."""
    async with world.server.client("eve") as http:

        async def one(i: int) -> None:
            found = await http.post("/v1/completions", json={"prompt": f"{i} {world.draw.random()}", "max_tokens": 8})
            world.saw("flood", found.status_code, {200, 503}, found.text)
            if found.status_code == 503 and "retry-after" not in found.headers:
                world.problems.append("flood: 503 without Retry-After")

        await asyncio.gather(*(one(i) for i in range(90)))


async def spoil(world: World) -> None:
    """Damage files of the disk tier: cut, flipped, emptied, gone, of another kind."""
    files = [p for p in (world.server.folder / "kv").rglob("*.kv") if p.is_file()]
    for path in world.draw.sample(files, min(len(files), 4)):
        how = world.draw.choice(["cut", "flip", "empty", "delete", "noise"])
        world.faults[f"tier file: {how}"] += 1
        with contextlib.suppress(OSError):
            if how == "delete":
                path.unlink()
                continue
            data = bytearray(path.read_bytes())
            if how == "flip" and data:
                data[world.draw.randrange(len(data))] ^= 1 << world.draw.randrange(8)
            parts = {
                "cut": data[: len(data) // 2],
                "flip": data,
                "empty": b"",
                "noise": world.draw.randbytes(len(data)),
            }
            path.write_bytes(parts[how])


ATTACKS: tuple[tuple[int, Callable[[World], Any]], ...] = (
    (10, bomb), (6, garbage), (10, leave), (2, stall), (1, intrude), (1, overrun), (2, flood), (3, spoil),
)  # fmt: skip


async def attacker(world: World) -> None:
    """One attack after the other until the end."""
    weights, kinds = zip(*ATTACKS, strict=True)
    while not world.stop.is_set():
        attack = world.draw.choices(kinds, weights)[0]
        try:
            await attack(world)
        except (httpx.HTTPError, OSError, asyncio.TimeoutError) as e:
            world.problems.append(f"{attack.__name__}: {type(e).__name__}: {e}")
        await asyncio.sleep(world.draw.random() * 0.2)


# ---- faults


async def _reload(world: World) -> None:
    async with world.server.client("root") as http:
        found = await http.post("/admin/reload", json={})
        world.saw("reload", found.status_code, {200}, found.text)


def _signal(world: World, number: signal.Signals) -> int | None:
    workers = world.server.workers()
    if not workers:
        return None
    pid = world.draw.choice(workers)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    world.faults[number.name] += 1
    return pid


async def _pause(world: World) -> None:
    pid = _signal(world, signal.SIGSTOP)
    await asyncio.sleep(world.draw.uniform(0.5, 4))
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def _settled(world: World) -> None:
    """Return when nobody runs alone any more: a request from now is served, and there is one worker.

    A fault other than SIGKILL before that would rightly be blamed on who runs alone, though it came from outside.
    """
    async with world.server.client("root") as http:
        while not world.stop.is_set():
            found = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            if found.status_code == 200 and len(world.server.workers()) == 1:
                return
            await asyncio.sleep(0.2)


async def saboteur(world: World, pause_s: float = 4.0) -> None:
    """Faults of the worker, one after the other until the end."""
    draw = world.draw
    while not world.stop.is_set():
        await asyncio.sleep(draw.uniform(0.2, 2 * pause_s))
        await _settled(world)
        kind = draw.choice(
            ["kill", "kill", "kill twice", "kill in restart", "crash", "abort", "pause", "reload", "reload and kill"]
        )
        world.faults[kind] += 1
        if kind == "pause":
            await _pause(world)
        elif kind == "reload":
            await _reload(world)
        elif kind == "reload and kill":
            reloading = asyncio.ensure_future(_reload(world))
            await asyncio.sleep(draw.uniform(0, 1.5))
            _signal(world, signal.SIGKILL)
            await reloading
        else:
            numbers = {"crash": signal.SIGSEGV, "abort": signal.SIGABRT}
            _signal(world, numbers.get(kind, signal.SIGKILL))
            if kind in ("kill twice", "kill in restart"):
                await asyncio.sleep(draw.uniform(1.0, 3.0) if kind == "kill twice" else draw.uniform(0.0, 1.0))
                _signal(world, signal.SIGKILL)


async def observer(world: World, latencies: list[float]) -> None:
    """/health four times a second, and every second what the kernel says of the processes."""
    server, last = world.server, 0.0
    zombies: set[int] = set()
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        while not world.stop.is_set():
            start = time.perf_counter()
            try:
                status = (await http.get("/health")).status_code
                latencies.append(time.perf_counter() - start)
                if status != 200:
                    world.problems.append(f"/health: {status}")
            except httpx.HTTPError as e:
                world.problems.append(f"/health: {type(e).__name__}: {e}")
            if time.monotonic() - last > 1:
                last = time.monotonic()
                server.samples.append((last, server.look()))
                now = set(server.zombies())
                for pid in now & zombies:
                    world.problems.append(f"process {pid} has been a zombie for more than a second")
                zombies = now
            await asyncio.sleep(0.25)
