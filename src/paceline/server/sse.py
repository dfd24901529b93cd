"""Answers over HTTP: server-sent events that notice a reader who leaves or stalls, and plain answers that are given up with their client.

Format of the events: https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from paceline.core.errors import PacelineError
from paceline.server.errors import ApiError, from_exception

T = TypeVar("T")
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """One event; data is JSON, which has no line breaks."""
    return b"data: " + data + b"\n\n" if name is None else b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


class ClientGone(Exception):
    """The client has left; nobody reads an answer."""


async def gone(receive: Receive) -> None:
    """Returns when the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone then."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        both: set[asyncio.Future[Any]] = {task, left}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(task, left)


class EventStream:
    """A response (ASGI application) that sends what a generator yields, in events of its own making.

    The generator is closed when the client leaves, takes nothing for write_timeout_s, or the server is cancelled. An error it
    raises after its first piece is one more event, made by `failed`; one before that is an ordinary error answer.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        keep_alive_s: float,
        write_timeout_s: float,
        headers: dict[str, str] | None = None,
        failed: Any = None,
    ):
        self._pieces, self._keep_alive, self._write_timeout = pieces, keep_alive_s, write_timeout_s
        self._headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            **(headers or {}),
        }
        self._failed = failed or _openai_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(gone(receive))
        first = asyncio.ensure_future(_next(self._pieces))
        try:
            both: set[asyncio.Future[Any]] = {first, left}
            await asyncio.wait(both, timeout=self._keep_alive, return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                first.result()  # raises what is then answered in the ordinary way
            elif left.done():
                raise ClientGone
            headers = [(k.encode(), v.encode()) for k, v in self._headers.items()]
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
            await self._run(send, left, first)
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGone, asyncio.TimeoutError, OSError):
            pass  # nobody is there to be told
        finally:
            await _cancel(left, first)
            await self._pieces.aclose()

    async def _run(self, send: Send, left: asyncio.Future[None], piece: asyncio.Future[Any]) -> None:
        while True:
            try:
                while not piece.done():
                    await asyncio.wait({piece, left}, timeout=self._keep_alive, return_when=asyncio.FIRST_COMPLETED)
                    if left.done():
                        raise ClientGone
                    if not piece.done():
                        await self._write(send, KEEP_ALIVE)
            finally:
                await _cancel(piece)
            try:
                data = piece.result()
            except (PacelineError, ApiError) as e:
                await self._write(send, self._failed(from_exception(e)))
                return
            if data is None:
                return
            await self._write(send, data)
            piece = asyncio.ensure_future(_next(self._pieces))

    async def _write(self, send: Send, data: bytes) -> None:
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _send(self, send: Send, message: Any) -> None:
        await asyncio.wait_for(send(message), self._write_timeout)


async def _next(pieces: Any) -> bytes | None:
    try:
        piece: bytes = await pieces.__anext__()
    except StopAsyncIteration:
        return None
    return piece


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _openai_error(error: ApiError) -> bytes:
    return error.event() + DONE
