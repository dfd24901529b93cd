"""Batches: a file of requests in OpenAI's batch format, answered by the same routes that serve HTTP, without listening.

https://platform.openai.com/docs/guides/batch. A line is {"custom_id", "method": "POST", "url", "body"}; an answer
{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}. Answers are written as they come, in any order; a run that
was interrupted goes on where it stopped. Requests are taken in the order of their text, so that equal beginnings meet in the
prefix cache, and equal requests whose answer is certain (temperature 0, or a seed) are computed once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from starlette.types import ASGIApp

from paceline.core.errors import RequestError

MAX_LINE = 64 << 20
MAX_REQUESTS = 1_000_000
MAX_PROBLEMS = 10
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One request of the file."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


@dataclass(frozen=True)
class Task:
    """Requests of one batch that share their answer. key: by what they are sorted."""

    line: Line
    ids: tuple[str, ...]
    key: bytes


def read(path: Path) -> list[Line]:
    """The requests of a file. Raises RequestError naming every line that is none, at most ten."""
    found: list[Line] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, raw in _lines(path):
        try:
            line = msgspec.json.decode(raw, type=Line)
        except (msgspec.DecodeError, RecursionError) as e:
            problems.append(f"line {number}: {e}")
            continue
        if line.custom_id in seen:
            problems.append(f"line {number}: custom_id {line.custom_id[:100]!r} is given twice")
        if line.url not in URLS or line.method != "POST":
            problems.append(f"line {number}: {line.method} {line.url[:100]!r} must be POST to one of {', '.join(URLS)}")
        if line.body.get("stream"):
            problems.append(f"line {number}: body.stream must not be set, as answers are written whole")
        seen.add(line.custom_id)
        found.append(line)
        if len(found) > MAX_REQUESTS:
            raise RequestError(f"{path}: more than {MAX_REQUESTS:,} requests; split the file")
    if problems:
        more = f"\n- and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise RequestError(f"{path}: {len(problems)} problems:\n- " + "\n- ".join(problems[:MAX_PROBLEMS]) + more)
    if not found:
        raise RequestError(f"{path}: has no requests")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as f:
            for number in range(1, 2 * MAX_REQUESTS):
                raw = f.readline(MAX_LINE + 1)
                if not raw:
                    return
                if len(raw) > MAX_LINE:
                    raise RequestError(f"{path}: line {number} is longer than {MAX_LINE >> 20} MiB")
                if raw.strip():
                    yield number, raw
    except OSError as e:
        raise RequestError(f"{path}: cannot be read ({e.strerror})") from None


def done_before(path: Path) -> set[str]:
    """Ids that an output file has already answered with success; what an interruption left of its last line is cut off."""
    if not path.exists():
        return set()
    found: set[str] = set()
    whole = 0
    with path.open("rb+") as f:
        for raw in f:
            if not raw.endswith(b"\n"):
                break
            try:
                answer = msgspec.json.decode(raw)
                if answer["response"]["status_code"] == 200:
                    found.add(answer["custom_id"])
            except (msgspec.DecodeError, KeyError, TypeError):
                raise RequestError(f"{path}: is no batch output; choose another --output, or remove it") from None
            whole += len(raw)
        f.truncate(whole)
    return found


def tasks(lines: Sequence[Line]) -> list[Task]:
    """Requests in the order of their text, equal certain ones together."""
    together: dict[Any, list[Line]] = {}
    for line in lines:
        certain = line.body.get("temperature") == 0 or line.body.get("seed") is not None
        text = msgspec.json.encode((line.url, line.body), order="sorted")
        together.setdefault(hashlib.sha256(text).digest() if certain else line.custom_id, []).append(line)
    made = [Task(same[0], tuple(x.custom_id for x in same), _beginning(same[0])) for same in together.values()]
    return sorted(made, key=lambda t: t.key)


def _beginning(line: Line) -> bytes:
    """What the prompt begins with, so that sorting brings common beginnings together."""
    body = line.body
    what = [
        body.get("model"),
        body.get("tools"),
        body.get("instructions"),
        body.get("messages", body.get("prompt", body.get("input"))),
    ]
    return msgspec.json.encode(what)[:65536]


async def run(
    app: ASGIApp,
    todo: Sequence[Task],
    output: BinaryIO,
    at_once: int,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> dict[str, int]:
    """Answer all tasks, at_once at a time, each written as it comes. Counts: requests, failed."""
    counts = {"requests": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
    n = sum(len(t.ids) for t in todo)
    waiting = iter(todo)

    async def worker() -> None:
        for task in waiting:
            status, body = await post(app, task.line.url, msgspec.json.encode(task.line.body))
            answer = msgspec.json.decode(body)
            for id in task.ids:
                request_id = f"batch_req_{secrets.token_hex(12)}"
                response = {"status_code": status, "request_id": request_id, "body": answer}
                error = None if status == 200 else answer.get("error")
                output.write(
                    msgspec.json.encode({"id": request_id, "custom_id": id, "response": response, "error": error})
                    + b"\n"
                )
                counts["requests"] += 1
                counts["failed"] += status != 200
            output.flush()
            _add_usage(counts, answer.get("usage"))
            progress(counts["requests"], n)

    try:
        await asyncio.gather(*(worker() for _ in range(min(at_once, len(todo)))))
    finally:
        output.flush()
        os.fsync(output.fileno())
    return counts


def _add_usage(counts: dict[str, int], usage: Any) -> None:
    if isinstance(usage, dict):
        for name in ("prompt_tokens", "completion_tokens"):
            counts[name] += usage.get(name) or 0
        counts["cached_tokens"] += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def post(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """A POST to an ASGI application: status and body of its answer."""
    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "client": None, "server": None,
    }  # fmt: skip
    sent = False
    status, parts = 500, []

    async def receive() -> Any:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # nobody leaves
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
