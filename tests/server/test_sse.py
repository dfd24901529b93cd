"""Event streams: keep-alives, readers who leave or stall, and generators that are always closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from paceline.core.errors import RequestError
from paceline.server.sse import KEEP_ALIVE, EventStream


class Reader:
    """One end of an ASGI connection. stalls: sending never returns; leaves_after: disconnects after so many bodies."""

    def __init__(self, stalls: bool = False, leaves_after: int | None = None):
        self.bodies: list[bytes] = []
        self.stalls, self.leaves_after = stalls, leaves_after
        self.left = asyncio.Event()

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            if self.stalls:
                await asyncio.Event().wait()
            self.bodies.append(message["body"])
            if self.leaves_after is not None and len(self.bodies) >= self.leaves_after:
                self.left.set()


async def stream(reader: Reader, pieces: AsyncGenerator[bytes, None], **timing: float) -> None:
    options = {"keep_alive_s": 10.0, "write_timeout_s": 10.0, **timing}
    await asyncio.wait_for(EventStream(pieces, **options)({}, reader.receive, reader.send), 5)


class Pieces:
    """A generator that tells when it was closed."""

    def __init__(self, wait: float = 0.0, n: int = 3, error: Exception | None = None):
        self.wait, self.n, self.error, self.closed = wait, n, error, False

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for i in range(self.n):
                yield f"data: {i}\n\n".encode()
                await asyncio.sleep(self.wait)
            if self.error:
                raise self.error
        finally:
            self.closed = True


def run(reader_options: dict[str, Any], pieces: Pieces, **timing: float) -> list[bytes]:
    async def whole() -> list[bytes]:
        reader = Reader(**reader_options)
        await stream(reader, pieces.run(), **timing)
        return reader.bodies

    bodies = asyncio.run(whole())
    assert pieces.closed
    return bodies


def test_pieces_pass_as_they_are() -> None:
    assert run({}, Pieces()) == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]


def test_silences_are_filled() -> None:
    bodies = run({}, Pieces(wait=0.3, n=2), keep_alive_s=0.05)
    assert KEEP_ALIVE in bodies
    assert [b for b in bodies if b != KEEP_ALIVE] == [b"data: 0\n\n", b"data: 1\n\n"]


def test_who_leaves_ends_the_generator() -> None:
    assert len(run({"leaves_after": 2}, Pieces(wait=0.02, n=1000))) <= 3


def test_who_takes_nothing_is_given_up() -> None:
    assert run({"stalls": True}, Pieces(n=1000), write_timeout_s=0.2, keep_alive_s=0.1) == []


def test_an_error_in_the_middle_is_an_event_and_the_stream_ends_by_the_book() -> None:
    bodies = run({}, Pieces(n=1, error=RequestError("prompt: no")))
    assert b'"message":"prompt: no"' in bodies[-1]
    assert bodies[-1].endswith(b"data: [DONE]\n\n")


def test_cancelling_the_server_side_is_passed_on() -> None:
    async def whole() -> bool:
        pieces = Pieces(wait=10)
        task = asyncio.ensure_future(stream(Reader(), pieces.run()))
        await asyncio.sleep(0.05)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return pieces.closed
        return False

    assert asyncio.run(whole())


def test_a_reader_who_takes_no_keep_alive_is_dropped() -> None:
    """A comment that cannot be written must not hold the watch that would notice it."""

    class Full(Reader):
        async def send(self, message: Any) -> None:
            if message.get("body") == KEEP_ALIVE:
                await asyncio.Event().wait()
            await super().send(message)

    pieces = Pieces(wait=30.0)

    async def whole() -> None:
        await stream(Full(), pieces.run(), keep_alive_s=0.02, write_timeout_s=0.05)

    asyncio.run(whole())
    assert pieces.closed


def test_a_stream_ends_at_whatever_moment_a_keep_alive_is_written() -> None:
    """The end of the stream cancels the watch in every state of its write, the last of which is done and not yet noticed."""

    class Slow(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.writing, self.go = asyncio.Event(), asyncio.Event()

        async def send(self, message: Any) -> None:
            if message.get("body") == KEEP_ALIVE:
                self.writing.set()
                await self.go.wait()
            await super().send(message)

    async def whole(n_ticks: int) -> None:
        reader = Slow()

        async def pieces() -> AsyncGenerator[bytes, None]:
            yield b"data: 1\n\n"
            await reader.writing.wait()
            reader.go.set()
            for _ in range(n_ticks):
                await asyncio.sleep(0)

        answer = EventStream(pieces(), keep_alive_s=0.01, write_timeout_s=10.0)
        task = asyncio.ensure_future(answer({}, reader.receive, reader.send))
        await asyncio.wait({task}, timeout=5)
        assert task.done(), n_ticks
        task.result()

    for n_ticks in range(6):
        asyncio.run(whole(n_ticks))
