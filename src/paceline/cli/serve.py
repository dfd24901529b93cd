"""`paceline serve`: a model behind the OpenAI API, for many users at once."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any

import typer

from paceline.cli import show
from paceline.cli.serve_options import serve_options
from paceline.core.config import EngineConfig
from paceline.server.settings import ServeSettings

if TYPE_CHECKING:
    from paceline.server.app import Server

log = logging.getLogger("paceline.server")


def register(app: typer.Typer) -> None:
    @app.command(rich_help_panel="Use a model")
    @serve_options
    def serve(
        model: str | None,
        config: EngineConfig,
        settings: ServeSettings,
        name: str = typer.Argument(None, metavar="[MODEL]", help="The model; same as --model."),
    ) -> None:
        """Serve a model over HTTP, as OpenAI's API (and Anthropic's).

        Examples:

          paceline serve

          paceline serve ./Llama-3.2-1B --format int4 --port 8080

          paceline serve user/repo:Q4_K_M --host 0.0.0.0 --keys-file keys.json

          paceline serve --config paceline.toml
        """
        from paceline.server.app import Server
        from paceline.server.logs import configure

        configure(settings.observe)
        asyncio.run(_serve(Server(offers(name or model, config, settings), settings)))


def offers(model: str | None, config: EngineConfig, settings: ServeSettings) -> list[Any]:
    """The models that the settings name, the first being the one that is loaded at the start."""
    from pathlib import Path

    from paceline.lab import DEFAULT
    from paceline.server.models import Offer
    from paceline.server.settings import pairs

    own = model or DEFAULT
    short = Path(own).name if Path(own).exists() else own
    names = settings.serving.served_name or tuple(dict.fromkeys((short, own)))
    further = [Offer((name,), path, config) for name, path in pairs(settings.serving.models).items()]
    return [Offer(names, model, config), *further]


async def _serve(server: Server) -> None:
    """Listen at once, load meanwhile: /ready turns 200 when the model is there."""
    import uvicorn

    from paceline.server.app import make_app

    http = uvicorn.Server(uvicorn_config(make_app(server), server.settings))
    sockets = None
    starting = asyncio.create_task(server.start())
    serving = asyncio.create_task(http.serve(sockets))
    try:
        await asyncio.wait({starting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.cancelled():
            starting.result()  # raises what loading met
            announce(server)
        await serving
    except BaseException:
        http.should_exit = True
        await asyncio.wait({serving}, timeout=5)
        raise
    finally:
        starting.cancel()


def uvicorn_config(app: Any, settings: ServeSettings) -> Any:
    import uvicorn

    listen, bounds = settings.listen, settings.bounds
    where: dict[str, Any] = {"uds": listen.uds} if listen.uds else {"host": listen.host, "port": listen.port}
    return uvicorn.Config(
        app,
        **where,
        root_path=listen.root_path,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        h11_max_incomplete_event_size=bounds.max_header_bytes,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.life.drain) + 10,
        ssl_keyfile=listen.tls_key,
        ssl_certfile=listen.tls_cert,
        proxy_headers=bool(listen.trusted_proxies),
        forwarded_allow_ips=list(listen.trusted_proxies) or None,
        ws="none",
    )


def announce(server: Server) -> None:
    """Where it listens, what runs and within which limits, for the person who started it."""
    model = server.models.loaded[server.models.first.names[0]]
    listen, plan = server.settings.listen, model.ready.plan
    scheme = "https" if listen.tls_cert else "http"
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    where = f"unix:{listen.uds}" if listen.uds else f"{scheme}://{host}:{listen.port}"
    show.notes(model.ready.notes)
    limits = plan["limits"]
    rows = [
        ("address", f"{where}/v1" if not listen.uds else where),
        ("model", f"{model.name}: {plan['formats']}; {show.size(plan['weight_bytes'])} of weights"),
        (
            "plan",
            f"{plan['backend']} {plan['isa'] or ''}, {plan['threads']} threads; {', '.join(plan['techniques']) or 'plain'}",
        ),
        (
            "limits",
            f"context {plan['context']}, {limits['max_seqs']} sequences at once, {plan['kv_tokens']} tokens of KV cache",
        ),
        ("keys", "required" if server.settings.access.has_keys else "none: everybody on this machine may use it"),
        ("fingerprint", model.fingerprint),
    ]
    for label, text in rows:
        show.err.print(f"[bold]{label:>12}[/bold]  {text}", highlight=False, soft_wrap=True)
    sys.stderr.flush()
