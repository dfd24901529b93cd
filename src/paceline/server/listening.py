"""Where the front listens: its socket, taken before anything is loaded, and the HTTP server on it."""

from __future__ import annotations

import os
import socket
import stat
from typing import Any

import uvicorn

from paceline.core.errors import ConfigError
from paceline.server.settings import Listen, ServeSettings, tls_context

KEEP_ALIVE_S = 75


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


def http_server(app: Any, settings: ServeSettings) -> uvicorn.Server:
    """The HTTP server for an application, with the bounds of the settings."""
    listen, bounds = settings.listen, settings.bounds
    config = uvicorn.Config(
        app,
        root_path=listen.root_path,
        http="h11",  # bounds the size of headers
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=bounds.max_header_bytes,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.life.drain) + 1,
        proxy_headers=bool(listen.trusted_proxies),
        forwarded_allow_ips=list(listen.trusted_proxies) or None,
        ws="none",
        backlog=min(bounds.max_connections, 4096),
    )
    config.load()
    config.ssl = tls_context(listen)
    return uvicorn.Server(config)
