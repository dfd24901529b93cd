"""Innocent neighbours of the chaos run: requests whose every token, text, log-probability and end is known beforehand."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx

WORDS = re.findall(
    r"\S+",
    "the quick brown fox def class return import list of cities Paris naïve 東京 🙂 print value 42 = + - ( ) ; and or not",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 10}, "days": {"type": "integer", "maximum": 9}},
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["city", "tags"],
    "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    kind: str
    path: str
    body: dict[str, Any]
    streams: bool = True


def asks(seed: int, n: int) -> list[Ask]:
    """n requests of all kinds, the same for the same seed."""
    draw = random.Random(seed)
    kinds = [
        _plain,
        _sampled,
        _many,
        _logprobs,
        _scored,
        _stops,
        _regex,
        _schema,
        _chat,
        _chat_logprobs,
        _tools,
        _prompts,
    ]
    return [kinds[i % len(kinds)](draw) for i in range(n)]


def _text(draw: random.Random, n: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(n))


def _completion(kind: str, draw: random.Random, streams: bool = True, **more: Any) -> Ask:
    body = {"prompt": _text(draw, draw.randrange(4, 120)), "seed": draw.randrange(1 << 40), "return_token_ids": True}
    body |= {"max_tokens": draw.randrange(8, 160), "temperature": draw.choice([0, 1.0]), **more}
    return Ask(kind, "/v1/completions", body, streams)


def _conversation(kind: str, draw: random.Random, **more: Any) -> Ask:
    system = "You are terse. " + _text(random.Random(1), 60)  # shared, so that prefixes are
    messages = [{"role": "system", "content": system}, {"role": "user", "content": _text(draw, draw.randrange(3, 60))}]
    body = {"messages": messages, "seed": draw.randrange(1 << 40), "return_token_ids": True, "temperature": 1.0}
    return Ask(kind, "/v1/chat/completions", {**body, "max_tokens": draw.randrange(8, 120), **more})


def _plain(draw: random.Random) -> Ask:
    return _completion("plain", draw, temperature=0, ignore_eos=True, max_tokens=draw.randrange(100, 300))


def _sampled(draw: random.Random) -> Ask:
    return _completion("sampled", draw, temperature=1.0, top_p=0.97, presence_penalty=0.5, ignore_eos=True)


def _many(draw: random.Random) -> Ask:
    return _completion("n>1", draw, n=draw.randrange(2, 7), temperature=1.0, prompt_logprobs=draw.choice([None, 1]))


def _logprobs(draw: random.Random) -> Ask:
    return _completion("logprobs", draw, logprobs=draw.randrange(5), temperature=1.0)


def _scored(draw: random.Random) -> Ask:
    return _completion("echo", draw, streams=False, echo=True, logprobs=1, max_tokens=draw.choice([0, 20]))


def _stops(draw: random.Random) -> Ask:
    return _completion("stop", draw, stop=[" e", "\n\n", "ing"], temperature=1.0, ignore_eos=True)


def _regex(draw: random.Random) -> Ask:
    return _completion("regex", draw, structured_outputs={"regex": r"[a-z]{3,40}( [a-z]{2,9}){4,9}\."}, temperature=1.0)


def _schema(draw: random.Random) -> Ask:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    return _conversation("schema", draw, response_format=form, n=draw.choice([1, 2]))


def _chat(draw: random.Random) -> Ask:
    return _conversation("chat", draw, n=draw.choice([1, 3]))


def _chat_logprobs(draw: random.Random) -> Ask:
    return _conversation("chat logprobs", draw, logprobs=True, top_logprobs=draw.randrange(4))


def _tools(draw: random.Random) -> Ask:
    return _conversation("tools", draw, tools=[TOOL], tool_choice="required", max_tokens=150)


def _prompts(draw: random.Random) -> Ask:
    return _completion("prompts", draw, prompt=[_text(draw, 30), _text(draw, 9), _text(draw, 50)], n=2, max_tokens=40)


class Refused(Exception):
    """503 with Retry-After before anything was served."""


class Wrong(Exception):
    """An answer that no innocent request may get."""


async def answer(http: httpx.AsyncClient, ask: Ask, stream: bool) -> list[dict[str, Any]]:
    """The choices of an answer in one form, streamed or whole. Raises Refused, Wrong or httpx.HTTPError."""
    if not stream:
        found = await http.post(ask.path, json=ask.body)
        _check(found.status_code, found.headers, found.text)
        return [_whole(c, ask.path) for c in found.json()["choices"]]
    pieces: list[dict[str, Any]] = []
    done = False
    async with http.stream("POST", ask.path, json={**ask.body, "stream": True}) as found:
        if found.status_code != 200:
            _check(found.status_code, found.headers, (await found.aread()).decode())
        async for line in found.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                pieces.append(json.loads(line[6:]))
            done |= line == "data: [DONE]"
    errors = [p["error"] for p in pieces if "error" in p]
    if errors or not done:
        raise Wrong(f"a stream ended with {errors}, [DONE]: {done}, after {len(pieces)} chunks")
    return _folded([c for p in pieces for c in p["choices"]], ask.path)


def _check(status: int, headers: httpx.Headers, text: str) -> None:
    if status == 503 and headers.get("retry-after"):
        raise Refused(text)
    if status != 200:
        raise Wrong(f"status {status}: {text[:500]}")


def _whole(choice: dict[str, Any], path: str) -> dict[str, Any]:
    form = {
        name: choice.get(name) for name in ("index", "finish_reason", "stop_reason", "token_ids", "prompt_logprobs")
    }
    if path == "/v1/completions":
        lp = choice["logprobs"] or {}
        return {**form, "text": choice["text"], **{k: lp.get(k) for k in ("tokens", "token_logprobs", "top_logprobs")}}
    message = choice["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    logprobs = choice["logprobs"] and choice["logprobs"]["content"]
    return {**form, "content": message["content"] or "", "calls": calls, "logprobs": logprobs}


def _folded(choices: Iterable[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """The chunks of a stream put together as the whole answer would be."""
    found: dict[int, dict[str, Any]] = {}
    for c in choices:
        one = found.setdefault(c["index"], _empty(c["index"], path))
        if one["finish_reason"] is not None:
            raise Wrong(f"choice {c['index']} goes on after its end: {c}")
        one["token_ids"] += c.get("token_ids") or []
        one |= {name: c[name] for name in ("finish_reason", "stop_reason") if c.get(name) is not None}
        if path == "/v1/completions":
            one["text"] += c["text"]
            for name, values in (c["logprobs"] or {}).items():
                if name in one:
                    one[name] = (one[name] or []) + values
            continue
        delta = c["delta"]
        one["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "name" in call["function"]:
                one["calls"].append((call["function"]["name"], ""))
            name, text = one["calls"][-1]
            one["calls"][-1] = (name, text + call["function"].get("arguments", ""))
        if c["logprobs"]:
            one["logprobs"] = (one["logprobs"] or []) + c["logprobs"]["content"]
    return [found[i] for i in sorted(found)]


def _empty(index: int, path: str) -> dict[str, Any]:
    form = {"index": index, "finish_reason": None, "stop_reason": None, "token_ids": [], "prompt_logprobs": None}
    if path == "/v1/completions":
        return {**form, "text": "", "tokens": None, "token_logprobs": None, "top_logprobs": None}
    return {**form, "content": "", "calls": [], "logprobs": None}


def difference(
    expected: list[dict[str, Any]], got: list[dict[str, Any]], names: Iterable[str] | None = None
) -> str | None:
    """Where two answers differ first, in these fields (None: all); None where they are equal."""
    if len(expected) != len(got):
        return f"{len(got)} choices, not {len(expected)}"
    for a, b in zip(expected, got, strict=True):
        for name in names or a:
            if b[name] != a[name]:
                return f"choice {a['index']}, {name}: expected {str(a[name])[:2000]}, got {str(b[name])[:2000]}"
    return None


@dataclass(frozen=True)
class Known:
    """A request and its answers at rest: whole, and as a stream tells it (None: it is not streamed)."""

    ask: Ask
    whole: list[dict[str, Any]]
    streamed: list[dict[str, Any]] | None


async def oracle(http: httpx.AsyncClient, given: list[Ask]) -> list[Known]:
    """The answers of a server at rest, one after the other. Raises Wrong where a stream has other tokens than the whole answer."""
    found = []
    for ask in given:
        known = Known(ask, await answer(http, ask, False), await answer(http, ask, True) if ask.streams else None)
        problem = known.streamed and difference(known.whole, known.streamed, ("token_ids", "finish_reason"))
        if problem:
            raise Wrong(f"{ask.kind}: at rest, the stream differs from the whole answer: {problem}\n{ask.body}")
        found.append(known)
    return found
