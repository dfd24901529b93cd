"""What a connection may keep, below HTTP: time to ask something, unread answers, and a place among the others.

uvicorn closes connections that idle after an answer. It waits for ever for the first request, for the rest of one whose headers come
a byte at a time (slowloris), and for a client to read an answer that has been written: that is bounded here.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from dataclasses import dataclass
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from paceline.server.errors import ApiError, render

log = logging.getLogger("paceline.server")

LINGER_S = 5.0  # for what is left in a connection that is being closed

State = Literal["asking", "serving", "unread", "closing", "idle"]


@dataclass(frozen=True)
class Limits:
    """head_s: for the headers of a request, from the connection's opening or the request's first byte; unread_s: without any progress
    in reading an answer; unread_bytes: of an answer, before its maker waits; most: connections."""

    head_s: float = 20.0
    unread_s: float = 60.0
    unread_bytes: int = 256 << 10
    most: int = 4160


class Connection(H11Protocol):
    """One connection; looks at itself now and then, and ends when it has been in one state for too long."""

    def __init__(self, *args: Any, limits: Limits, **more: Any):
        super().__init__(*args, **more)
        self._limits = limits
        self._period = min(limits.head_s, limits.unread_s, LINGER_S) / 4
        self._seen: State = "asking"
        self._since = self.loop.time()
        self._unread = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._limits.unread_bytes)
        self._timer = self.loop.call_later(self._period, self._look)
        if len(self.connections) > self._limits.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def state(self) -> State:
        if self.transport.is_closing():
            return "closing"
        if self.cycle is not None and not self.cycle.response_complete:
            return "serving"  # others see to bodies that do not come and streams that nobody reads
        if self.transport.get_write_buffer_size():
            return "unread"
        if self.cycle is None or self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
            return "asking"
        return "idle"

    def _look(self) -> None:
        self._timer = self.loop.call_later(self._period, self._look)
        state, unread = self.state, self.transport.get_write_buffer_size()
        if state != self._seen or unread < self._unread or state == "serving":
            self._seen, self._since = state, self.loop.time()
        self._unread = unread
        allowed = {
            "asking": self._limits.head_s,
            "unread": self._limits.unread_s,
            "closing": min(LINGER_S, self._limits.unread_s),
            "idle": 2.0 * self.timeout_keep_alive,  # uvicorn's own timer comes first, unless something has stopped it
        }.get(state)
        if allowed is not None and self.loop.time() - self._since > allowed:
            log.debug("a connection is cut: %s for %g s", state, allowed)
            self.transport.abort()

    def _make_room(self) -> None:
        """Cut some of the connections that have waited longest without being served; this one if all are."""
        waiting = [c for c in self.connections if isinstance(c, Connection) and c is not self and c.state != "serving"]
        n = max(1, self._limits.most // 16)
        for c in heapq.nsmallest(n, waiting, key=lambda c: c._since) or [self]:
            c.transport.abort()
            self.connections.discard(c)

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP, in the shape of every other error."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of another answer
            self.transport.abort()
            return
        answer = render(ApiError(400, "this is no HTTP request, or its headers are too long"), {"path": ""})
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
