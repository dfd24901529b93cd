"""What a request of Anthropic's API asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from paceline.core.types import Constraint, SamplingParams
from paceline.server.api.base import Call
from paceline.server.models import Model
from paceline.server.sampling import resolve
from paceline.server.schema import Body, bad_fields
from paceline.server.turn import Asked

MAX_MESSAGES = 4096
MAX_BLOCKS = 4096  # of one message


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


_NAMES = {"stop": "stop_sequences"}


def sampling(call: Call, model: Model, body: MessagesRequest) -> SamplingParams:
    given: dict[str, Any] = {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    given["stop"] = None if body.stop_sequences is None else tuple(body.stop_sequences)
    if body.output_config is not None and body.output_config.format is not None:
        schema = msgspec.json.encode(body.output_config.format.schema).decode()
        given["constraint"] = Constraint("json_schema", schema)
    return resolve({k: v for k, v in given.items() if v is not None}, model, call.server.settings.bounds, _NAMES)


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
