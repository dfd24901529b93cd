"""Keeps one model served: starts its worker, and goes on in a new one when it dies, without losing or repeating a token.

The front knows every request with its seed and all tokens that have come, and tokens are a function of these, so a new worker continues
each stream where it stood. `streams` says who may run after a death.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from paceline.core.config import EngineConfig
from paceline.core.errors import CheckpointError, ConfigError, OutOfMemory, PacelineError, RequestError, TemplateError
from paceline.core.types import Delta, Request
from paceline.server import wire
from paceline.server.errors import Fault, Unavailable
from paceline.server.streams import MAX_PENDING, Piece, Pieces, Stream, blame, clear, next_moves

log = logging.getLogger("paceline.server")

_ERRORS = {e.__name__: e for e in (ConfigError, CheckpointError, OutOfMemory, RequestError, TemplateError)}
COMMAND = (sys.executable, "-m", "paceline.server.worker")
STOP_S = 5.0  # for a worker to stop when told to
GRACE_S = 2.0  # for one that has closed its socket to end
AGAIN_S = 1.0  # until a process is asked for again where none was to be had

State = Literal["starting", "ready", "restarting", "stopping", "failed"]


@dataclass(frozen=True)
class Restarts:
    """At most `most` restarts in any `window_s`; a step that takes longer than `step_s` counts as a death."""

    most: int = 8
    window_s: float = 60.0
    step_s: float = 300.0


class Supervisor:
    """One worker at a time for one model. All methods belong to the event loop's thread.

    observe: called with every `Stepped`, for metrics. command: what to start; its last argument becomes the socket's number.
    """

    def __init__(
        self,
        model: str | None,
        config: EngineConfig,
        restarts: Restarts | None = None,
        observe: Callable[[wire.Stepped], None] = lambda stepped: None,
        command: Sequence[str] = COMMAND,
    ):
        self.model, self.config = model, config
        self.restarts, self.observe, self.command = restarts or Restarts(), observe, tuple(command)
        self.state: State = "starting"
        self.ready: wire.Ready | None = None
        self.loading: wire.Loading | None = None
        self.gauge = wire.Gauge(0, 0, 0.0, {})
        self.n_restarts = 0
        self.pid: int | None = None
        self._live: dict[str, Stream] = {}
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._leaving: set[str] = set()  # keys aborted, of which the worker has not said yet that they ended
        self._deaths: deque[float] = deque()
        self._heard = 0.0  # when the worker last said anything, or was given work
        self._link: _Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    # ---- life

    async def start(self) -> wire.Ready:
        """Start a worker and wait until it has loaded the model. Raises the PacelineError that it met."""
        self.ready, self.state = None, "starting"
        task = self._task = asyncio.create_task(self._supervise())
        await self._until(lambda: self.ready is not None or task.done())
        if self.ready is None:
            await task  # raises what it met
            raise Unavailable("the worker did not start")
        return self.ready

    async def stop(self) -> None:
        """End the worker. Streams that are still open end with Unavailable."""
        await self._set("stopping")
        self._fail_all(Unavailable("the server is shutting down"))
        await self._end_worker()

    async def _end_worker(self) -> None:
        """Stop the worker and its supervision; by force when it takes too long."""
        task, self._task = self._task, None
        if self._link is not None:
            self._link.send(wire.Stop())
        if task is not None:
            await asyncio.wait({task}, timeout=STOP_S)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, PacelineError):
                await task

    # ---- requests

    def problems(self, request: Request) -> list[str]:
        """Everything that stands against a request. Raises Unavailable when no worker will be there to serve it."""
        if self.state in ("stopping", "failed") or self.ready is None:
            why = {
                "failed": "the engine has failed too often and was given up",
                "stopping": "the server is shutting down",
            }
            raise Unavailable(why.get(self.state, "the model is being loaded"))
        problems = self.ready.serving.problems(request)
        if request.id in self._live:
            problems.append(f"id = {request.id!r}: a request of this id is being served")
        return problems

    def submit(self, request: Request, queue: Pieces | None = None) -> Stream:
        """Serve a request. Raises RequestError when it cannot be, Unavailable when no worker will be there to."""
        problems = self.problems(request)
        if problems:
            raise RequestError("; ".join(problems))
        if request.params.seed is None:  # known here, so that another worker can go on with it
            request = replace(request, params=request.params.with_(seed=secrets.randbits(62)))
        n = request.params.n if request.generate else 1
        stream = Stream(request, [[] for _ in range(n)], [None] * n, queue or asyncio.Queue())
        self._live[request.id] = stream
        self._dispatch()
        return stream

    async def serve(
        self, requests: Sequence[Request], deadline_s: float | None = None, window: int | None = None
    ) -> AsyncIterator[list[tuple[int, Delta | wire.Ended]]]:
        """All that comes for these requests, as it comes: (which request, piece), whatever has gathered at a time.

        window: at most so many of them are in hand at once, the next following when one ends; None: all.

        Each ends with its Ended. Leaving the iteration aborts them all. Raises RequestError, before anything is served, when one
        cannot be; Fault or Unavailable when one could not be served to its end, or not within deadline_s seconds.
        """
        problems = [p for r in requests for p in self.problems(r)]
        if problems:
            raise RequestError("; ".join(dict.fromkeys(problems)))
        queue: Pieces = asyncio.Queue()
        places: dict[Stream, int] = {}
        waiting = iter(enumerate(requests))
        n_open, timer = len(requests), None
        try:
            for i, r in itertools.islice(waiting, window):
                places[self.submit(r, queue)] = i
            if deadline_s is not None:
                late = (next(iter(places)), Unavailable("the request took longer than this server allows"))
                timer = asyncio.get_running_loop().call_later(deadline_s, queue.put_nowait, late)
            while n_open:
                items = []
                for stream, item in await _gathered(queue):
                    if isinstance(item, Exception):
                        raise item
                    if isinstance(item, wire.Ended):
                        n_open -= 1
                        for i, r in itertools.islice(waiting, 1):
                            places[self.submit(r, queue)] = i
                    items.append((places[stream], item))
                yield items
        finally:
            if timer is not None:
                timer.cancel()
            for stream in places:
                self.abort(stream)

    def abort(self, stream: Stream) -> None:
        """Give a request up, whatever it is doing."""
        if self._live.pop(stream.request.id, None) is None:
            return
        self._take_back(stream)
        stream.done = True
        self._dispatch()

    async def ask(self, verb: str, timeout_s: float = 30.0, **arguments: Any) -> Any:
        """Ask the worker something (`worker.Worker.verbs`). Raises RequestError with its objection, Unavailable when it dies."""
        if self._link is None or self.state != "ready":
            raise Unavailable("the worker is not ready")
        future = asyncio.get_running_loop().create_future()
        id = next(self._ids)
        self._asked[id] = future
        self._link.send(wire.Ask(id, verb, arguments))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.TimeoutError:
            raise Unavailable(f"{verb}: no answer within {timeout_s:g} s") from None
        finally:
            self._asked.pop(id, None)

    @property
    def n_live(self) -> int:
        return len(self._live)

    @property
    def n_unsent(self) -> int:
        """Requests that wait for a worker."""
        return sum(not s.sent for s in self._live.values())

    def _dispatch(self) -> None:
        """Send what may be sent."""
        if self._link is None or self.state != "ready":
            return
        to_send, to_take_back = next_moves(self._live.values())
        if to_send and not self._busy:
            self._heard = time.monotonic()
        for stream in to_take_back:
            self._take_back(stream)
        if self._leaving and any(s.suspect for s in to_send):
            return  # a suspect is sent when nothing else can be running: only then does a death prove anything
        for stream in to_send:
            try:
                self._link.send(stream.submission())
            except (OverflowError, TypeError, ValueError) as e:  # it cannot be written down, which is its fault alone
                del self._live[stream.request.id]
                stream.end(RequestError(f"the request cannot be sent to the engine ({e})"))

    @property
    def _busy(self) -> bool:
        """Whether the worker has something to compute, as far as is known."""
        return bool(self._leaving) or any(s.sent for s in self._live.values())

    def _take_back(self, stream: Stream) -> None:
        if stream.sent and self._link is not None:
            self._link.send(wire.Abort(stream.key))
            self._leaving.add(stream.key)
        stream.sent = False

    # ---- the worker

    async def _supervise(self) -> None:
        """Run workers until one is stopped or too many have died."""
        me = asyncio.current_task()
        while True:
            code, problem = await self._run_worker()
            if self._task is not me:  # stopped
                return
            if isinstance(problem, PacelineError):
                await self._give_up(str(problem))
                raise problem
            if not await self._after_death(code, problem):
                return

    async def _run_worker(self) -> tuple[int, Any]:
        """Serve by one worker to its end: its exit code, and what ended it. None is left running, whatever ends this."""
        try:
            link = self._link = _Link(self.command)
        except OSError as e:  # no process or descriptor to be had
            await asyncio.sleep(AGAIN_S)
            return 1, f"it cannot be started: {e}"
        self.pid = link.process.pid
        watch = asyncio.create_task(self._watch(link))
        problem, grace, code = None, 0.0, 1
        try:
            await link.open()
            link.send(wire.Start(self.model, self.config))
            problem, grace = await self._listen(link), GRACE_S
        except Exception as e:  # a fault of ours too must not leave streams waiting for ever
            log.error("listening to the worker failed", exc_info=e)
            problem = f"{type(e).__name__}: {e}"
        finally:
            watch.cancel()
            self._link = self.pid = None
            code = await link.end(grace)
        return code, problem

    async def _watch(self, link: _Link) -> None:
        """End a worker that computes nothing though it has work: a deadlock is a death too."""
        while True:
            await asyncio.sleep(min(5.0, self.restarts.step_s / 4))
            if self.state == "ready" and self._busy and time.monotonic() - self._heard > self.restarts.step_s:
                log.error("the worker has not finished a step within %g s", self.restarts.step_s)
                link.process.kill()

    async def _listen(self, link: _Link) -> Any:
        """Take messages until the worker is gone; a PacelineError when it could not load, else a word on how it ended."""
        while (message := await link.receive()) is not None:
            self._heard = time.monotonic()
            match message:
                case wire.Stepped():
                    self._stepped(message)
                case wire.Refused(key, text):
                    self._finish(key, RequestError(text))
                    self._dispatch()
                case wire.Told(id, result, error):
                    future = self._asked.get(id)
                    if future is not None and not future.done():
                        future.set_result(result) if error is None else future.set_exception(RequestError(error))
                case wire.Loading():
                    self.loading = message
                case wire.Ready():
                    if self.state != "stopping":
                        self.ready = message
                        await self._set("ready")
                        self._dispatch()
                case wire.Failed(kind, problems):
                    made = _ERRORS.get(kind, PacelineError)
                    return made(problems) if made is ConfigError else made("; ".join(problems))
        return "it closed its socket"

    def _of(self, key: str) -> Stream | None:
        """The stream of a worker's request, unless that attempt has been given up."""
        stream = self._live.get(key.rpartition("#")[0])
        return stream if stream is not None and stream.sent and stream.key == key else None

    def _stepped(self, message: wire.Stepped) -> None:
        if message.gauge is not None:
            self.gauge = message.gauge
        changed = bool(message.ended)
        for delta in message.deltas:
            stream = self._of(delta.request)
            if stream is None:
                continue
            stream.take(delta)
            changed |= clear(stream)
            if stream.queue.qsize() > MAX_PENDING:
                self._take_back(stream)
                self._live.pop(stream.request.id)
                stream.end(Unavailable("the reader is too slow"))
                changed = True
        for end in message.ended:
            self._finish(end.id, end if end.error is None else Fault(end.error))
        if changed:  # not before the whole step is known: who is cleared by it may have ended in it
            self._dispatch()
        self.observe(message)

    def _finish(self, key: str, item: wire.Ended | Exception) -> None:
        self._leaving.discard(key)
        stream = self._of(key)
        if stream is not None:
            del self._live[stream.request.id]
            stream.end(item)

    async def _after_death(self, code: int, problem: Any) -> bool:
        """Sort out who is to blame and whether there may be another worker."""
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        in_flight = [s for s in self._live.values() if s.sent]
        log.error("the worker died (%s; %s); %d requests in flight", how, problem, len(in_flight))
        for future in self._asked.values():
            if not future.done():
                future.set_exception(Unavailable("the worker died"))
        guilty = blame(in_flight, code, others=bool(self._leaving))
        self._leaving.clear()
        if guilty is not None:
            log.error("request %s is refused: it ends the worker (%s)", guilty.request.id, how)
            del self._live[guilty.request.id]
            guilty.end(Fault(f"this request ends the engine ({how}); it was not tried again"))
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > self.restarts.window_s:
            self._deaths.popleft()
        if len(self._deaths) > self.restarts.most:
            await self._give_up(f"{len(self._deaths)} workers died within {self.restarts.window_s:g} s")
            return False
        self.n_restarts += 1
        if self.state == "ready":
            await self._set("restarting")
        return True

    async def _give_up(self, why: str) -> None:
        log.critical("no worker any more: %s", why)
        await self._set("failed")
        self._fail_all(Unavailable("the engine has failed and was given up"))

    def _fail_all(self, error: Exception) -> None:
        for stream in self._live.values():
            stream.end(error)
        self._live.clear()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)

    async def _set(self, state: State) -> None:
        self.state = state
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            async with self._changed:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.05)


async def _gathered(queue: Pieces) -> list[tuple[Stream, Piece]]:
    """The next items of a queue, all that are there."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items


class _Link:
    """A worker process and the front's end of its socket."""

    def __init__(self, command: Sequence[str]):
        self._codec = wire.Codec(wire.Codec.TO_FRONT)
        self._sock, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen([*command, str(fd)], pass_fds=[fd], stdin=subprocess.DEVNULL)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(sock=self._sock, limit=1 << 22)

    def send(self, message: wire.Message) -> None:
        """Queue a message; one to a dead worker is lost, as its death is noticed elsewhere."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(self._codec.frame(message))

    async def receive(self) -> Any:
        """The next message; None when the worker is gone."""
        assert self._reader is not None
        try:
            header = await self._reader.readexactly(wire.HEADER)
            return self._codec.decode(await self._reader.readexactly(wire.length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def end(self, grace_s: float) -> int:
        """Close the socket, which ends a worker in good health, and kill it after grace_s seconds; its exit code."""
        if self._writer is not None:
            self._writer.close()
        else:
            self._sock.close()
        try:
            end = time.monotonic() + grace_s
            while self.process.poll() is None and time.monotonic() < end:
                await asyncio.sleep(0.005)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            code = self.process.wait()
        return code
