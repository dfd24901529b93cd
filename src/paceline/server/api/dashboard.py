"""The page at /, and the two routes it reads besides those of the API: figures to be polled, and the operators of a step.

The page is one document with its styles and script inside, allowed by their hashes; it asks nothing of any other server.
"""

from __future__ import annotations

import hashlib
import re
import time
from functools import cache
from importlib import resources
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from paceline import __version__
from paceline.server.api.base import Call, Route, json
from paceline.server.errors import ApiError
from paceline.server.guard import page_csp
from paceline.server.models import Model

LATENCIES = {"ttft": "time_to_first_token_seconds", "itl": "inter_token_latency_seconds"}
MEASURING_S = 120.0


@cache
def html(keys: bool) -> str:
    """The page as it is sent. keys: whether it has to ask for one."""
    folder = resources.files("paceline.server").joinpath("page")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    page = read("index.html").replace("{keys}", "required" if keys else "none")
    page = page.replace('<link rel="stylesheet" href="page.css">', f"<style>{read('page.css')}</style>")
    return re.sub(r'<script src="(\w+\.js)"></script>', lambda m: f"<script>{read(m[1])}</script>", page)


async def dashboard(call: Call) -> ASGIApp:
    """The page; 304 where the browser has it."""
    _need_dashboard(call)
    page = html(call.server.settings.access.has_keys)
    etag = f'"{hashlib.sha256(page.encode()).hexdigest()[:32]}"'
    policy = (
        f"{page_csp(page)}; require-trusted-types-for 'script'"  # even a mistake of ours could not run a model's text
    )
    headers = {"etag": etag, "content-security-policy": policy, "cache-control": "no-cache"}
    known = call.http.headers.get("if-none-match", "")
    if etag in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(page, headers=headers, media_type="text/html")


async def stats(call: Call) -> ASGIApp:
    """Gauges, totals and latency histograms of every model that this key may use: numbers in memory, so polling costs next to nothing.

    Totals only grow; rates and recent percentiles come from the differences of two answers.
    """
    _need_dashboard(call)
    server = call.server
    own = {offer.names[0]: offer for offer in server.models.offers.values()}
    return json(
        {
            "version": __version__,
            "time": time.time(),
            "uptime": time.time() - server.started,
            "state": "draining" if server.draining else server.state,
            "models": {
                name: _stats(call, name)
                for name, offer in own.items()
                if any(call.identity.may_use(n) for n in offer.names)
            },
        }
    )


def _stats(call: Call, name: str) -> dict[str, Any]:
    model = call.server.models.loaded.get(name)
    if model is None:
        return {"state": "not loaded"}
    supervisor, metrics = model.supervisor, call.server.metrics
    return {
        "state": supervisor.state,
        "fingerprint": None if supervisor.ready is None else model.fingerprint,
        "running": supervisor.gauge.n_running,
        "waiting": supervisor.gauge.n_waiting,
        "in_hand": supervisor.n_live,
        "kv_used": supervisor.gauge.kv_used,
        "restarts": supervisor.n_restarts,
        "totals": metrics.totals(name),
        "latency": {short: metrics.buckets(name, long) for short, long in LATENCIES.items()},
    }


async def operators(call: Call) -> ASGIApp:
    """What each operator of a model's steps achieves against the machine's measured limits; see `analysis/probe.py`.

    Measured while nothing is being served, and told again for a minute.
    """
    _need_dashboard(call)
    model = _loaded(call, call.http.query_params.get("model"))
    async with model.probing:
        return json({"model": model.name, **await model.supervisor.ask("operators", MEASURING_S)})


def _loaded(call: Call, name: str | None) -> Model:
    """The model of that name (None: the first), which is not loaded for this. Raises ApiError."""
    models = call.server.models
    offer = models.first if name is None else models.offers.get(name)
    if offer is None or not call.identity.may_use(name or offer.names[0]):
        raise ApiError(404, f"model: there is no {str(name)[:200]!r} here", param="model", code="model_not_found")
    model = models.loaded.get(offer.names[0])
    if model is None:
        raise ApiError(503, f"{offer.names[0]} is not loaded; it will be with the first request for it")
    return model


def _need_dashboard(call: Call) -> None:
    if not call.server.settings.observe.dashboard:
        raise ApiError(404, "the dashboard is switched off here (dashboard = false)")


ROUTES = [
    Route("GET", "/", dashboard, "The dashboard.", media="text/html"),
    Route("GET", "/stats", stats, "Figures of the dashboard.", answer=dict[str, Any]),
    Route("GET", "/operators", operators, "Operators against the machine's limits.", answer=dict[str, Any]),
]
