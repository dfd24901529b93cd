"""The real server on a free port of this machine, in a thread of the test process, with a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx

from paceline.core.config import EngineConfig
from paceline.server import listening
from paceline.server.app import Server, make_app
from paceline.server.models import Offer
from paceline.server.settings import ServeSettings

CONFIG = EngineConfig(context=1024, threads=1, kv_memory=64 << 20)


@dataclass
class Served:
    """url: without a slash at the end. connections: open ones. run: a coroutine on the server's own loop, from the test's thread."""

    url: str
    server: Server
    loop: asyncio.AbstractEventLoop
    connections: set[Any]

    def run(self, coroutine: Any, timeout: float = 30) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    @property
    def supervisor(self) -> Any:
        return next(iter(self.server.models.loaded.values())).supervisor

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


def settings(**groups: dict[str, Any]) -> ServeSettings:
    """Defaults with changes by group: settings(bounds={"max_n": 4})."""
    made = ServeSettings()
    for group, changes in groups.items():
        made = replace(made, **{group: replace(getattr(made, group), **changes)})
    return made


@contextlib.contextmanager
def served(
    model: str | None = None,
    config: EngineConfig = CONFIG,
    names: tuple[str, ...] = ("lab-8m",),
    made: ServeSettings | None = None,
    **groups: Any,
) -> Iterator[Served]:
    """made: all settings; else groups: changes of the defaults by group."""
    made = made or settings(**{"life": {"drain": 2.0}, **groups})
    made = replace(made, listen=replace(made.listen, port=0))
    started, ended = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    async def whole() -> None:
        server = Server([Offer(names, model, config)], made)
        sock = listening.bind(made.listen)
        http = listening.http_server(make_app(server), made)
        http.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        serving = asyncio.create_task(http.serve([sock]))
        try:
            await server.start()
            found.update(
                url=f"http://127.0.0.1:{sock.getsockname()[1]}",
                server=server,
                loop=asyncio.get_running_loop(),
                connections=http.server_state.connections,
            )
            while not http.started:
                await asyncio.sleep(0.01)
            started.set()
            while not ended.is_set():
                await asyncio.sleep(0.02)
        finally:
            http.should_exit = True
            await serving

    thread = threading.Thread(target=lambda: asyncio.run(whole()), daemon=True)
    thread.start()
    while not started.wait(0.1):
        assert thread.is_alive(), "the server did not start"
    try:
        yield Served(**found)
    finally:
        ended.set()
        thread.join(30)
        assert not thread.is_alive()


def eventually(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.02)
