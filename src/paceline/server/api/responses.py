"""OpenAI's Responses API: POST /v1/responses, GET, DELETE and cancel of one (https://platform.openai.com/docs/api-reference/responses).

Responses are kept in memory (`server/stored.py`), for their identity alone, unless `store` is false. Reasoning is given in clear, as
`reasoning_text`; so there are no summaries of it, and it needs no encryption to be sent again (`include` may ask for that all the same).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from starlette.types import ASGIApp

from paceline.core.types import Constraint, SamplingParams
from paceline.server.answer import Usage
from paceline.server.api import items
from paceline.server.api.base import Call, Route, encode, json
from paceline.server.api.chat import logprob
from paceline.server.dialects.base import Content, Event
from paceline.server.errors import ApiError
from paceline.server.models import Model
from paceline.server.sampling import Count, Stop, resolve
from paceline.server.schema import Body, bad_fields
from paceline.server.sse import EventStream, event, unless_gone
from paceline.server.stored import Kept
from paceline.server.turn import Asked, Said, Turn, effort, prepare, repaired

MAX_ITEMS = 4096  # of a conversation
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto"] | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None
    defer_loading: Literal[False] | None = None


class NamedChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: Literal[False] | None = None


Metadata = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=512)]],
    msgspec.Meta(max_length=16),
]
Name = Annotated[str, msgspec.Meta(max_length=1024)]


class ResponsesRequest(Body, kw_only=True):
    """top_k and what follows is not OpenAI's."""

    input: str | Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)]
    model: str | None = None
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Count | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    previous_response_id: Name | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    service_tier: Literal["auto", "default"] | None = None
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
    context_management: None = None
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Count = 0
    cache_salt: Annotated[str, msgspec.Meta(max_length=256)] | None = None


class ResponseAnswer(msgspec.Struct):
    id: str
    object: str
    created_at: float
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: bool


_PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
          "ignore_eos")  # fmt: skip


async def responses(call: Call, body: ResponsesRequest) -> ASGIApp:
    model = await call.model(body.model)
    before = _before(call, body)
    turn = await _prepared(call, model, body, to_asked(call, model, body, before))
    turn.answer.check()
    one = _Response(call, turn, body, before)
    if not body.stream:
        return json(await unless_gone(one.whole(), call.http.receive), headers=turn.answer.headers())
    return EventStream(one.events(), **call.streaming(turn.answer.headers()), failed=one.failed)


# ---- what is asked


def _before(call: Call, body: ResponsesRequest) -> Kept | None:
    """The turn that this one goes on from. Raises ApiError when it is not kept (any more)."""
    id = body.previous_response_id
    if id is None:
        return None
    found = call.server.stored.get(call.identity.name, id)
    if found is None:
        raise ApiError(
            400,
            f"previous_response_id: there is no response {id[:100]!r} here (any more); send the conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return found


def to_asked(call: Call, model: Model, body: ResponsesRequest, before: Kept | None) -> Asked:
    """The turn that a body asks for. Raises ApiError naming what is wrong."""
    problems: items.Problems = list(_contradictions(body))
    given = items.read(_items(body), problems)
    former = [] if before is None else items.read(before.conversation(), problems, "previous_response_id")
    if len(former) + len(given) > MAX_ITEMS:
        problems.append(("input", f"input: a conversation of {len(former) + len(given)} items; at most {MAX_ITEMS}"))
    chat = items.to_chat([*former, *given], problems)
    if problems:
        raise bad_fields(dict.fromkeys(problems))
    if body.instructions:
        chat.insert(0, {"role": "system", "content": body.instructions})
    choice: Any = body.tool_choice
    if isinstance(choice, NamedChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    level = body.reasoning.effort if body.reasoning is not None else None
    return Asked(
        chat,
        _params(call, model, body),
        tools=None if body.tools is None else [_function(t) for t in body.tools],
        tool_choice=choice,
        parallel_calls=body.parallel_tool_calls is not False,
        variables={**effort(level), **(body.chat_template_kwargs or {})},
        priority=body.priority,
        salt=body.cache_salt or "",
    )


def _items(body: ResponsesRequest) -> list[dict[str, Any]]:
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}]
    return body.input


