"""A request in the front's hands, and who is to blame when a worker dies.

After a death the requests in flight are suspects: they are resumed one at a time, alone, until each has got past the place where it
was. One that is alone with a worker when that dies was the cause, and is refused; the others go on. SIGKILL (an operator, or the
kernel when memory is out) says less about who was there, so it takes three times alone.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from paceline.core.types import Delta, FinishReason, Request, Resumed
from paceline.server import wire

MAX_PENDING = 8192  # pieces a stream may leave unread
CLEAR_AFTER = 2  # tokens of each completion past its place at a death that clear a suspect


Piece = Delta | wire.Ended | Exception
Pieces = asyncio.Queue["tuple[Stream, Piece]"]


@dataclass(eq=False)
class Stream:
    """One request: what it asked for, what has come, and a queue of what its reader has not taken yet."""

    request: Request
    tokens: list[list[int]]
    reasons: list[FinishReason | None]
    queue: Pieces = field(default_factory=asyncio.Queue)  # may be shared by several
    attempt: int = 0
    sent: bool = False  # to the present worker
    suspect: bool = False
    n_at_death: int = 0  # tokens it had then
    n_alone: int = 0  # deaths that nobody else can have caused
    done: bool = False

    @property
    def key(self) -> str:
        """Its id in the worker, different for each attempt, so that what an earlier one still sends is not taken twice."""
        return f"{self.request.id}#{self.attempt}"

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def submission(self) -> wire.Submit:
        """The next attempt, from where it stands."""
        self.attempt += 1
        self.sent = True
        had = tuple(Resumed(tuple(t), r) for t, r in zip(self.tokens, self.reasons, strict=True))
        return wire.Submit(replace(self.request, id=self.key), had if self.n_tokens else ())

    def take(self, delta: Delta) -> None:
        self.tokens[delta.index] += delta.token_ids
        self.reasons[delta.index] = delta.finish_reason
        self.queue.put_nowait((self, delta))

    def end(self, item: wire.Ended | Exception) -> None:
        if not self.done:
            self.done = True
            self.queue.put_nowait((self, item))


def blame(in_flight: list[Stream], code: int, others: bool = False) -> Stream | None:
    """Mark those in flight at a death as suspects; the one that is proved to be its cause, if any.

    code: of the process, negative for a signal. others: requests that were given up may still have been computed.
    """
    guilty = None
    if len(in_flight) == 1 and not others:
        (stream,) = in_flight
        stream.n_alone += 1
        if stream.suspect and (code != -signal.SIGKILL or stream.n_alone >= 3):
            guilty = stream
    for stream in in_flight:
        stream.sent, stream.suspect = False, True
        stream.n_at_death = max(stream.n_at_death, stream.n_tokens)
    return guilty


def clear(stream: Stream) -> bool:
    """Whether a suspect has got past the place where it was when its worker died, and so is none any more."""
    n_open = sum(reason is None for reason in stream.reasons)
    if not stream.suspect or stream.n_tokens < stream.n_at_death + CLEAR_AFTER * n_open:
        return False
    stream.suspect, stream.n_alone = False, 0
    return True


def next_moves(live: Iterable[Stream]) -> tuple[list[Stream], list[Stream]]:
    """Who is to be sent to the worker now and who is to be taken back from it: while there are suspects, one of them alone."""
    live = list(live)
    suspect = next((s for s in live if s.suspect and s.sent), None) or next((s for s in live if s.suspect), None)
    if suspect is None:
        return [s for s in live if not s.sent], []
    return ([] if suspect.sent else [suspect]), [s for s in live if s.sent and s is not suspect]
