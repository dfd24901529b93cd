"""The worker process: one model, one engine, one loop.

Started by `supervisor` as `python -m paceline.server.worker FD` with one end of a socket pair. It reads what to load, then takes requests
and sends what every step brings. It holds nothing that the front does not know: when it dies, another goes on in its place.
"""

from __future__ import annotations

import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from paceline.analysis.probe import Probe
from paceline.assemble import Assembled, assemble
from paceline.core.engine import Engine
from paceline.core.errors import ConfigError, PacelineError, RequestError
from paceline.core.tiers import Tiers
from paceline.core.types import Output
from paceline.server import wire

GAUGE_EVERY_S = 0.2

Verb = Callable[..., Any]


class Worker:
    """Serves an engine over a socket until it is told to stop, or the front is gone."""

    def __init__(self, sock: socket.socket, codec: wire.Codec, assembled: Assembled):
        self._sock, self._codec = sock, codec
        self.engine: Engine = assembled.engine
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        probe = Probe(self.engine.runner, assembled.inspected.plan, self._idle)
        self.verbs: dict[str, Verb] = {
            "operators": probe.ask,
            "load_adapter": lambda name, path: self.engine.load_adapter(name, path).digest,
            "unload_adapter": lambda name: self.engine.unload_adapter(name),
            **cache_verbs(self.engine.runner.parts.tiers),
        }
        self._sending = threading.Lock()  # tiers answer from their own threads
        self._told = 0.0  # when the last gauge was sent
        self._stale = True  # whether anything has changed since

    def run(self) -> None:
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        threading.Thread(target=self._trust, name="trust", daemon=True).start()
        engine = self.engine
        while self._take_all():
            self._stale = True
            deltas, outputs = engine.step()
            due = time.monotonic() - self._told >= GAUGE_EVERY_S
            self.send(wire.Stepped(deltas, [ended(o) for o in outputs], self._gauge() if due else None))

    def _trust(self) -> None:
        """Tell the parts that want to know that requests come from the front, which has checked them."""
        for part in self.engine.runner.parts.logits:
            trust = getattr(part, "trust", None)
            if trust is not None:
                trust()

    def _idle(self) -> bool:
        return not self.engine.has_work and self._inbox.empty()

    def send(self, message: wire.Message) -> None:
        with self._sending:
            self._sock.sendall(self._codec.frame(message))

    def _read(self) -> None:
        try:
            while (message := wire.receive(self._sock, self._codec)) is not None:
                self._inbox.put(message)
        except OSError:
            pass
        self._inbox.put(wire.Stop())

    def _take_all(self) -> bool:
        """Take what has come in, waiting while there is nothing to compute; False at the end."""
        while True:
            idle = not self.engine.has_work
            if idle and self._stale and self._inbox.empty():
                # The last words before a silence: which requests were aborted, and how things stand.
                deltas, outputs = self.engine.step()
                self.send(wire.Stepped(deltas, [ended(o) for o in outputs], self._gauge()))
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if isinstance(message, wire.Stop):
                return False
            self._stale = True
            self._take(message)

    def _take(self, message: Any) -> None:
        match message:
            case wire.Submit(request, resumed):
                try:
                    self.engine.add(request, resumed=resumed)
                except RequestError as e:
                    self.send(wire.Refused(request.id, str(e)))
            case wire.Abort(id):
                self.engine.abort(id)
            case wire.Ask(id, verb, arguments):
                self._answer(id, verb, arguments)

    def _answer(self, id: int, verb: str, arguments: dict[str, Any]) -> None:
        try:
            if verb not in self.verbs:
                raise RequestError(f"{verb!r}: the worker knows {', '.join(sorted(self.verbs)) or 'no orders'}")
            result = self.verbs[verb](**arguments)
            if isinstance(result, Future):
                result.add_done_callback(lambda done: self._told_later(id, done))
            else:
                self.send(wire.Told(id, result))
        except (PacelineError, TypeError, ValueError, ArithmeticError) as e:
            self.send(wire.Told(id, error=str(e)))

    def _told_later(self, id: int, done: Future[Any]) -> None:
        error = done.exception()
        self.send(wire.Told(id, done.result()) if error is None else wire.Told(id, error=str(error)))

    def _gauge(self) -> wire.Gauge:
        self._told, self._stale = time.monotonic(), False
        return gauge(self.engine)