def _contradictions(body: ResponsesRequest) -> Iterable[tuple[str, str]]:
    form = body.text.format if body.text is not None else None
    if form is not None and form.type == "json_schema" and (form.schema is None or form.name is None):
        yield "text.format", "text.format: json_schema needs name and schema"
    if body.stream_options is not None and not body.stream:
        yield "stream_options", "stream_options: needs stream = true"


def _function(t: Tool) -> dict[str, Any]:
    given = {"description": t.description, "parameters": t.parameters, "strict": t.strict}
    return {"type": "function", "function": {"name": t.name, **{k: v for k, v in given.items() if v is not None}}}


def _params(call: Call, model: Model, body: ResponsesRequest) -> SamplingParams:
    given = {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.max_output_tokens is not None:
        given["max_tokens"] = body.max_output_tokens
    if _wants_logprobs(body):
        given["logprobs"] = body.top_logprobs or 0
    form = body.text.format if body.text is not None else None
    if form is not None and form.type != "text":
        schema = "" if form.type == "json_object" else msgspec.json.encode(form.schema).decode()
        given["constraint"] = Constraint(form.type, schema)
    return resolve(given, model, call.server.settings.bounds, limit="max_output_tokens")


def _wants_logprobs(body: ResponsesRequest) -> bool:
    return bool(body.top_logprobs) or LOGPROBS in (body.include or ())


async def _prepared(call: Call, model: Model, body: ResponsesRequest, asked: Asked) -> Turn:
    """The turn; with truncation = auto of the longest end of the conversation that fits and begins with a user's message.

    Messages of the system stay. A longer end never takes fewer tokens, so the place is found by halving.
    """
    turn = await prepare(call, model, asked)
    capacity = model.ready.serving.capacity
    room = max(1, capacity - (body.max_output_tokens or 1))
    if body.truncation != "auto" or turn.usage.prompt <= room:
        return turn
    head = [m for m in asked.messages if m["role"] in ("system", "developer")]
    rest = [m for m in asked.messages if m["role"] not in ("system", "developer")]
    cuts = [i for i, m in enumerate(rest) if i and m["role"] == "user"]
    while cuts:
        middle = len(cuts) // 2
        found = await prepare(call, model, replace(asked, messages=[*head, *rest[cuts[middle] :]]))
        if found.usage.prompt <= room:
            turn, cuts = found, cuts[:middle]
        else:
            turn, cuts = (found if turn.usage.prompt > room else turn), cuts[middle + 1 :]
    return turn


# ---- what is answered


class _Response:
    """Writes one call's answer, and keeps it."""

    def __init__(self, call: Call, turn: Turn, body: ResponsesRequest, before: Kept | None):
        self.call, self.turn, self.body, self.before = call, turn, body, before
        self.id = f"resp_{secrets.token_hex(24)}"
        self.output = items.Output()
        self._scored = _wants_logprobs(body)
        self._unsaid: list[dict[str, Any]] = []  # log-probabilities of tokens whose text has not come yet
        self._cut = False  # the answer reached its limit
        self._n = 0  # events told

    async def whole(self) -> dict[str, Any]:
        events: list[Event] = []
        scores: dict[int, list[dict[str, Any]]] = {}
        async for pieces in self.turn.pieces():
            for said in pieces:
                for e, logprobs in self._read(said):
                    events.append(e)
                    scores[id(e)] = logprobs
        for e in repaired(events):
            list(self.output.take(e, scores.get(id(e), [])))
        return self._finished()

    async def events(self) -> AsyncGenerator[bytes, None]:
        begun = False
        async for pieces in self.turn.pieces():
            told: list[bytes] = []
            if not begun:
                begun = True
                told += [self._told({"type": f"response.{s}", "response": self._object()}) for s in _BEGIN]
            for said in pieces:
                for e, logprobs in self._read(said):
                    told += [self._told(made) for made in self.output.take(e, logprobs)]
            if told:
                yield b"".join(told)
        told = [self._told(made) for made in self.output.finish(self._status)]
        response = self._finished()
        told.append(self._told({"type": f"response.{self._status}", "response": response}))
        yield b"".join(told)

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that cannot go on."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = {**self._object("failed"), "output": self.output.items}
        response["error"] = {"code": code, "message": error.message}
        return self._told({"type": "response.failed", "response": response})

    def _told(self, made: dict[str, Any]) -> bytes:
        self._n += 1
        return event(encode({**made, "sequence_number": self._n - 1}), made["type"])

    @property
    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._cut else "completed"

    def _read(self, said: Said) -> list[tuple[Event, list[dict[str, Any]]]]:
        """A piece's events with the log-probabilities of the text they tell."""
        if said.finish is not None:
            self._cut = said.finish == "length"
        scores = self._unsaid
        if self._scored:
            scores += [logprob(self.turn.model, lp) for lp in said.delta.logprobs]
        found: list[tuple[Event, list[dict[str, Any]]]] = []
        for e in said.events:
            found.append((e, scores))
            if isinstance(e, Content):
                scores = []
        self._unsaid = scores if not said.events else []  # tokens of thoughts and calls have none to go with
        return found

    def _finished(self) -> dict[str, Any]:
        """The whole response, kept if it may be."""
        list(self.output.finish(self._status))
        response = {**self._object(self._status), "output": self.output.items, "usage": usage(self.turn.usage)}
        response["completed_at"] = int(time.time())
        if self._cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self.call.wants_receipt:
            response["paceline"] = self.turn.answer.receipt()
        if self.body.store is not False:
            kept = Kept.of(encode(response), [*_items(self.body), *self.output.items], self.before)
            self.call.server.stored.put(self.call.identity.name, self.id, kept)
        return response

    def _object(self, status: str = "in_progress") -> dict[str, Any]:
        """The response as it stands: what was asked for, and nothing yet of the answer."""
        body, params = self.body, self.turn.answer.params
        form = body.text.format if body.text is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(self.turn.answer.started),
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.turn.model.name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"} if form is None else _without_none(form)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [_without_none(t) for t in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
            "system_fingerprint": self.turn.model.fingerprint,
        }


