"""Attacks below HTTP, by raw sockets: who sends slowly, who does not read, who holds connections open."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served, eventually, served
from siege import rss, unshaken

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "n": 8, "logprobs": 20}
TIMES = {"header_timeout": 1.0, "body_timeout": 1.0, "write_timeout": 1.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(bounds={**TIMES, "max_connections": 8, "stream_buffer": 4096}) as s:
        yield s


def connect(s: Served, small: bool = False) -> socket.socket:
    """small: with as little room for what comes as the system allows."""
    made = socket.socket()
    if small:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    made.settimeout(60)
    made.connect(("127.0.0.1", int(s.url.rsplit(":", 1)[1])))
    return made


def until_closed(sock: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(1 << 16):
            got += data
    return got


def answer(sock: socket.socket) -> bytes:
    """One answer of a known length, or what came before the connection was closed."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(1 << 16):
            got += data
            head, sep, body = got.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if sep and length and len(body) >= int(length[1]):
                return head + sep + body[: int(length[1])]
    return got


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


def dribble(sock: socket.socket, data: bytes) -> int:
    """A byte at a time, until the other side has had enough; how many it took. The socket is closed."""
    sock.setblocking(False)
    for n, byte in enumerate(data):
        try:
            sock.send(bytes([byte]))
            with contextlib.suppress(BlockingIOError):
                if not sock.recv(1 << 16):
                    return n
        except OSError:
            return n
        time.sleep(0.05)
    return len(data)


def n_connections(s: Served) -> int:
    async def count() -> int:
        return len(s.connections)

    return int(s.run(count()))


@pytest.mark.parametrize("first", [b"", post({"prompt": "x", "max_tokens": 1})], ids=["at once", "after a request"])
def test_headers_a_byte_at_a_time_are_given_up(server: Served, first: bytes) -> None:
    sock = connect(server)
    with unshaken(server):
        if first:
            sock.sendall(first)
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
        slow = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"y" * 10_000
        assert dribble(sock, slow) < len(slow)
    sock.close()


def test_who_connects_and_says_nothing_is_given_up(server: Served) -> None:
    with contextlib.ExitStack() as open_sockets, unshaken(server):
        silent = [open_sockets.enter_context(connect(server)) for _ in range(20)]
        assert all(until_closed(s) == b"" for s in silent)


def test_a_body_a_byte_at_a_time_is_given_up(server: Served) -> None:
    sock = connect(server)
    sock.sendall(HEAD + b"Content-Length: 10000\r\n\r\n")
    with unshaken(server):
        assert dribble(sock, b" " * 10_000) < 10_000
    sock.close()


def test_tiny_chunks_hold_nobody_up(server: Served) -> None:
    sock = connect(server)
    sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    with unshaken(server), contextlib.suppress(OSError):
        for _ in range(40):
            sock.sendall(b"1\r\nx\r\n" * 5000)
    sock.close()


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n", b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
     b"\xff" * 100_000,
     HEAD + b"A" * 100_000 + b"\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffffff\r\n",
     HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HEAD + b"Expect: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 2\r\n\r\n{}"],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_request_is_refused_in_the_usual_shape(server: Served, data: bytes) -> None:
    with connect(server) as sock, unshaken(server):
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        got = answer(sock)
    if got:  # a reset may overtake the answer
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.split()[1] in (b"400", b"404", b"411", b"421"), got[:300]
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_connections_beyond_the_bound_push_out_the_oldest_idle_ones() -> None:
    with served(bounds={"max_connections": 4}) as s, contextlib.ExitStack() as open_sockets:
        with unshaken(s):
            held = [open_sockets.enter_context(connect(s)) for _ in range(300)]
            eventually(lambda: n_connections(s) <= 4 + 64 + 1)
        busy = open_sockets.enter_context(connect(s))
        busy.sendall(post({"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}))
        assert busy.recv(100).startswith(b"HTTP/1.1 200")
        more = [open_sockets.enter_context(connect(s)) for _ in range(200)]
        assert b"[DONE]" in until_end(busy)  # nobody who is being served is pushed out
        assert len(held) + len(more) == 500


def until_end(sock: socket.socket) -> bytes:
    got = b""
    while b"0\r\n\r\n" not in got[-20:] and (data := sock.recv(1 << 16)):
        got += data
    return got


def test_descriptors_are_asked_for_and_the_bound_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.server.listening import limits
    from paceline.server.settings import Bounds

    asked: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: asked.append(both))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 100_000))
    assert limits(Bounds(max_connections=1000)).most == 1064
    assert asked == [(1320, 100_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    assert limits(Bounds(max_connections=4096)).most == 1024 - 256


def test_who_does_not_read_a_stream_is_dropped(server: Served) -> None:
    """Others go on beside it, the front keeps little of it, and it ends by itself."""
    with connect(server, small=True) as sock, server.client() as c:
        want = c.post("/v1/completions", json={"prompt": "Item", "max_tokens": 40, "seed": 1}).json()["choices"]
        before = rss()
        with unshaken(server):
            sock.sendall(post({**LONG, "stream": True}))
            eventually(lambda: server.supervisor.n_live == 1)
            other = c.post("/v1/completions", json={"prompt": "Item", "max_tokens": 40, "seed": 1}).json()["choices"]
            assert other == want
            eventually(lambda: server.supervisor.n_live == 0, 180)
            eventually(lambda: server.supervisor.gauge.n_running == 0)
        assert rss() - before < 48 << 20
        eventually(lambda: n_connections(server) <= 1, 30)  # the client's own; the other is cut, read or not


def test_who_does_not_read_an_answer_is_cut(server: Served) -> None:
    with connect(server, small=True) as sock:
        with unshaken(server):
            sock.sendall(post({**LONG, "max_tokens": 500}))
            eventually(lambda: server.supervisor.n_live == 1)
            eventually(lambda: server.supervisor.n_live == 0, 180)
            eventually(lambda: n_connections(server) <= 1, 30)  # the one that asks for /health
        assert len(until_closed(sock)) < 8 << 20
