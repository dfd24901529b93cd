"""Administration, for keys that may and for whoever sits at this machine: models in and out of memory."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.types import ASGIApp

from paceline.core.errors import ConfigError, PacelineError
from paceline.server.api.base import Call, Route, json
from paceline.server.api.status import described
from paceline.server.errors import ApiError, Unavailable
from paceline.server.schema import Body


class ModelRequest(Body):
    model: str


class ReloadRequest(Body):
    model: str | None = None
    path: str | None = None


class LoadAdapterRequest(Body):
    """vLLM's names. lora_path: a folder on the server's machine."""

    lora_name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
    lora_path: str
    model: str | None = None


class UnloadAdapterRequest(Body):
    lora_name: str


class Done(msgspec.Struct):
    status: str


async def reload_model(call: Call, body: ReloadRequest) -> ASGIApp:
    """Serve the model anew, from its old place or another one; requests in hand are finished by the old one."""
    models = call.server.models
    name = body.model or models.first.names[0]
    try:
        model = await models.reload(name, body.path, call.server.settings.life.drain)
    except (ApiError, Unavailable):
        raise
    except PacelineError as e:  # an administrator may know what is wrong with a file
        problems = "; ".join(e.problems) if isinstance(e, ConfigError) else str(e)
        raise ApiError(400, f"path: {problems}", param="path") from None
    call.server.remember(model)
    return json(described(model))


async def load_model(call: Call, body: ModelRequest) -> ASGIApp:
    return json(described(await call.model(body.model)))


async def unload_model(call: Call, body: ModelRequest) -> ASGIApp:
    """Take a model out of memory, after what it is answering; the next request for it loads it again."""
    offer = call.server.models.offers.get(body.model)
    if offer is None:
        raise ApiError(404, f"model: there is no {body.model[:200]!r} here", param="model", code="model_not_found")
    await call.server.models.unload(offer.names[0], call.server.settings.life.drain)
    return json(Done("unloaded"))


async def load_lora_adapter(call: Call, body: LoadAdapterRequest) -> ASGIApp:
    """Requests may name the adapter as their model from now on."""
    await call.server.models.load_adapter(body.model, body.lora_name, body.lora_path)
    return json(Done("loaded"))


async def unload_lora_adapter(call: Call, body: UnloadAdapterRequest) -> ASGIApp:
    """Requests that have begun keep the adapter to their end."""
    await call.server.models.unload_adapter(body.lora_name)
    return json(Done("unloaded"))


ROUTES = [
    Route("POST", "/v1/load_lora_adapter", load_lora_adapter, "Load an adapter.", LoadAdapterRequest, Done, admin=True),
    Route("POST", "/v1/unload_lora_adapter", unload_lora_adapter, "Unload it.", UnloadAdapterRequest, Done, admin=True),
    Route("POST", "/admin/reload", reload_model, "Serve a model anew.", ReloadRequest, dict[str, Any], admin=True),
    Route("POST", "/admin/load", load_model, "Load a model.", ModelRequest, dict[str, Any], admin=True),
    Route("POST", "/admin/unload", unload_model, "Take a model out of memory.", ModelRequest, Done, admin=True),
]