_BEGIN = ("created", "in_progress")


def _without_none(value: msgspec.Struct) -> dict[str, Any]:
    return {k: v for k, v in msgspec.to_builtins(value).items() if v is not None}


def usage(u: Usage) -> dict[str, Any]:
    return {
        "input_tokens": u.prompt,
        "input_tokens_details": {"cached_tokens": u.cached, "cache_write_tokens": 0},
        "output_tokens": u.completion,
        "output_tokens_details": {"reasoning_tokens": u.reasoning},
        "total_tokens": u.prompt + u.completion,
    }


# ---- what is kept


def _kept(call: Call) -> tuple[str, Kept]:
    """The response that a path names. Raises ApiError 404 for one that this identity has not."""
    id = call.http.path_params["response_id"]
    found = call.server.stored.get(call.identity.name, id)
    if found is None:
        raise ApiError(404, f"there is no response {id[:100]!r} here (any more)", param="response_id")
    return id, found


async def get_response(call: Call) -> ASGIApp:
    _, found = _kept(call)
    asked = call.http.query_params
    if asked.get("stream", "false") != "false":
        raise ApiError(400, "stream: a finished response is not streamed again; leave it out", param="stream")
    return json(msgspec.Raw(found.response))


async def delete_response(call: Call) -> ASGIApp:
    id, _ = _kept(call)
    call.server.stored.delete(call.identity.name, id)
    return json(Deleted(id, "response", True))


async def cancel_response(call: Call) -> ASGIApp:
    id, _ = _kept(call)
    raise ApiError(400, f"response {id[:100]!r} is finished: only responses made in the background can be cancelled")


_ONE = "/v1/responses/{response_id}"
ROUTES = [
    Route(
        "POST",
        "/v1/responses",
        responses,
        "Answer items (OpenAI's Responses API).",
        ResponsesRequest,
        ResponseAnswer,
        streams=True,
    ),
    Route("GET", _ONE, get_response, "A response that is kept.", answer=ResponseAnswer),
    Route("DELETE", _ONE, delete_response, "Forget a response.", answer=Deleted),
    Route("POST", f"{_ONE}/cancel", cancel_response, "Refused: none runs in the background.", answer=ResponseAnswer),
]
