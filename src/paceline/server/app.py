"""The front process: routes behind the guard, the models behind them, and the order in which all of it starts and stops."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route as HttpRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from paceline import __version__
from paceline.checkpoints.template_meter import Limits
from paceline.server import schema
from paceline.server.access import Gate
from paceline.server.api import Call, Route, routes
from paceline.server.errors import handlers
from paceline.server.guard import Guard, Rules
from paceline.server.metrics import Metrics
from paceline.server.models import Models, Offer
from paceline.server.settings import ServeSettings
from paceline.server.stored import Stored
from paceline.server.supervisor import Restarts
from paceline.server.tracing import traces
from paceline.server.wire import Stepped

log = logging.getLogger("paceline.server")


class Server:
    """What endpoints share. Starts with the first model loading; `state` tells how that stands."""

    def __init__(self, offers: list[Offer], settings: ServeSettings):
        self.settings = settings
        self.metrics = Metrics(vllm=settings.observe.vllm_metrics)
        self.gate = Gate.of(settings)
        self.traces = traces(settings.observe.otel_endpoint)
        life = settings.life
        self.models = Models(
            offers,
            Restarts(life.max_restarts, life.restart_window),
            settings.serving.model_memory,
            self._observe,
            Limits(seconds=settings.bounds.template_timeout),
        )
        self.stored = Stored()
        self.plans: dict[str, Any] = {}  # every configuration that has run, by fingerprint
        self.document = schema.openapi(routes(), __version__)
        self.started = time.time()
        self.draining = False

    @property
    def state(self) -> str:
        """Of the first model: starting, ready, restarting, draining, stopping or failed."""
        first = self.models.loaded.get(self.models.first.names[0])
        return "starting" if first is None else first.supervisor.state

    def _observe(self, name: str, source: int, stepped: Stepped) -> None:
        self.metrics.stepped(name, stepped.gauge, source)
        if stepped.gauge is not None:
            self.metrics.restarts(self.models)

    async def start(self) -> None:
        """Load the first model. Raises the PacelineError that this meets."""
        model = await self.models.get(None)
        self.remember(model)

    def remember(self, model: Any) -> None:
        from paceline.server.api.status import described

        self.plans[model.fingerprint] = described(model)

    async def stop(self) -> None:
        """Take no more requests, let those in hand finish for as long as the settings say, and end the workers."""
        self.draining = True
        left = await self.models.drain(self.settings.life.drain)
        if left:
            log.warning("%d requests were cut off after %g s", left, self.settings.life.drain)
        await self.models.stop()
        self.traces.close()


def make_app(server: Server) -> ASGIApp:
    """The ASGI application: the guard, then the routes."""
    listed = routes()
    app = Starlette(
        routes=[HttpRoute(r.path, _endpoint(server, r), methods=[r.method]) for r in listed],
        exception_handlers=handlers(),
        lifespan=_lifespan(server),
    )
    public = {r.path for r in listed if r.public}
    admin = {r.path.rstrip("/") + "/" for r in listed if r.admin}
    return Guard(app, server.gate, Rules.of(server.settings, public=public, admin=admin))


def _endpoint(server: Server, route: Route) -> Callable[[Request], Awaitable[Any]]:
    """A route's endpoint as Starlette calls it: the body is read and typed before."""

    async def endpoint(request: Request) -> Any:
        body = () if route.body is None else (schema.parse(await request.body(), route.body),)
        call = Call(server, request)
        try:
            return _closing(call, await route.endpoint(call, *body))
        except BaseException:
            call.close()
            raise

    return endpoint


def _closing(call: Call, answer: ASGIApp) -> ASGIApp:
    """An answer after which its call is over."""

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await answer(scope, receive, send)
        finally:
            call.close()

    return whole


def _lifespan(server: Server) -> Callable[[Starlette], Any]:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await server.stop()

    return lifespan
