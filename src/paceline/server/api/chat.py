"""POST /v1/chat/completions (https://platform.openai.com/docs/api-reference/chat), with the fields that vLLM added."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import msgspec
from starlette.types import ASGIApp

from paceline.core.types import TokenLogprob
from paceline.server.answer import Usage
from paceline.server.api.base import Call, Route, encode, json
from paceline.server.dialects.events import Answer as Collected
from paceline.server.dialects.events import CallArguments, CallBroken, CallStart, Content, Event, Reasoning, collect
from paceline.server.errors import ApiError
from paceline.server.models import Model
from paceline.server.sampling import Sampling, params
from paceline.server.sse import DONE, EventStream, event, unless_gone
from paceline.server.turn import MAX_MESSAGES, Asked, Said, Turn, effort, prepare


class ChatRequest(Sampling, kw_only=True):
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    documents: list[dict[str, Any]] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    metadata: None = None
    web_search_options: None = None


class ChatAnswer(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


async def chat_completions(call: Call, body: ChatRequest) -> ASGIApp:
    model = await call.model(body.model)
    asked = to_asked(call, model, body)
    turn = await prepare(call, model, asked)
    turn.answer.check()
    if not body.stream:
        return json(await unless_gone(_whole(call, turn, body), call.http.receive), headers=turn.answer.headers())
    return EventStream(_chunks(call, turn, body), **call.streaming(turn.answer.headers()))


def to_asked(call: Call, model: Model, body: ChatRequest) -> Asked:
    """The turn that a body asks for. Raises ApiError naming what is wrong."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(
            400, "max_completion_tokens: differs from max_tokens, its old name; give one", param="max_completion_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs = true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream = true", param="stream_options")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = params(body, model, call.server.settings.bounds, max_tokens=limit, logprobs=logprobs)
    variables = {**effort(body.reasoning_effort), **(body.chat_template_kwargs or {})}
    return Asked(
        body.messages,
        sampling,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_calls=body.parallel_tool_calls is not False,
        variables=variables,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        truncate=body.truncate_prompt_tokens,
        service=body.service(),
    )


async def _whole(call: Call, turn: Turn, body: ChatRequest) -> dict[str, Any]:
    events: list[list[Event]] = [[] for _ in range(turn.answer.n_choices)]
    choices: list[dict[str, Any]] = [{"index": i} for i in range(turn.answer.n_choices)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in choices]
    tokens: list[list[int]] = [[] for _ in choices]
    async for pieces in turn.pieces():
        for said in pieces:
            events[said.choice] += said.events
            logprobs[said.choice] += said.delta.logprobs
            tokens[said.choice] += said.delta.token_ids
            if said.finish is not None:
                choices[said.choice] |= {"finish_reason": said.finish, "stop_reason": said.delta.stop_reason}
    for i, choice in enumerate(choices):
        choice["message"] = message(collect(events[i]))
        choice["logprobs"] = {"content": [logprob(turn.model, lp) for lp in logprobs[i]]} if body.logprobs else None
        if body.return_token_ids:
            choice["token_ids"] = tokens[i]
    answer = {**_head(call, turn, "chat.completion"), "choices": choices, "usage": usage(turn.usage)}
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(turn.answer.requests[0].tokens)
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = turn.answer.prompt_logprobs(0)
    if call.wants_receipt:
        answer["paceline"] = turn.answer.receipt()
    return answer


def message(found: Collected) -> dict[str, Any]:
    """The assistant's message."""
    out: dict[str, Any] = {"role": "assistant", "content": found.content or (None if found.calls else "")}
    if found.reasoning:
        out["reasoning_content"] = found.reasoning
    if found.calls:
        out["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in found.calls
        ]
    return out


def _head(call: Call, turn: Turn, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{call.id}",
        "object": kind,
        "created": int(turn.answer.started),
        "model": turn.model.name,
        "system_fingerprint": turn.model.fingerprint,
    }


async def _chunks(call: Call, turn: Turn, body: ChatRequest) -> AsyncGenerator[bytes, None]:
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    so_far = options is not None and options.continuous_usage_stats
    head = _head(call, turn, "chat.completion.chunk")

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        if with_usage:
            more.setdefault("usage", usage(turn.usage) if so_far else None)
        return event(encode({**head, "choices": choices, **more}))

    first = b"".join(
        chunk([{"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}])
        for i in range(turn.answer.n_choices)
    )
    async for pieces in turn.pieces():
        data = first + b"".join(chunk([choice]) for said in pieces for choice in _choices(turn, said, body))
        first = b""
        if data:
            yield data
    if with_usage:
        more = {"paceline": turn.answer.receipt()} if call.wants_receipt else {}
        yield chunk([], usage=usage(turn.usage), **more)
    yield DONE


def _choices(turn: Turn, said: Said, body: ChatRequest) -> list[dict[str, Any]]:
    """The chunks of one piece: one for each kind of delta, the last with how it ended."""
    deltas = [delta for e in said.events if (delta := _delta(e)) is not None]
    if not deltas and (said.finish or body.return_token_ids or (body.logprobs and said.delta.logprobs)):
        deltas = [{}]
    found: list[dict[str, Any]] = [
        {"index": said.choice, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
    ]
    if found and body.logprobs:
        found[0]["logprobs"] = {"content": [logprob(turn.model, lp) for lp in said.delta.logprobs]}
    if found and body.return_token_ids:
        found[0]["token_ids"] = list(said.delta.token_ids)
    if said.finish is not None:
        found[-1] |= {"finish_reason": said.finish, "stop_reason": said.delta.stop_reason}
    return found


def _delta(e: Event) -> dict[str, Any] | None:
    match e:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStart(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case CallBroken(_, text):  # what was told of it stays unfinished; nothing the model wrote is lost
            return {"content": text}
    return None


def logprob(model: Model, lp: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability as the chat API writes it."""
    top = [{**_token(model, t), "logprob": value} for t, value in lp.top]
    return {**_token(model, lp.token), "logprob": lp.logprob, "top_logprobs": top}


def _token(model: Model, token: int) -> dict[str, Any]:
    return {"token": model.text_of(token), "bytes": list(model.tokenizer.token_bytes(token))}


def usage(u: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": u.prompt,
        "completion_tokens": u.completion,
        "total_tokens": u.prompt + u.completion,
        "prompt_tokens_details": {"cached_tokens": u.cached},
        "completion_tokens_details": {"reasoning_tokens": u.reasoning},
    }


ROUTES = [
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "Answer a conversation.",
        ChatRequest,
        ChatAnswer,
        streams=True,
    )
]
