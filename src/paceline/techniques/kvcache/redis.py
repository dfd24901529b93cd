"""A tier of KV blocks in Redis or Valkey, shared by the machines that run the same model.

Blocks are read ahead in the background while a request waits, written in the background, and never asked for by the thread that
computes. Each call has a time limit; a server that fails is left alone for a while, longer each time. What its size may be is the server's
own business (`maxmemory`, `maxmemory-policy allkeys-lru`); blocks expire when unused. LMCache, arXiv:2510.09665, Redis backend.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from paceline.core.blocks import KEY_BYTES
from paceline.core.errors import ConfigError
from paceline.core.technique import Fact, Manifest, Technique, tune
from paceline.core.tier import FETCH, Tier
from paceline.techniques.parts.pause import Pause
from paceline.techniques.parts.prefixes import why_no_prefix

URL_VARIABLE = "PACELINE_REDIS_URL"
PREFIX = b"paceline:kv:"
CONNECT_SECONDS = 1.0
CALL_SECONDS = 0.2
MAX_KNOWN = 1 << 17
MAX_KEYS = 1 << 20


class RedisStore:
    """Blocks under `paceline:kv:<key>` on a server. Raises ConfigError for a URL that is none, or without the redis package.

    The URL may hold a password: it is in no message and no statistics.
    """

    name = "redis"
    near = False
    ahead = True

    def __init__(self, url: str, max_age: float):
        try:
            import redis
        except ImportError:
            raise ConfigError("kvcache/redis needs the redis package: pip install 'paceline[redis]'") from None
        ours = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": CALL_SECONDS, "decode_responses": False}
        try:
            self._server: Any = redis.Redis.from_url(url, protocol=2, retry=None, max_connections=4)
        except Exception:  # whatever the parser raises would quote the URL
            raise ConfigError(
                "kvcache/redis: url is not redis://[user:password@]host[:port][/db], rediss://... or unix://path"
            ) from None
        self._server.connection_pool.connection_kwargs.update(ours)  # whatever the URL says
        self._errors = (redis.RedisError, OSError)
        self.max_age_ms = max(1, int(1000 * max_age))
        self.pinned: Set[bytes] = frozenset()
        self.pause = Pause("the Redis tier of KV blocks", 1, 60)
        self._known: OrderedDict[bytes, None] = OrderedDict()  # keys that were there when last we looked
        self._lock = threading.Lock()

    @property
    def accepts(self) -> bool:
        return not self.pause.active

    def has(self, key: bytes) -> bool:
        return key in self._known

    def find(self, keys: list[bytes]) -> int:
        def ask(server: Any) -> int:
            pipeline = server.pipeline(transaction=False)
            for key in keys:
                pipeline.exists(PREFIX + key)
            return next((i for i, there in enumerate(pipeline.execute()) if not there), len(keys))

        return self._call(ask, 0) if keys else 0

    def get(self, key: bytes, n_bytes: int) -> bytes | None:
        def ask(server: Any) -> bytes | None:
            pipeline = server.pipeline(transaction=False)
            pipeline.getrange(PREFIX + key, 0, n_bytes)  # inclusive: one byte more than is sound
            if key in self.pinned:
                pipeline.persist(PREFIX + key)
            else:
                pipeline.pexpire(PREFIX + key, self.max_age_ms)
            return bytes(pipeline.execute()[0]) or None

        raw = self._call(ask, None)
        self._note(key, raw is not None)
        return raw

    def put(self, key: bytes, raw: bytes) -> list[tuple[bytes, bytes]]:
        life = None if key in self.pinned else self.max_age_ms
        kept = self._call(lambda server: bool(server.set(PREFIX + key, raw, px=life)), False)
        self._note(key, kept)
        return [] if kept else [(key, raw)]

    def touch(self, key: bytes, index: int) -> None:
        """Reading has renewed its life; which to give up is the server's choice."""

    def delete(self, key: bytes) -> bool:
        self._note(key, False)
        return self._call(lambda server: bool(server.delete(PREFIX + key)), False)

    def keys(self, owner: bytes | None) -> Iterable[bytes]:
        def ask(server: Any) -> list[bytes]:
            found: list[bytes] = []
            for name in server.scan_iter(PREFIX + b"*", count=1000):
                key = name[len(PREFIX) :]
                if len(key) == KEY_BYTES and key.startswith(owner or b""):
                    found.append(key)
                if len(found) == MAX_KEYS:
                    break
            return found

        return self._call(ask, [])

    def stats(self) -> dict[str, Any]:
        """n_blocks: those this process knows of."""
        return {
            "n_blocks": len(self._known),
            "n_failures": self.pause.n_failures,
            "paused": self.pause.why if self.pause.active else None,
        }

    def close(self) -> None:
        self._server.close()

    def _call(self, ask: Callable[[Any], Any], otherwise: Any) -> Any:
        """Ask the server, unless it is paused; `otherwise` when it does not answer."""
        if self.pause.active:
            return otherwise
        try:
            answer = ask(self._server)
        except self._errors as e:
            self.pause.failed(type(e).__name__)  # its text may quote an address
            return otherwise
        self.pause.worked()
        return answer

    def _note(self, key: bytes, there: bool) -> None:
        with self._lock:
            self._known.pop(key, None)
            if there:
                self._known[key] = None
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)


@dataclass(frozen=True)
class Redis(Technique):
    url: str = tune("", secret=True, help=f"the server; by default ${URL_VARIABLE}, else redis://localhost:6379/0")
    max_age_h: float = tune(24.0, 0.001, 1e6, log=True, help="hours after their last use that blocks are kept")
    fetch: str = tune(
        "measured", choices=FETCH, help="bring blocks back when that is quicker than computing, always or never"
    )
    through: bool = tune(True, help="write blocks when they are computed, so that other machines find them at once")

    def manifest(self) -> Manifest:
        return Manifest(frozenset({"kv_tier"}), needs=frozenset({Fact.PREFIX_PURE}), paper="2510.09665")

    def why_not(self, context: Any) -> str | None:
        return why_no_prefix(context)

    def build(self, context: Any) -> Tier:
        url = self.url or os.environ.get(URL_VARIABLE) or "redis://localhost:6379/0"
        return Tier(RedisStore(url, self.max_age_h * 3600), self.fetch, self.through)
