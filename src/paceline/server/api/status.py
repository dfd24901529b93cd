"""How the server stands: health, readiness, version, models, the plan, metrics, load."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from paceline.server.api.base import Call, Route, json
from paceline.server.errors import ApiError


class ModelCard(msgspec.Struct):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    parent: str | None = None  # of an adapter, the model it changes


class ModelList(msgspec.Struct):
    object: str
    data: list[ModelCard]


async def health(call: Call) -> ASGIApp:
    """200 while the server can be expected to answer, 503 when its engine was given up."""
    states = {m.supervisor.state for m in call.server.models.loaded.values()}
    failed = bool(states) and states == {"failed"}
    return json({"status": "failed" if failed else "ok"}, 503 if failed else 200)


async def ready(call: Call) -> ASGIApp:
    """200 when requests are served at once: not while loading, restarting or draining."""
    server = call.server
    state = "draining" if server.draining else server.state
    return json({"status": state}, 200 if state == "ready" else 503)


async def version(call: Call) -> ASGIApp:
    from paceline import __version__

    return json({"version": __version__})


async def load(call: Call) -> ASGIApp:
    """Requests in hand, as vLLM's /load tells."""
    return json({"server_load": sum(m.supervisor.n_live for m in call.server.models.loaded.values())})


async def models(call: Call) -> ASGIApp:
    names = [n for n in (*call.server.models.offers, *call.server.models.adapters) if call.identity.may_use(n)]
    return json(ModelList("list", [card(call, n) for n in names]))


async def model(call: Call) -> ASGIApp:
    name = call.http.path_params["model"]
    known = call.server.models
    if (name not in known.offers and name not in known.adapters) or not call.identity.may_use(name):
        raise ApiError(404, f"model: there is no {name[:200]!r} here", param="model", code="model_not_found")
    return json(card(call, name))


def card(call: Call, name: str) -> ModelCard:
    models = call.server.models
    offer = models.offers.get(name) or models.adapters[name]
    loaded = models.loaded.get(offer.names[0])
    capacity = None if loaded is None or loaded.supervisor.ready is None else loaded.ready.serving.capacity
    parent = offer.names[0] if name in models.adapters else None
    return ModelCard(name, "model", int(call.server.started), "paceline", capacity, parent)


async def plan(call: Call) -> ASGIApp:
    """What runs: every loaded model's resolved configuration."""
    loaded = call.server.models.loaded.values()
    return json({m.name: described(m) for m in loaded if call.identity.may_use(m.name)})


async def plan_of(call: Call) -> ASGIApp:
    """The configuration behind a `system_fingerprint`."""
    fingerprint = call.http.path_params["fingerprint"]
    found = call.server.plans.get(fingerprint)
    if found is None:
        raise ApiError(404, f"no plan of this server has the fingerprint {fingerprint[:64]!r}")
    return json(found)


def described(m: Any) -> dict[str, Any]:
    adapter = {"adapter": m.adapter, "adapter_digest": m.ready.adapters.get(m.adapter)} if m.adapter else {}
    return {
        **m.ready.plan,
        **adapter,
        "fingerprint": m.fingerprint,
        "names": list(m.offer.names),
        "notes": list(m.ready.notes),
    }


async def metrics(call: Call) -> ASGIApp:
    if not call.server.settings.observe.metrics:
        raise ApiError(404, "metrics are switched off here (metrics = false)")
    return Response(call.server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def document(call: Call) -> ASGIApp:
    """The OpenAPI document of this server."""
    return json(call.server.document)


ROUTES = [
    Route("GET", "/health", health, "Whether the server lives.", answer=dict[str, Any], public=True),
    Route("GET", "/ready", ready, "Whether it serves at once.", answer=dict[str, Any], public=True),
    Route("GET", "/version", version, "The version.", answer=dict[str, Any]),
    Route("GET", "/load", load, "Requests in hand.", answer=dict[str, Any]),
    Route("GET", "/v1/models", models, "The models on offer.", answer=ModelList),
    Route("GET", "/v1/models/{model:path}", model, "One of them.", answer=ModelCard),
    Route("GET", "/plan", plan, "What runs.", answer=dict[str, Any]),
    Route("GET", "/plan/{fingerprint}", plan_of, "What ran for an answer.", answer=dict[str, Any]),
    Route("GET", "/metrics", metrics, "For Prometheus.", media="text/plain"),
    Route("GET", "/openapi.json", document, "This document.", answer=dict[str, Any]),
]
