"""What Anthropic's API answers: the message whole, and the stream of its events."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Literal

import msgspec

from paceline.server.answer import Usage
from paceline.server.api.base import encode
from paceline.server.api.messages.body import MessagesRequest
from paceline.server.dialects.events import CallArguments, CallBroken, CallEnd, CallStart, Content, Event, Reasoning
from paceline.server.errors import ApiError
from paceline.server.sse import event
from paceline.server.turn import Said, Turn, repaired

PING = event(b'{"type":"ping"}', "ping")


class MessageAnswer(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any]


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


class Answer:
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


def failed(error: ApiError) -> bytes:
    """The last event of a stream that cannot go on."""
    return event(encode(error.anthropic()), "error")
