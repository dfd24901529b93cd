"""Answers over HTTP: server-sent events that notice a reader who leaves or stalls, and plain answers that are given up with their client.

Format of the events: https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from paceline.core.errors import PacelineError
from paceline.server.errors import ApiError, ClientGone, from_exception

T = TypeVar("T")
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """One event; data is JSON, which has no line breaks."""
    return b"data: " + data + b"\n\n" if name is None else b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


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
        self._moved = time.monotonic()  # when a write last began or ended
        self._writing = False
        self._started = self._given_up = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        me = asyncio.current_task()
        assert me is not None
        guards = [asyncio.ensure_future(self._watch(me, send)), asyncio.ensure_future(self._until_gone(me, receive))]
        try:
            await self._run(send)
            await self._start(send)
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not self._given_up:
                raise
            if hasattr(me, "uncancel"):  # Python 3.11
                me.uncancel()
        except OSError:
            pass  # nobody is there to be told
        finally:
            await _cancel(*guards)
            await self._pieces.aclose()

    async def _start(self, send: Send) -> None:
        """Send the headers, once."""
        if not self._started:
            self._started = True
            headers = [(k.encode(), v.encode()) for k, v in self._headers.items()]
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})

    async def _run(self, send: Send) -> None:
        try:
            async for data in self._pieces:
                await self._write(send, data)
        except (PacelineError, ApiError) as e:
            if not self._started:
                raise  # answered in the ordinary way
            await self._write(send, self._failed(from_exception(e)))

    async def _write(self, send: Send, data: bytes) -> None:
        await self._start(send)
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _send(self, send: Send, message: Any) -> None:
        self._writing = True
        self._moved = time.monotonic()
        await send(message)
        self._writing = False
        self._moved = time.monotonic()

    async def _watch(self, me: asyncio.Task[Any], send: Send) -> None:
        """Beside the stream, so that a piece costs no timer of its own: fill silences, and give up a reader who takes nothing."""
        while True:
            still = time.monotonic() - self._moved
            limit = self._write_timeout if self._writing else self._keep_alive
            if still < limit:
                await asyncio.sleep(min(limit - still, self._keep_alive))
            elif self._writing:
                self._give_up(me)
                return
            else:
                writing = asyncio.ensure_future(self._write(send, KEEP_ALIVE))
                try:
                    await asyncio.wait({writing}, timeout=self._write_timeout)  # wait_for could lose a cancellation
                finally:
                    writing.cancel()
                if not writing.done():  # nothing of what was written before has been taken
                    self._give_up(me)
                    return

    async def _until_gone(self, me: asyncio.Task[Any], receive: Receive) -> None:
        await gone(receive)
        self._give_up(me)

    def _give_up(self, me: asyncio.Task[Any]) -> None:
        self._given_up = True
        me.cancel()


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _openai_error(error: ApiError) -> bytes:
    return error.event() + DONE
