"""The items of the Responses API: those a client sends to messages, and an answer's text to those it gets, with the stream's events.

Shapes: https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from paceline.server.dialects.events import CallArguments, CallBroken, CallEnd, CallStart, Content, Event, Reasoning
from paceline.server.schema import problem_of

MAX_PARTS = 4096  # of one item
Problems = list[tuple[str | None, str]]
Status = Literal["in_progress", "completed", "incomplete"]


class _Part(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    pass


class InputText(_Part, tag="input_text", kw_only=True):
    text: str


class OutputText(_Part, tag="output_text", kw_only=True):
    text: str
    annotations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class Refusal(_Part, tag="refusal", kw_only=True):
    refusal: str


class SummaryText(_Part, tag="summary_text", kw_only=True):
    text: str


class ReasoningText(_Part, tag="reasoning_text", kw_only=True):
    text: str


class _Item(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: str = "message"
    id: str | None = None
    status: Status | None = None


class MessageItem(_Item, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText | OutputText | Refusal], msgspec.Meta(max_length=MAX_PARTS)]
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(_Item, kw_only=True):
    call_id: str
    name: str
    arguments: str
    namespace: None = None
    caller: None = None


class ResultItem(_Item, kw_only=True):
    call_id: str
    output: str | Annotated[list[InputText], msgspec.Meta(max_length=MAX_PARTS)]
    name: str | None = None


class ReasoningItem(_Item, kw_only=True):
    """encrypted_content is never given out here: reasoning is in `content`."""

    summary: Annotated[list[SummaryText], msgspec.Meta(max_length=MAX_PARTS)] = []
    content: Annotated[list[ReasoningText], msgspec.Meta(max_length=MAX_PARTS)] | None = None
    encrypted_content: None = None


_KINDS: Mapping[str, type[_Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": ResultItem,
    "reasoning": ReasoningItem,
}


def read(items: Sequence[Any], problems: Problems, name: str = "input") -> list[_Item]:
    """Typed items; whatever is wrong with any is added to problems."""
    found: list[_Item] = []
    for i, item in enumerate(items):
        where = f"{name}[{i}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if not isinstance(kind, str):
            problems.append((where, f"{where}: must be an item such as a message"))
        elif kind not in _KINDS:
            known = ", ".join(_KINDS)
            problems.append((f"{where}.type", f"{where}.type = {kind!r:.80}: is not supported; items are {known}"))
        else:
            try:
                found.append(msgspec.convert(item, _KINDS[kind]))
            except msgspec.ValidationError as e:
                problems.append(problem_of(str(e), where))
    return found


def to_chat(items: Sequence[_Item], problems: Problems) -> list[dict[str, Any]]:
    """The messages that items stand for: reasoning, text and calls that follow each other are one message of the assistant."""
    chat: list[dict[str, Any]] = []
    called: set[str] = set()
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                _assistant(chat, "content", "tool_calls")["content"] = _text(item.content)
            case MessageItem():
                chat.append({"role": item.role, "content": _text(item.content)})
            case ReasoningItem():
                texts = [part.text for part in item.content or item.summary]
                _assistant(chat, "reasoning_content", "content", "tool_calls")["reasoning_content"] = "\n".join(texts)
            case CallItem():
                called.add(item.call_id)
                function = {"name": item.name, "arguments": item.arguments}
                calls = _assistant(chat).setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
            case ResultItem():
                if item.call_id not in called:
                    problems.append(("input", f"input: there is no function_call with call_id = {item.call_id!r:.100}"))
                chat.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    for message in chat:
        if message["role"] == "assistant":
            message.setdefault("content", "")
    return chat


def _assistant(chat: list[dict[str, Any]], *without: str) -> dict[str, Any]:
    """The assistant's message that the next item belongs to: the last one, if it has nothing yet of what may not come before."""
    if not chat or chat[-1]["role"] != "assistant" or any(name in chat[-1] for name in without):
        chat.append({"role": "assistant"})
    return chat[-1]


def _text(content: str | Sequence[_Part]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(p.refusal if isinstance(p, Refusal) else getattr(p, "text") for p in content)  # noqa: B009


class Output:
    """An answer's items from a parser's events: whole in `items`, and as the stream's events (without their numbers)."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False  # whether the last item still grows
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def take(self, e: Event, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The events of the stream that follow from one of the parser's; logprobs: of the tokens of a Content."""
        match e:
            case Content(text) if text:
                yield from self._enter("message")
                self._pieces.append(text)
                self._logprobs += logprobs
                yield self._event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)
            case Reasoning(text) if text:
                yield from self._enter("reasoning")
                self._pieces.append(text)
                yield self._event("reasoning_text.delta", content_index=0, delta=text)
            case CallStart(_, id, name):
                yield from self.close()
                yield from self._begin("function_call", arguments="", call_id=id, name=name)
            case CallArguments(_, text) if text:
                self._pieces.append(text)
                yield self._event("function_call_arguments.delta", delta=text)
            case CallEnd():
                yield from self.close()
            case CallBroken():  # only in streams: what was told cannot be taken back
                yield from self.close("incomplete")

    def finish(self, status: Status) -> Iterator[dict[str, Any]]:
        """The end of the answer, which has at least one item."""
        if not self.items:
            yield from self._enter("message")
        yield from self.close(status)

    def _enter(self, kind: str) -> Iterator[dict[str, Any]]:
        """Make the last item one of this kind, message or reasoning, that grows."""
        if self._open and self.items[-1]["type"] == kind:
            return
        yield from self.close()
        if kind == "message":
            yield from self._begin(kind, role="assistant", content=[])
        else:
            yield from self._begin(kind, summary=[], content=[])
        yield self._event("content_part.added", content_index=0, part=self._part(kind))

    def _begin(self, kind: str, **rest: Any) -> Iterator[dict[str, Any]]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = {"id": f"{prefix}_{secrets.token_hex(24)}", "type": kind, "status": "in_progress", **rest}
        self.items.append(item)
        self._open, self._pieces, self._logprobs = True, [], []
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _part(self, kind: str) -> dict[str, Any]:
        """The one part of a message's or reasoning's content, as far as it has come."""
        text = "".join(self._pieces)
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def close(self, status: Status = "completed") -> Iterator[dict[str, Any]]:
        """End the item that grows, if there is one."""
        if not self._open:
            return
        item, kind = self.items[-1], self.items[-1]["type"]
        if kind == "function_call":
            item["arguments"] = "".join(self._pieces)
            yield self._event("function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        else:
            part = self._part(kind)
            item["content"] = [part]
            scored = {"logprobs": self._logprobs} if kind == "message" else {}
            name = "output_text.done" if kind == "message" else "reasoning_text.done"
            yield self._event(name, content_index=0, text=part["text"], **scored)
            yield self._event("content_part.done", content_index=0, part=part)
        item["status"] = status
        self._open = False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _event(self, event: str, **rest: Any) -> dict[str, Any]:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{event}", **place, **rest}
