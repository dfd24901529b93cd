"""Open-loop load over HTTP: requests go out when the trace says, whatever has become of the earlier ones.

Client and server share the machine's cores, so the client does as little as it can while the load lasts: bodies are made before, and
what comes back is kept as bytes with the time of arrival and read afterwards.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paceline.analysis.traffic import Arrival, scale

MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Job:
    """A request ready to be sent. body: JSON."""

    arrival: Arrival
    body: bytes


@dataclass
class Answer:
    """What became of a request. times: when each piece of text came, seconds on the clock of the arrivals; n_tokens: as the server
    counts them; late_s: how long after its time the request was sent; error: "" or why it is no answer."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)
    n_tokens: int = 0
    late_s: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival.at_s

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; 0 when there is only one."""
        return (self.times[-1] - self.times[0]) / (self.n_tokens - 1) if self.n_tokens > 1 else 0.0

    @property
    def e2e(self) -> float:
        return self.times[-1] - self.arrival.at_s

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces; a piece is one token, or several that came at once."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Run:
    """answers, one per job; window_s: how long load was offered; cpu: of the client, in cores."""

    answers: list[Answer]
    window_s: float
    cpu: float


# ---- what is sent


def window(trace: Sequence[Arrival], n: int, rate: float, turn: int) -> list[Arrival]:
    """n consecutive arrivals at `rate` requests per second; another part of the trace for every turn, and other blocks of prompts,
    so that nothing of an earlier turn is cached."""
    n = min(n, len(trace))
    start = (turn * 997) % (len(trace) - n + 1)
    part = trace[start : start + n]
    first = part[0].at_s
    marked = (replace(a, at_s=a.at_s - first, hash_ids=tuple((turn << 32) + i for i in a.hash_ids)) for a in part)
    return scale(list(marked), rate=rate)


def jobs(arrivals: Iterable[Arrival], n_vocab: int, seed: int, fields: Mapping[str, Any]) -> list[Job]:
    """Random prompts as token ids, so that every engine gets the same whatever its tokenizer; fields: of the body, besides."""
    out = []
    for i, a in enumerate(arrivals):
        body = {
            "model": "m",
            "prompt": a.tokens(n_vocab, seed * 1_000_003 + i),
            "max_tokens": a.n_output,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        out.append(Job(a, json.dumps({**body, **fields}).encode()))
    return out


async def offer(port: int, work: Sequence[Job], drain_s: float) -> Run:
    """Send every job at its time; wait `drain_s` seconds for what is then unfinished. window_s: from the first arrival until the
    next after the last would come, at the mean rate."""
    cpu, start = time.process_time(), time.perf_counter() + 0.05
    tasks = []
    for job in work:
        delay = start + job.arrival.at_s - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(_one(port, job, start)))
    await asyncio.wait(tasks, timeout=drain_s)
    for task in tasks:
        task.cancel()
    answers = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - start
    span = work[-1].arrival.at_s
    return Run(answers, span * len(work) / max(1, len(work) - 1), (time.process_time() - cpu) / seconds)


async def _one(port: int, job: Job, start: float) -> Answer:
    out = Answer(job.arrival, late_s=time.perf_counter() - start - job.arrival.at_s)
    received: list[tuple[float, bytes]] = []
    status = 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE)
        try:
            writer.write(_head(port, len(job.body)) + job.body)
            status, chunked = await _read_head(reader)
            async for data in _pieces(reader, chunked):
                received.append((time.perf_counter() - start, data))
        finally:
            writer.close()
    except asyncio.CancelledError:
        out.error = "not finished in time"
    except (OSError, asyncio.IncompleteReadError, ValueError) as e:
        out.error = f"{type(e).__name__}: {str(e)[:200]}"
    return read_answer(out, status, received)


def _head(port: int, length: int) -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the body comes in chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    return int(head.split(" ", 2)[1]), "transfer-encoding: chunked" in head


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> Any:
    """The body's bytes as they come (RFC 9112, section 7.1)."""
    if not chunked:
        while data := await reader.read(1 << 16):
            yield data
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


# ---- what came back


def events(received: Iterable[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """Server-sent events as (time, data): an event has the time of the piece that completed it. Comments are left out."""
    out, rest = [], b""
    for at, data in received:
        *whole, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in whole:
            lines = [x[5:].removeprefix(b" ") for x in block.split(b"\n") if x.startswith(b"data:")]
            if lines:
                out.append((at, b"\n".join(lines).decode()))
    return out


def read_answer(answer: Answer, status: int, received: Sequence[tuple[float, bytes]]) -> Answer:
    """Fill in what the server sent."""
    if status not in (0, 200):
        answer.error = (
            answer.error or f"HTTP {status}: {b''.join(d for _, d in received)[:200].decode(errors='replace')}"
        )
        return answer
    for at, data in events(received):
        if data == "[DONE]":
            break
        value = json.loads(data)
        if "error" in value:
            answer.error = answer.error or str(value["error"])[:200]
        if any(c.get("text") for c in value.get("choices") or ()):
            answer.times.append(at)
        if value.get("usage"):
            answer.n_tokens = value["usage"]["completion_tokens"]
    if not answer.error and (answer.n_tokens != answer.arrival.n_output or not answer.times):
        answer.error = f"{answer.n_tokens} tokens instead of {answer.arrival.n_output}"
    return answer


# ---- figures


@dataclass(frozen=True)
class Targets:
    """Seconds within which an answer is a good one: first token, and each further token on average."""

    ttft: float
    tpot: float

    def met(self, a: Answer) -> bool:
        return not a.error and a.ttft <= self.ttft and a.tpot <= self.tpot


def percentile(values: Sequence[float], q: float) -> float | None:
    """By linear interpolation; q in percent. None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(runs: Sequence[Run], targets: Targets) -> dict[str, Any]:
    """Of one engine at one rate, over all rounds. Requests/s, tokens/s, seconds.

    goodput: answers within the targets per second of offered load, so that it is at most the offered rate; what failed or was not
    finished in time is not within them, and has no part in the percentiles.
    """
    answers = [a for r in runs for a in r.answers]
    done = [a for a in answers if not a.error]
    good = [sum(map(targets.met, r.answers)) / r.window_s for r in runs]
    busy = sum(max((a.times[-1] for a in r.answers if a.times), default=0.0) for r in runs)
    out: dict[str, Any] = {
        "requests": len(answers),
        "errors": len(answers) - len(done),
        "first_error": next((a.error for a in answers if a.error), ""),
        "met": sum(map(targets.met, answers)) / len(answers),
        "goodput": statistics.fmean(good),
        "goodput_rounds": good,
        "tokens_per_s": sum(a.n_tokens for a in done) / busy if busy else 0.0,
        "client_cpu": max(r.cpu for r in runs),
        "late_p99": percentile([a.late_s for a in answers], 99),
    }
    gaps = [g for a in done for g in a.gaps]
    every = {"ttft": [a.ttft for a in done], "tpot": [a.tpot for a in done], "e2e": [a.e2e for a in done], "gap": gaps}
    return out | {f"{name}_p{q}": percentile(values, q) for name, values in every.items() for q in (50, 99)}


def capacity(run: Run) -> float:
    """Requests per second of a burst, from its begin to the last answer. Raises RuntimeError when one failed."""
    failed = next((a.error for a in run.answers if a.error), "")
    if failed:
        raise RuntimeError(failed)
    return len(run.answers) / max(a.times[-1] for a in run.answers)
