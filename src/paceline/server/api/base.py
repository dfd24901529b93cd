"""What every route is made of: its declaration, the call it gets, and answers in JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from paceline.server.access import need_model
from paceline.server.keys import Identity
from paceline.server.models import Model

if TYPE_CHECKING:
    from paceline.server.app import Server

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Call:
    """One HTTP request on its way to an endpoint."""

    server: Server
    http: HttpRequest
    in_hand: list[Model] = field(default_factory=list)

    @property
    def identity(self) -> Identity:
        """Who asks."""
        found: Identity = self.http.scope["state"]["identity"]
        return found

    @property
    def id(self) -> str:
        """The request's id, as logged and sent back."""
        return str(self.http.scope["state"]["request_id"])

    @property
    def wants_receipt(self) -> bool:
        return self.server.settings.observe.receipts or self.http.headers.get("x-paceline-receipt") == "1"

    async def model(self, name: str | None) -> Model:
        """The model a request names, loaded. Raises ApiError when there is none, or none for this key."""
        models = self.server.models
        offer = models.first if name is None else models.offers.get(name)
        if offer is not None:
            need_model(self.identity, name or offer.names[0])
        found = await models.get(name)
        found.n_calls += 1  # before anything else can run: it is not unloaded while it is in hand
        self.in_hand.append(found)
        self.server.remember(found)
        return found

    def close(self) -> None:
        """The call is over."""
        while self.in_hand:
            self.in_hand.pop().n_calls -= 1

    def streaming(self, headers: Mapping[str, str]) -> dict[str, Any]:
        """How the settings want events to be sent."""
        bounds = self.server.settings.bounds
        return {"keep_alive_s": bounds.keep_alive, "write_timeout_s": bounds.write_timeout, "headers": dict(headers)}


Endpoint = Callable[..., Awaitable[ASGIApp]]


@dataclass(frozen=True)
class Route:
    """endpoint(call) or, with a body type, endpoint(call, body). answer: the type of its JSON, for the OpenAPI document."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    body: type[msgspec.Struct] | None = None
    answer: Any = None
    streams: bool = False
    media: str | None = None
    errors: tuple[int, ...] = (400, 401, 403, 404, 413, 415, 429, 500, 503)
    public: bool = False  # needs no key
    admin: bool = False


def json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_encode(value), status, dict(headers or {}), "application/json")


def encode(value: Any) -> bytes:
    return _encode(value)
