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
        _run(_serve(Server(offers(name or model, config, settings), settings)))


def _run(main: Any) -> None:
    """In uvloop where it is installed (the extra `fast`)."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


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
    from paceline.server.app import make_app
    from paceline.server.listening import bind, http_server

    listen = server.settings.listen
    sock = bind(listen)
    http = http_server(make_app(server), server.settings)
    starting = asyncio.create_task(server.start())
    serving = asyncio.create_task(http.serve([sock]))
    try:
        await asyncio.wait({starting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()  # raises what loading met
            announce(server, "" if listen.uds else sock.getsockname()[1])
        await serving
    finally:
        starting.cancel()
        http.should_exit = True
        await asyncio.wait({serving}, timeout=5)


def announce(server: Server, port: int | str) -> None:
    """Where it listens, what runs and within which limits, for the person who started it."""
    model = server.models.loaded[server.models.first.names[0]]
    listen, plan = server.settings.listen, model.ready.plan
    scheme = "https" if listen.tls_cert else "http"
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    where = f"unix:{listen.uds}" if listen.uds else f"{scheme}://{host}:{port}"
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
