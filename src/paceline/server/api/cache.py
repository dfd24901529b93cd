"""Control of the KV tiers, for administrators: what they hold of a prompt, and to pin, move and clear it.

Blocks belong to the identity that computed them; `key` names another than one's own, and only its requests find them.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.types import ASGIApp

from paceline.core.types import GREEDY
from paceline.server.api.base import Call, Route, json
from paceline.server.errors import ApiError
from paceline.server.schema import Body
from paceline.server.turn import MAX_MESSAGES, Asked, prepare


class CacheRequest(Body):
    """Of which text: a prompt, token ids, or the beginning of a conversation."""

    model: str | None = None
    prompt: str | None = None
    tokens: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]], msgspec.Meta(max_length=1 << 20)] | None = (
        None
    )
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    key: str | None = None


class MoveRequest(CacheRequest, kw_only=True):
    source: str
    target: str


class ClearRequest(Body):
    model: str | None = None
    tier: str | None = None
    key: str | None = None


class CacheAnswer(msgspec.Struct):
    result: Any


async def cache_stats(call: Call) -> ASGIApp:
    """What the tiers of every loaded model hold and have done."""
    loaded = call.server.models.loaded.values()
    with_tiers = [m for m in loaded if any("kv_tier" in t.manifest().seams for t in m.front.plan.techniques)]
    return json({m.name: await m.supervisor.ask("cache_stats") for m in with_tiers})


async def cache_lookup(call: Call, body: CacheRequest) -> ASGIApp:
    """How many tokens of a text each tier holds."""
    return await _ask(call, body, "cache_lookup")


async def cache_pin(call: Call, body: CacheRequest) -> ASGIApp:
    """Keep a text's blocks whatever the limits say; how many there are."""
    return await _ask(call, body, "cache_pin")


async def cache_unpin(call: Call, body: CacheRequest) -> ASGIApp:
    return await _ask(call, body, "cache_unpin")


async def cache_move(call: Call, body: MoveRequest) -> ASGIApp:
    """Carry a text's blocks from one tier to another; how many were."""
    return await _ask(call, body, "cache_move", source=body.source, target=body.target)


async def cache_clear(call: Call, body: ClearRequest) -> ASGIApp:
    """Delete the blocks of a tier (or all), of a key (or everybody); how many there were."""
    model = await call.model(body.model)
    return json(CacheAnswer(await model.supervisor.ask("cache_clear", tier=body.tier, salt=body.key)))


async def _ask(call: Call, body: CacheRequest, verb: str, **more: Any) -> ASGIApp:
    model = await call.model(body.model)
    given = [x for x in (body.prompt, body.tokens, body.messages) if x is not None]
    if len(given) != 1:
        raise ApiError(400, "prompt: give exactly one of prompt, tokens, messages", param="prompt")
    if body.tokens is not None:
        tokens = body.tokens
    elif body.prompt is not None:
        tokens = await model.encode(body.prompt)
    else:
        asked = Asked(body.messages or [], GREEDY, add_generation_prompt=False)
        tokens = list((await prepare(call, model, asked)).answer.requests[0].tokens)
    salt = call.identity.name if body.key is None else body.key
    return json(CacheAnswer(await model.supervisor.ask(verb, tokens=tokens, salt=salt, **more)))


def _route(name: str, endpoint: Any, summary: str, body: Any = CacheRequest) -> Route:
    return Route("POST", f"/admin/cache/{name}", endpoint, summary, body, CacheAnswer, admin=True)


ROUTES = [
    Route("GET", "/admin/cache", cache_stats, "What the KV tiers hold.", answer=dict[str, Any], admin=True),
    _route("lookup", cache_lookup, "What the tiers hold of a text."),
    _route("pin", cache_pin, "Keep a text's blocks."),
    _route("unpin", cache_unpin, "Let a text's blocks go."),
    _route("move", cache_move, "Carry a text's blocks to another tier.", MoveRequest),
    _route("clear", cache_clear, "Delete blocks.", ClearRequest),
]