def cache_verbs(tiers: Tiers | None) -> dict[str, Verb]:
    """Orders to the tiers below the KV cache. All answer with plain data, or raise RequestError."""

    def on() -> Tiers:
        if tiers is None:
            raise RequestError("no KV tier is on; start with --use kvcache/ram, kvcache/disk or kvcache/redis")
        return tiers

    return {
        "cache_stats": lambda: on().stats(),
        "cache_lookup": lambda tokens, salt: on().lookup(tokens, salt),
        "cache_pin": lambda tokens, salt: on().pin(tokens, salt),
        "cache_unpin": lambda tokens, salt: on().unpin(tokens, salt),
        "cache_move": lambda tokens, salt, source, target: on().move(tokens, source, target, salt),
        "cache_clear": lambda tier, salt: on().clear(tier, salt),
    }


def gauge(engine: Engine) -> wire.Gauge:
    """How the engine stands."""
    scheduler, stats = engine.runner.scheduler, engine.stats
    pages = engine.runner.cache.stats()
    n_pages = sum(p["n_pages"] for p in pages)
    n_held = sum(p["n_used"] - p["n_idle"] for p in pages)  # idle pages are free for the asking
    counters: dict[str, float] = {
        "steps": engine.runner.n_steps,
        "requests": stats.n_requests,
        "prompt_tokens": stats.n_prompt_tokens,
        "cached_tokens": stats.n_cached_tokens,
        "generation_tokens": stats.n_output_tokens,
        "preemptions": scheduler.n_preempted,
    }
    prefix = engine.runner.parts.prefix
    for name, value in (prefix.stats() if hasattr(prefix, "stats") else {}).items():  # type: ignore[union-attr]
        counters[f"prefix_{name}"] = value
    return wire.Gauge(len(scheduler.running), len(scheduler.waiting), n_held / max(1, n_pages), counters)


def ended(output: Output) -> wire.Ended:
    """An output without what the stream has already told."""
    first = output.sequences[0]
    pooled = None if first.pooled is None else np.asarray(first.pooled, np.float32).tobytes()
    return wire.Ended(
        output.id,
        output.n_cached,
        output.n_preempted,
        output.timing,
        output.error,
        output.prompt_logprobs,
        pooled,
    )


def load(sock: socket.socket, codec: wire.Codec, start: wire.Start) -> Worker | None:
    """The worker for what was asked; None when it cannot be had, which the front has been told."""

    def tell(message: wire.Message) -> None:
        sock.sendall(codec.frame(message))

    before = time.monotonic()
    try:
        assembled = assemble(start.model, start.config, progress=_at_most_every(0.1, tell))
    except PacelineError as e:
        problems = e.problems if isinstance(e, ConfigError) else [str(e)]
        tell(wire.Failed(type(e).__name__, tuple(problems)))
        return None
    plan, engine = assembled.inspected.plan, assembled.engine
    dropped = (f"{name} is off: {why}" for name, why in plan.refused.items())
    notes = (*plan.notes, *plan.model.notes, *assembled.model.notes, *dropped)
    digests = {name: adapter.digest for name, adapter in engine.adapters.loaded.items()}
    took = time.monotonic() - before
    ready = wire.Ready(engine.serving, wire.plain(plan.describe()), notes, plan.fingerprint, took, digests)
    tell(ready)
    return Worker(sock, codec, assembled)


def _at_most_every(seconds: float, tell: Callable[[wire.Message], None]) -> Callable[[int, int, str], None]:
    last = 0.0

    def progress(done: int, total: int, title: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds or done == total:
            last = now
            tell(wire.Loading(done, total, title))

    return progress


def main(fd: int) -> int:
    """Exit code 0: told to stop; 1: a fault of ours, told on stderr; 2: what was asked cannot be served."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the whole group; the front decides what they mean
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    codec = wire.Codec(wire.Codec.TO_WORKER)
    start = wire.receive(sock, codec)
    if start is None:
        return 0
    worker = load(sock, codec, start)
    if worker is None:
        return 2
    try:
        worker.run()
        worker.engine.close()
    except (BrokenPipeError, ConnectionResetError):  # the front is gone
        return 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
