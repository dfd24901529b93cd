"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API (https://docs.anthropic.com/en/api/messages).

`cache_control` is accepted wherever clients send it: prefixes are cached without being asked for. Thoughts are not signed, so signatures
are empty, and any is taken. Without `thinking` the model is asked not to think, which is this API's default; `budget_tokens` is given to
the chat template, where there is a variable for it (`thinking_budget`), and is not enforced.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from starlette.types import ASGIApp

from paceline.core.types import GREEDY, Constraint, SamplingParams
from paceline.server.answer import Usage
from paceline.server.api.base import Call, Route, encode, json
from paceline.server.dialects.base import CallArguments, CallBroken, CallEnd, CallStart, Content, Event, Reasoning
from paceline.server.errors import ApiError
from paceline.server.models import Model
from paceline.server.sampling import resolve
from paceline.server.schema import Body, bad_fields
from paceline.server.sse import EventStream, event, unless_gone
from paceline.server.turn import Asked, Said, Turn, prepare, repaired

MAX_MESSAGES = 4096
MAX_BLOCKS = 4096  # of one message
PING = event(b'{"type":"ping"}', "ping")


class CacheControl(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    """Base of the content blocks; "type" says which."""

    cache_control: CacheControl | None = None


class Text(Block, tag="text", kw_only=True):
    text: str
    citations: None = None


class ToolUse(Block, tag="tool_use", kw_only=True):
    id: str
    name: str
    input: dict[str, Any]
    caller: None = None


class ToolResult(Block, tag="tool_result", kw_only=True):
    tool_use_id: str
    content: str | Annotated[list[Text], msgspec.Meta(max_length=MAX_BLOCKS)] = ""
    is_error: bool | None = None


class Thinking(Block, tag="thinking", kw_only=True):
    thinking: str
    signature: str = ""


Blocks = Annotated[list[Text | ToolUse | ToolResult | Thinking], msgspec.Meta(max_length=MAX_BLOCKS)]


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | Blocks


class Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """eager_input_streaming: inputs are streamed as they come in any case."""

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(msgspec.Struct, forbid_unknown_fields=True):
    """adaptive leaves it to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    display: Literal["summarized"] | None = None


class OutputFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: Annotated[str, msgspec.Meta(max_length=1024)] | None = None


class CountRequest(Body, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    system: str | Annotated[list[Text], msgspec.Meta(max_length=MAX_BLOCKS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    stream: bool | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: None = None
    mcp_servers: None = None
    context_management: None = None


class MessageAnswer(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any]


class CountAnswer(msgspec.Struct):
    input_tokens: int


async def messages(call: Call, body: MessagesRequest) -> ASGIApp:
    model = await call.model(body.model)
    turn = await prepare(call, model, to_asked(body, _params(call, model, body)))
    turn.answer.check()
    one = _Answer(turn, body)
    headers = {**turn.answer.headers(), "request-id": call.id}
    if not body.stream:
        return json(await unless_gone(one.whole(), call.http.receive), headers=headers)
    return EventStream(one.events(), **call.streaming(headers), failed=_failed)


async def count_tokens(call: Call, body: CountRequest) -> ASGIApp:
    """Tokens of the prompt that these messages make, with the template's own."""
    model = await call.model(body.model)
    turn = await prepare(call, model, to_asked(body, GREEDY))
    return json(CountAnswer(turn.usage.prompt), headers={"request-id": call.id})


# ---- what is asked


def _params(call: Call, model: Model, body: MessagesRequest) -> SamplingParams:
    given: dict[str, Any] = {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    given["stop"] = None if body.stop_sequences is None else tuple(body.stop_sequences)
    if body.output_config is not None and body.output_config.format is not None:
        schema = msgspec.json.encode(body.output_config.format.schema).decode()
        given["constraint"] = Constraint("json_schema", schema)
    return resolve({k: v for k, v in given.items() if v is not None}, model, call.server.settings.bounds)


def to_asked(body: CountRequest, params: SamplingParams) -> Asked:
    """The turn that a body asks for. Raises ApiError naming what is wrong."""
    problems = [*_misplaced(body), *_contradictions(body)]
    if problems:
        raise bad_fields(problems)
    chat: list[dict[str, Any]] = []
    if body.system:
        chat.append({"role": "system", "content": _parts(body.system)})
    for m in body.messages:
        chat += _to_chat(m)
    choice = body.tool_choice
    continues = body.messages[-1].role == "assistant"  # the client has begun the answer
    return Asked(
        chat,
        params,
        tools=None if body.tools is None else [_function(t) for t in body.tools],
        tool_choice=None if choice is None else _choice(choice),
        parallel_calls=choice is None or not choice.disable_parallel_tool_use,
        variables=_variables(body),
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )


def _misplaced(body: CountRequest) -> Iterator[tuple[str, str]]:
    """Blocks where none of their kind belongs."""
    for i, m in enumerate(body.messages):
        wrong = (ToolUse, Thinking) if m.role == "user" else (ToolResult,)
        for j, block in enumerate(m.content if isinstance(m.content, list) else ()):
            if isinstance(block, wrong):
                where, kind = f"messages[{i}].content[{j}]", block.__struct_config__.tag
                yield where, f"{where}: a {kind} block does not belong in a message of role {m.role}"
    last = body.messages[-1]
    blocks = last.content if isinstance(last.content, list) else []
    if last.role == "assistant" and any(not isinstance(b, Text) for b in blocks):
        yield "messages", "messages: an answer to be continued is text only; end with a message of role user"


def _contradictions(body: CountRequest) -> Iterator[tuple[str, str]]:
    choice, thinking = body.tool_choice, body.thinking
    if choice is not None and (choice.type == "tool") != (choice.name is not None):
        yield "tool_choice.name", "tool_choice.name: goes with type tool, and only with it"
    if choice is not None and choice.type in ("any", "tool") and not body.tools:
        yield "tool_choice", f"tool_choice.type = {choice.type!r}: needs tools"
    if thinking is None:
        return
    if (thinking.type == "enabled") != (thinking.budget_tokens is not None):
        yield "thinking.budget_tokens", "thinking.budget_tokens: goes with type enabled, and only with it"
    elif (
        isinstance(body, MessagesRequest)
        and thinking.budget_tokens is not None
        and thinking.budget_tokens >= body.max_tokens
    ):
        yield (
            "thinking.budget_tokens",
            f"thinking.budget_tokens = {thinking.budget_tokens}: must be less than max_tokens = {body.max_tokens}",
        )


def _variables(body: CountRequest) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if body.thinking is None or body.thinking.type != "adaptive":
        found["enable_thinking"] = body.thinking is not None and body.thinking.type == "enabled"
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        found["thinking_budget"] = body.thinking.budget_tokens
    if body.output_config is not None and body.output_config.effort is not None:
        found["reasoning_effort"] = body.output_config.effort
    return found


def _parts(content: str | Sequence[Text]) -> Any:
    return content if isinstance(content, str) else [{"type": "text", "text": b.text} for b in content]


def _to_chat(m: Message) -> list[dict[str, Any]]:
    """A message in the chat API's words. Results of tools become messages of their own; a failed one's text begins with "Error: "."""
    if isinstance(m.content, str):
        return [{"role": m.role, "content": m.content}]
    texts = [b for b in m.content if isinstance(b, Text)]
    if m.role == "user":
        chat = [_result(b) for b in m.content if isinstance(b, ToolResult)]
        return [*chat, {"role": "user", "content": _parts(texts)}] if texts or not chat else chat
    out: dict[str, Any] = {"role": "assistant", "content": _parts(texts) if texts else ""}
    if thoughts := [b.thinking for b in m.content if isinstance(b, Thinking)]:
        out["reasoning_content"] = "\n".join(thoughts)
    if calls := [b for b in m.content if isinstance(b, ToolUse)]:
        out["tool_calls"] = [
            {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}} for b in calls
        ]
    return [out]


def _result(b: ToolResult) -> dict[str, Any]:
    text = b.content if isinstance(b.content, str) else "\n".join(part.text for part in b.content)
    return {"role": "tool", "tool_call_id": b.tool_use_id, "content": f"Error: {text}" if b.is_error else text}


def _function(t: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": t.name, "parameters": t.input_schema}
    if t.description is not None:
        function["description"] = t.description
    if t.strict is not None:
        function["strict"] = t.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


# ---- what is answered


def usage(u: Usage, *, ended: bool) -> dict[str, Any]:
    """Input tokens are those that were not found in the prefix cache; how many were is known at the end."""
    cached = u.cached if ended else 0
    return {
        "input_tokens": u.prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": u.completion,
    }


class _Content:
    """The answer's blocks from a parser's events: whole in `blocks`, and as the stream's events."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []
        self._open: str | None = None  # type of the last block while it grows

    def take(self, e: Event) -> Iterator[dict[str, Any]]:
        match e:
            case Content(text) if text:
                yield from self._grow({"type": "text", "text": ""}, {"type": "text_delta", "text": text}, text)
            case Reasoning(text) if text:
                block = {"type": "thinking", "thinking": "", "signature": ""}
                yield from self._grow(block, {"type": "thinking_delta", "thinking": text}, text)
            case CallStart(_, id, name):
                yield from self.close()
                yield self._start({"type": "tool_use", "id": id, "name": name, "input": {}})
            case CallArguments(_, text) if text:
                self._pieces.append(text)
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                self.blocks[-1]["input"] = msgspec.json.decode("".join(self._pieces) or "{}")
                yield from self.close()
            case CallBroken():  # only in streams, where it stays unfinished
                yield from self.close()

    def _grow(self, block: dict[str, Any], delta: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
        if self._open != block["type"]:
            yield from self.close()
            yield self._start(block)
        self._pieces.append(text)
        yield self._delta(delta)

    def _start(self, block: dict[str, Any]) -> dict[str, Any]:
        self.blocks.append(block)
        self._open, self._pieces = block["type"], []
        return {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def close(self) -> Iterator[dict[str, Any]]:
        """End the open block."""
        if self._open is None:
            return
        block, text = self.blocks[-1], "".join(self._pieces)
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        if self._open != "tool_use":
            block[self._open] = text
        self._open = None
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}


class _Answer:
    """Writes one call's answer."""

    def __init__(self, turn: Turn, body: MessagesRequest):
        self.turn, self.stops = turn, frozenset(body.stop_sequences or ())
        self.id = f"msg_{secrets.token_hex(12)}"
        self.content = _Content()
        self._reason: str | None = None
        self._sequence: str | None = None

    def _message(self, *, ended: bool) -> MessageAnswer:
        return MessageAnswer(
            id=self.id,
            model=self.turn.model.name,
            content=self.content.blocks,
            stop_reason=self._reason,
            stop_sequence=self._sequence,
            usage=usage(self.turn.usage, ended=ended),
        )

    async def whole(self) -> MessageAnswer:
        events: list[Event] = []
        async for pieces in self.turn.pieces():
            for said in pieces:
                events += said.events
                self._note(said)
        for e in repaired(events):
            list(self.content.take(e))
        list(self.content.close())
        return self._message(ended=True)

    async def events(self) -> AsyncGenerator[bytes, None]:
        first = _event({"type": "message_start", "message": self._message(ended=False)}) + PING
        async for pieces in self.turn.pieces():
            told = [first]
            first = b""
            for said in pieces:
                self._note(said)
                told += [_event(made) for e in said.events for made in self.content.take(e)]
            if any(told):
                yield b"".join(told)
        told = [_event(made) for made in self.content.close()]
        delta = {"stop_reason": self._reason, "stop_sequence": self._sequence}
        told.append(_event({"type": "message_delta", "delta": delta, "usage": usage(self.turn.usage, ended=True)}))
        yield b"".join((*told, _event({"type": "message_stop"})))

    def _note(self, said: Said) -> None:
        """How it ended, in this API's words."""
        if said.finish is None:
            return
        stop = said.delta.stop_reason
        if said.finish == "stop" and isinstance(stop, str) and stop in self.stops:
            self._reason, self._sequence = "stop_sequence", stop
        else:
            self._reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(said.finish, "end_turn")


def _event(made: dict[str, Any]) -> bytes:
    return event(encode(made), made["type"])


def _failed(error: ApiError) -> bytes:
    return event(encode(error.anthropic()), "error")


ROUTES = [
    Route(
        "POST",
        "/v1/messages",
        messages,
        "Answer a conversation (Anthropic's API).",
        MessagesRequest,
        MessageAnswer,
        streams=True,
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        "Tokens of a conversation (Anthropic's API).",
        CountRequest,
        CountAnswer,
    ),
]
