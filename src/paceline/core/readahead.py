"""Blocks read in the background for sequences that wait, so that computing never waits for a disk or a server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from paceline.core.blocks import Link

STAGED_BYTES = 1 << 30  # read, not yet in the cache
PATIENCE = 0.2  # seconds without a block after which a request goes on with what has come
NAP = 0.05  # seconds the engine waits at a time when it has nothing else to do

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """What is read for one sequence. links: its pages from the first on; arrived: payloads by key."""

    links: list[Link]
    arrived: dict[bytes, memoryview] = field(default_factory=dict)
    finished: threading.Event = field(default_factory=threading.Event)
    stopped: bool = False


class ReadAhead:
    """One thread that reads for all. read(link): a payload or None; skip(key): whether a block is at hand without it; both are called
    by that thread."""

    def __init__(self, read: Callable[[Link], memoryview | None], skip: Callable[[bytes], bool], n_block: int):
        self._read_block, self._skip, self._n_block = read, skip, n_block
        self._thread = ThreadPoolExecutor(1, "kv-tier-read")
        self._lock = threading.Lock()
        self._n_unfinished = 0
        self._progress = 0.0  # when it last got a block, or began
        self.n_staged = 0  # bytes

    def start(self, links: list[Link], worth: bool = True) -> Job:
        """A new job; one that is not worth the while has ended already."""
        job = Job(links)
        if not worth:
            job.finished.set()
            return job
        with self._lock:
            if not self._n_unfinished:
                self._progress = perf_counter()
            self._n_unfinished += 1
        self._thread.submit(self._run, job)
        return job

    def ready(self, job: Job, idle: bool) -> bool:
        """Whether waiting for a job is over, because it has ended or nothing comes any more; idle: wait a little here."""
        if job.stopped or job.finished.is_set():
            return True
        left = PATIENCE - (perf_counter() - self._progress)
        if left <= 0:
            job.stopped = True
            return True
        return idle and job.finished.wait(min(left, NAP))

    def arrived(self, job: Job, key: bytes) -> memoryview | None:
        with self._lock:
            return job.arrived.get(key)

    def release(self, job: Job) -> None:
        """Forget what a job has read, and read no more for it."""
        with self._lock:
            job.stopped = True
            self.n_staged -= len(job.arrived) * self._n_block
            job.arrived.clear()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Have something else done between jobs."""
        return self._thread.submit(call)

    def close(self) -> None:
        self._thread.shutdown()

    def _run(self, job: Job) -> None:
        """Read what is not at hand, until a block is missing."""
        try:
            for link in job.links:
                if job.stopped or self.n_staged + self._n_block > STAGED_BYTES:
                    break
                if self._skip(link.key):
                    continue
                payload = self._read_block(link)
                if payload is None:
                    break
                with self._lock:
                    self._progress = perf_counter()
                    if not job.stopped:
                        job.arrived[link.key] = payload
                        self.n_staged += self._n_block
        except Exception:  # a fault of ours must not let the request wait
            log.exception("a block could not be read from a KV tier")
        finally:
            with self._lock:
                self._n_unfinished -= 1
            job.finished.set()
