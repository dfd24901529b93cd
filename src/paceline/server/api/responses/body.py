"""What a request of the Responses API asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from paceline.core.types import Constraint, SamplingParams
from paceline.server.answer import Service
from paceline.server.api.base import Call
from paceline.server.api.responses import items
from paceline.server.models import Model
from paceline.server.sampling import Count, Salt, Stop, resolve
from paceline.server.schema import Body, bad_fields
from paceline.server.stored import Kept
from paceline.server.turn import Asked, effort

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
    cache_salt: Salt | None = None


_PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
          "ignore_eos")  # fmt: skip


def to_asked(call: Call, model: Model, body: ResponsesRequest, before: Kept | None) -> Asked:
    """The turn that a body asks for. Raises ApiError naming what is wrong."""
    problems: items.Problems = list(_contradictions(body))
    given = items.read(own_items(body), problems)
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
        service=Service(body.priority, body.cache_salt or ""),
        field="input",
    )


def own_items(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Of this turn; text is a message of the user's."""
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
    if wants_logprobs(body):
        given["logprobs"] = body.top_logprobs or 0
    form = body.text.format if body.text is not None else None
    if form is not None and form.type != "text":
        schema = "" if form.type == "json_object" else msgspec.json.encode(form.schema).decode()
        given["constraint"] = Constraint(form.type, schema)
    return resolve(given, model, call.server.settings.bounds, names={"max_tokens": "max_output_tokens"})


def wants_logprobs(body: ResponsesRequest) -> bool:
    return bool(body.top_logprobs) or LOGPROBS in (body.include or ())
