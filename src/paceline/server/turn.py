"""A turn of a conversation: messages and tools to a prompt, the answer's text to content, reasoning and calls.

What chat completions, responses and Anthropic's messages have in common; each only reads and writes its own JSON.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.core.errors import RequestError
from paceline.core.types import Constraint, Delta, SamplingParams
from paceline.server import dialects
from paceline.server.answer import NO_WISHES, Answer, Service
from paceline.server.api.base import Call
from paceline.server.dialects import grammar, messages, reasoning
from paceline.server.dialects.base import Parser
from paceline.server.dialects.events import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
)
from paceline.server.errors import ApiError
from paceline.server.models import Model

MAX_MESSAGES = 4096


@dataclass
class Asked:
    """One turn as any API asks for it."""

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Any = None
    tool_choice: Any = None
    parallel_calls: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    documents: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    truncate: int | None = None
    service: Service = NO_WISHES
    field: str = "messages"  # what the API calls them, for errors


@dataclass
class Said:
    """What one piece of one choice tells. finish: as OpenAI words it, with the last piece."""

    choice: int
    events: list[Event]
    delta: Delta
    finish: str | None


class Turn:
    """A prepared turn: `prompt` is its rendered text; iterate `pieces`."""

    def __init__(
        self, call: Call, model: Model, prompt: str, tokens: list[int], params: SamplingParams, asked: Asked, names: Any
    ):
        self.model, self.prompt, self.asked = model, prompt, asked
        self.answer = Answer(call, model, [tokens], params, service=asked.service, field=asked.field)
        self._parsers = [_parser(model, prompt, names) for _ in range(params.n)]
        self._called = [False] * params.n

    @property
    def usage(self) -> Any:
        return self.answer.usage

    async def pieces(self) -> AsyncIterator[list[Said]]:
        """The pieces as they come. Leaving the iteration aborts the turn."""
        async for found in self.answer.pieces():
            yield [self._read(choice, delta) for choice, delta in found]

    def _read(self, choice: int, delta: Delta) -> Said:
        parser = self._parsers[choice]
        events = parser.push(delta.text) if delta.text else []
        finish: str | None = delta.finish_reason
        if finish is not None:
            events = [*events, *parser.finish()]
        self._called[choice] |= any(isinstance(e, CallEnd) for e in events)
        if any(isinstance(e, Reasoning) for e in events):
            self.usage.reasoning += len(delta.token_ids)
        if finish == "stop" and self._called[choice]:
            finish = "tool_calls"
        return Said(choice, events, delta, finish)


def effort(level: str | None) -> dict[str, Any]:
    """The template variables by which models are told how much to think."""
    return {} if level is None else {"reasoning_effort": level, "enable_thinking": level != "none"}


def repaired(events: Sequence[Event]) -> list[Event]:
    """All events of an answer with calls that proved malformed as the text that they were, as `collect` does."""
    broken = {e.index for e in events if isinstance(e, CallBroken)}
    found: list[Event] = []
    for e in events:
        if isinstance(e, CallBroken):
            found.append(Content(e.text))
        elif not (isinstance(e, (CallStart, CallArguments, CallEnd)) and e.index in broken):
            found.append(e)
    return found


async def prepare(call: Call, model: Model, asked: Asked) -> Turn:
    """Render, encode and constrain. Raises ApiError, RequestError or TemplateError with what is wrong."""
    front = model.front
    if asked.chat_template is not None and not call.server.settings.bounds.trust_chat_template:
        raise ApiError(
            400,
            "chat_template: this server does not take templates from requests (it would with trust_chat_template)",
            param="chat_template",
        )
    functions = grammar.functions(asked.tools)
    allowed, _ = grammar.chosen(functions, asked.tool_choice)
    if allowed and front.dialect == "plain":
        raise ApiError(400, "tools: this model's chat template has no known way to call tools", param="tools")
    dialect = dialects.get(front.dialect if allowed else "plain")
    chat = messages.conversation(asked.messages, call_id=dialect.call_id, keep_parts=front.reads_parts)
    prompt = await model.render(
        chat,
        source=asked.chat_template,
        tools=asked.tools if allowed else None,
        documents=asked.documents,
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=asked.continue_final_message,
        variables=asked.variables,
    )
    encode = model.prompt if asked.truncate is None else model.encode
    tokens = await encode(prompt, add_special_tokens=False)
    if asked.truncate is not None:
        tokens = tokens[-asked.truncate :]
    params = _constrained(model, prompt, asked, functions, dialect)
    params = params.with_(show_special=dialects.visible(model.tokenizer, _marks(model, dialect)))
    await model.check_constraint(params)
    return Turn(call, model, prompt, tokens, params, asked, {f.name for f in allowed})


def _constrained(model: Model, prompt: str, asked: Asked, functions: Any, dialect: type[Parser]) -> SamplingParams:
    """The sampling with what calls must look like."""
    tags = model.front.tags
    inside = reasoning.opens_reasoning(prompt, tags)
    tokens = dialects.added(model.tokenizer, _marks(model, dialect))
    lark = grammar.constraint(
        dialect, functions, asked.tool_choice, parallel=asked.parallel_calls, tokens=tokens, tags=tags, inside=inside
    )
    given = asked.params.constraint
    if lark is None:
        if given is None or tags is None:
            return asked.params
        return asked.params.with_(constraint=grammar.after_thoughts(given, tags, inside, tokens))
    if asked.params.constraint is not None:
        raise RequestError(
            "tool_choice: calls that are required or strict cannot be combined with a format of the answer; leave one out"
        )
    return asked.params.with_(constraint=Constraint("grammar", lark))


def _marks(model: Model, dialect: type[Parser]) -> set[str]:
    """What the parsers look for in the text."""
    tags = model.front.tags
    return {*dialect.markers, *((tags.open, tags.close) if tags else ())}


def _parser(model: Model, prompt: str, names: set[str]) -> Parser:
    parser = dialects.get(model.front.dialect if names else "plain")(names or None)
    tags = model.front.tags
    return parser if tags is None else reasoning.ReasoningParser(parser, tags, reasoning.opens_reasoning(prompt, tags))
