"""Where the front listens: its socket, taken before anything is loaded, and the HTTP server on it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from paceline.core.errors import ConfigError
from paceline.server.connections import Connection, Limits
from paceline.server.settings import Bounds, Listen, ServeSettings, tls_context

KEEP_ALIVE_S = 75
SPARE = 64  # connections beyond those that may be served, so that /health still answers
OWN_FILES = 256  # descriptors for all else
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(listen: Listen) -> socket.socket:
    """The listening socket. Raises ConfigError when the address cannot be had."""
    try:
        if listen.uds is not None:
            return _unix(listen.uds)
        family, _, _, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        where = f"uds = {listen.uds!r}" if listen.uds else f"port = {listen.port}, host = {listen.host!r}"
        raise ConfigError(f"{where}: cannot be listened on ({e.strerror or e}); choose another") from None
    return sock


def _unix(path: str) -> socket.socket:
    """A Unix socket that only this user may use; one that a former server left is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode) and sock.connect_ex(path) != 0:
        os.unlink(path)
    sock.close()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    return sock


class HttpServer(uvicorn.Server):
    """uvicorn's server, with the signals of this project: the first drains and ends well, the second ends at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):
                connection.loop.call_soon_threadsafe(connection.transport.abort)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While serving. A signal that has been heeded is not raised again: ending because of it is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def limits(bounds: Bounds) -> Limits:
    """What connections may keep. As many as asked for, or as the system allows this process to open."""
    most = bounds.max_connections + SPARE
    try:
        import resource
    except ImportError:  # not a POSIX system
        return Limits(bounds.header_timeout, bounds.write_timeout, bounds.stream_buffer, most)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < most + OWN_FILES:
        soft = most + OWN_FILES if hard == resource.RLIM_INFINITY else min(hard, most + OWN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        most = min(most, max(16, soft - OWN_FILES))
    return Limits(bounds.header_timeout, bounds.write_timeout, bounds.stream_buffer, most)


def http_server(app: Any, settings: ServeSettings) -> HttpServer:
    """The HTTP server for an application, with the bounds of the settings."""
    listen, bounds = settings.listen, settings.bounds
    config = uvicorn.Config(
        app,
        root_path=listen.root_path,
        http=functools.partial(Connection, limits=limits(bounds)),  # type: ignore[arg-type]  # any factory will do
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=bounds.max_header_bytes,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.life.drain) + 1,
        proxy_headers=bool(listen.trusted_proxies),
        forwarded_allow_ips=list(listen.trusted_proxies) or None,
        ws="none",
    )
    config.load()
    config.ssl = tls_context(listen)
    return HttpServer(config)
