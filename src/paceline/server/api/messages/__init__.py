"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API (https://docs.anthropic.com/en/api/messages).

`cache_control` is accepted wherever clients send it: prefixes are cached without being asked for. Thoughts are not signed, so signatures
are empty, and any is taken. Without `thinking` the model is asked not to think, which is this API's default; `budget_tokens` is given to
the chat template, where there is a variable for it (`thinking_budget`), and is not enforced.
"""

from __future__ import annotations

import msgspec
from starlette.types import ASGIApp

from paceline.core.types import GREEDY
from paceline.server.api.base import Call, Route, json
from paceline.server.api.messages.answer import Answer, MessageAnswer, failed
from paceline.server.api.messages.body import CountRequest, MessagesRequest, sampling, to_asked
from paceline.server.sse import EventStream, unless_gone
from paceline.server.turn import prepare


class CountAnswer(msgspec.Struct):
    input_tokens: int


async def messages(call: Call, body: MessagesRequest) -> ASGIApp:
    model = await call.model(body.model)
    turn = await prepare(call, model, to_asked(body, sampling(call, model, body)))
    turn.answer.check()
    one = Answer(turn, body)
    headers = {**turn.answer.headers(), "request-id": call.id}
    if not body.stream:
        return json(await unless_gone(one.whole(), call.http.receive), headers=headers)
    return EventStream(one.events(), **call.streaming(headers), failed=failed)


async def count_tokens(call: Call, body: CountRequest) -> ASGIApp:
    """Tokens of the prompt that these messages make, with the template's own."""
    model = await call.model(body.model)
    turn = await prepare(call, model, to_asked(body, GREEDY))
    return json(CountAnswer(turn.usage.prompt), headers={"request-id": call.id})


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
