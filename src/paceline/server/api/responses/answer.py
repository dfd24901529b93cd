"""What the Responses API answers: the response whole, and the stream of its events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import msgspec

from paceline.server.answer import Usage
from paceline.server.api.base import Call, encode
from paceline.server.api.chat import logprob
from paceline.server.api.responses import items
from paceline.server.api.responses.body import ResponsesRequest, own_items, wants_logprobs
from paceline.server.dialects.events import Content, Event
from paceline.server.errors import ApiError
from paceline.server.sse import event
from paceline.server.stored import Kept
from paceline.server.turn import Said, Turn, repaired

_BEGIN = ("created", "in_progress")


class Response:
    """Writes one call's answer, and keeps it."""

    def __init__(self, call: Call, turn: Turn, body: ResponsesRequest, before: Kept | None):
        self.call, self.turn, self.body, self.before = call, turn, body, before
        self.id = f"resp_{secrets.token_hex(24)}"
        self.output = items.Output()
        self._scored = wants_logprobs(body)
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
            kept = Kept.of(encode(response), [*own_items(self.body), *self.output.items], self.before)
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
