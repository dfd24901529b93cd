"""OpenAI's Responses API: POST /v1/responses, GET, DELETE and cancel of one (https://platform.openai.com/docs/api-reference/responses).

Responses are kept in memory (`server/stored.py`), for their identity alone, unless `store` is false. Reasoning is given in clear, as
`reasoning_text`; so there are no summaries of it, and it needs no encryption to be sent again (`include` may ask for that all the same).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from starlette.types import ASGIApp

from paceline.server.api.base import Call, Route, json
from paceline.server.api.responses.answer import Response
from paceline.server.api.responses.body import ResponsesRequest, to_asked
from paceline.server.errors import ApiError
from paceline.server.models import Model
from paceline.server.sse import EventStream, unless_gone
from paceline.server.stored import Kept
from paceline.server.turn import Asked, Turn, prepare


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


async def responses(call: Call, body: ResponsesRequest) -> ASGIApp:
    model = await call.model(body.model)
    before = _before(call, body)
    turn = await _prepared(call, model, body, to_asked(call, model, body, before))
    turn.answer.check()
    one = Response(call, turn, body, before)
    if not body.stream:
        return json(await unless_gone(one.whole(), call.http.receive), headers=turn.answer.headers())
    return EventStream(one.events(), **call.streaming(turn.answer.headers()), failed=one.failed)


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
