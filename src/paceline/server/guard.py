"""The outermost layer of the server, plain ASGI: nothing reaches a route that has not passed here, and nothing is held back on the way out.

In the order of the checks: a request id; bounds on headers; the host addressed (DNS rebinding) and the page that asks (CORS, forged
requests); how many requests at once; the key; who may administer; type and size of the body. A route is guarded unless it is listed as
public. The identity is found in `scope["state"]["identity"]`, the id in `scope["state"]["request_id"]`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.server import settings
from paceline.server.access import Gate, Headers
from paceline.server.errors import ApiError, from_exception, render

log = logging.getLogger("paceline.server")

_ONCE = frozenset(
    b"host origin content-length content-type content-encoding sec-fetch-site sec-fetch-mode access-control-request-method".split()
)
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SAFE = ("GET", "HEAD", "OPTIONS")
UNWANTED = 64 << 10  # bytes of a body that are taken in although the answer does not depend on them
UNWANTED_S = 1.0  # and for how long
_JSON = re.compile(r"application/json\s*(;.*)?", re.IGNORECASE | re.DOTALL)
_PORTS = {"http": 80, "https": 443}
PAGE_CSP = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
API_CSP = "default-src 'none'; frame-ancestors 'none'"


def _lines(*lines: str) -> tuple[tuple[bytes, bytes], ...]:
    parts = (line.encode().split(b": ", 1) for line in lines)
    return tuple((name, value) for name, value in parts)


ALWAYS = _lines(
    "x-content-type-options: nosniff",
    "x-frame-options: DENY",
    "referrer-policy: no-referrer",
    "cross-origin-resource-policy: same-origin",
)
API = (*ALWAYS, *_lines("cache-control: no-store", f"content-security-policy: {API_CSP}"))
PAGE = (
    *ALWAYS,
    *_lines("cache-control: no-cache", "content-security-policy: " + PAGE_CSP.format(script="'self'", style="'self'")),
)
PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
    "access-control-allow-headers": "authorization, content-type, x-api-key, api-key, x-request-id, anthropic-version, anthropic-beta",
    "access-control-max-age": "600",
}
EXPOSED = [f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
CORS = _lines("vary: Origin", "access-control-expose-headers: " + ", ".join(["x-request-id", "retry-after", *EXPOSED]))


@dataclass(frozen=True)
class Rules:
    """What the guard holds requests to. hosts: names that may be addressed, None: any; addresses: so may any IP address, which needs no
    DNS that could lie. public, admin: paths without the root path.

    public paths need no key and are compared as a whole; an admin prefix ends with a slash and covers the path without it, too.
    """

    public: frozenset[str] = frozenset({"/health", "/ready"})
    admin: tuple[str, ...] = ("/admin/",)
    hosts: frozenset[str] | None = None
    addresses: bool = False
    origins: frozenset[str] = frozenset()
    max_body: int = 16 << 20
    max_headers: int = 64
    max_header_bytes: int = 32 << 10
    max_requests: int = 4096
    body_timeout: float = 60.0

    @staticmethod
    def of(s: settings.ServeSettings, public: Iterable[str] = (), admin: Iterable[str] = ()) -> Rules:
        """public, admin: further ones.

        Only this machine's names may be addressed on loopback; elsewhere addresses and `allowed_hosts`, where there are any or no keys.
        """
        x, b = s.listen, s.bounds
        hosts = None
        if x.uds is None and (x.local or x.allowed_hosts or not s.access.has_keys):
            own = ("localhost", "127.0.0.1", "::1", x.host) if x.local else (x.host, "localhost", socket.gethostname())
            hosts = frozenset(h.lower().strip("[]") for h in (*own, *x.allowed_hosts))
        return Rules(
            Rules.public | frozenset(public) | (frozenset({"/"}) if s.observe.dashboard else frozenset()),
            (*Rules.admin, *admin),
            hosts,
            not x.local,
            frozenset(o.lower() for o in x.cors_origins),
            b.max_body,
            b.max_headers,
            b.max_header_bytes,
            b.max_connections,
            b.body_timeout,
        )


def page_csp(html: str) -> str:
    """A content security policy under which this page's inline scripts and styles run, by their hashes, and no others."""

    def sources(tag: str) -> str:
        blocks = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}\s*>", html, re.DOTALL | re.IGNORECASE)
        hashes = (base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks if b.strip())
        return " ".join(["'self'", *(f"'sha256-{h}'" for h in hashes)])

    return PAGE_CSP.format(script=sources("script"), style=sources("style"))


class Guard:
    """`Guard(app, gate, rules)` is the ASGI app to serve."""

    def __init__(self, app: ASGIApp, gate: Gate, rules: Rules):
        self.app, self.gate, self.rules = app, gate, rules
        self.n_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route speaks anything else
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: Headers = scope["headers"]
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = _request_id(headers)
        body = _Body(receive, self.rules, _has_body(headers), _is_small(headers))
        answer = _Answer(send, request_id, body, scope["http_version"].startswith("1"))
        self.n_running += 1
        start = time.perf_counter()
        try:
            preflight = self._check(scope, headers, answer)
            await (self.app if preflight is None else preflight)(scope, body, answer)
        except ClientDisconnect:
            log.info("request %s: the client left while sending", request_id)
        except Exception as e:
            await self._fail(e, scope, body, answer)
        finally:
            self.n_running -= 1
            _log(scope, answer, time.perf_counter() - start)

    async def _fail(self, e: Exception, scope: Scope, body: _Body, answer: _Answer) -> None:
        """The answer to an exception, while there is none yet; afterwards only cutting the connection tells the client."""
        error = from_exception(e, answer.request_id)
        if error.status == 500:
            log.error("request %s: %s %r failed", answer.request_id, scope["method"], scope["path"], exc_info=e)
        if answer.ended:
            return
        if answer.started:
            raise e
        await render(error, scope)(scope, body, answer)

    def _check(self, scope: Scope, headers: Headers, answer: _Answer) -> Response | None:
        """Raises ApiError; a response where a browser only asks whether it may."""
        rules, path = self.rules, route_path(scope)
        if len(headers) > rules.max_headers or sum(len(n) + len(v) for n, v in headers) > rules.max_header_bytes:
            raise ApiError(
                431, f"at most {rules.max_headers} headers, {rules.max_header_bytes} bytes together, are read"
            )
        if not _plain_path(path):
            raise ApiError(404, "there is no such route")
        given = _single(headers)
        answer.origin = self._origin(given)
        if scope["method"] == "OPTIONS" and answer.origin and given.get(b"access-control-request-method"):
            return Response(status_code=204, headers=PREFLIGHT)
        if path in rules.public and scope["method"] in ("GET", "HEAD"):
            return None
        if self.n_running > rules.max_requests:
            raise ApiError(503, "too many requests are being answered; try again later", headers={"retry-after": "1"})
        client = scope.get("client")
        identity = self.gate.identify(headers, client[0] if client else None)
        scope["state"]["identity"] = identity
        if not identity.admin and any((path + "/").startswith(prefix) for prefix in rules.admin):
            raise ApiError(403, "this route needs the key of an administrator")
        if scope["method"] not in _SAFE:
            self._check_body(given, answer.body.announced)
        return None

    def _origin(self, given: Mapping[bytes, str]) -> str | None:
        """The web origin that asks, if it is one that may read answers. Raises ApiError for a wrong host or a foreign page."""
        host = given.get(b"host", "")
        name = _split(host)[0]
        hosts, addressed = self.rules.hosts, self.rules.addresses and _is_address(name)
        if hosts is not None and name not in hosts and not addressed:
            raise ApiError(
                421, "this server does not answer for the host addressed; --allowed-hosts names further ones"
            )
        origin = given.get(b"origin", "").lower()
        if origin in self.rules.origins:
            return origin
        embedded = (
            given.get(b"sec-fetch-site") in ("cross-site", "same-site") and given.get(b"sec-fetch-mode") != "navigate"
        )
        if (origin and not _same(origin, host)) or (embedded and not origin):  # a link that somebody follows is neither
            raise ApiError(403, "pages of this origin may not use this server; --cors-origins names those that may")
        return None

    def _check_body(self, given: Mapping[bytes, str], announced: bool) -> None:
        length = given.get(b"content-length", "")
        if length and not re.fullmatch(r"[0-9]{1,18}", length):
            raise ApiError(400, "content-length must be a number of bytes")
        if length and int(length) > self.rules.max_body:
            raise _too_large(self.rules.max_body)
        if not announced:
            return
        if not _JSON.fullmatch(given.get(b"content-type", "")):
            raise ApiError(415, "the body must be JSON, sent with content-type: application/json")
        if given.get(b"content-encoding", "") not in ("", "identity"):
            raise ApiError(415, "compressed bodies are not read; send it without content-encoding")


def _log(scope: Scope, answer: _Answer, seconds: float) -> None:
    """One line a request: who asked for what and how it went, nothing of what was said."""
    identity = scope["state"].get("identity")
    extra = {
        "request": answer.request_id,
        "status": answer.status if answer.ended else 499,  # the client left before the end
        "ms": round(1e3 * seconds, 1),
        "key": identity.name or None if identity is not None else None,
    }
    level = logging.DEBUG if scope["method"] == "GET" else logging.INFO
    log.log(level, "%s %s", scope["method"], route_path(scope)[:200].encode("unicode_escape").decode(), extra=extra)


class _Body:
    """`receive`, with a bound on the body's size and on the time it takes to arrive."""

    def __init__(self, receive: Receive, rules: Rules, announced: bool, small: bool = False):
        self.receive, self.limit, self.announced, self.small = receive, rules.max_body, announced, small
        self.deadline = asyncio.get_running_loop().time() + rules.body_timeout
        self.n_bytes = 0
        self.complete = False

    async def __call__(self) -> Message:
        if self.complete:  # what still comes is the end of the connection, whenever that is
            return await self.receive()
        try:
            left = self.deadline - asyncio.get_running_loop().time()
            message = await (asyncio.wait_for(self.receive(), left) if self.announced else self.receive())
        except asyncio.TimeoutError:
            raise ApiError(408, "the body of the request did not arrive in time") from None
        if message["type"] == "http.request" and message.get("body") and not self.announced:
            raise ApiError(411, "the length of the body must be announced by content-length")  # its type is unchecked
        if message["type"] == "http.request":
            self.n_bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.n_bytes > self.limit:
                raise _too_large(self.limit)
        return message

    async def finish(self) -> None:
        """Take the rest of a small body that nobody wants: what is unread when a connection is closed can cost the client the answer."""
        if self.complete or not (self.small and self.announced):
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._rest(), UNWANTED_S)

    async def _rest(self) -> None:
        while not self.complete:
            message = await self.receive()
            self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)


class _Answer:
    """`send`, with the headers that every answer carries. Bodies pass as they come."""

    def __init__(self, send: Send, request_id: str, body: _Body, may_close: bool):
        self.send, self.request_id, self.body, self.may_close = send, request_id, body, may_close
        self.origin: str | None = None
        self.started = self.ended = False
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            await self.body.finish()
            given = message.get("headers", [])
            names = {name.lower(): value for name, value in given}
            message = {**message, "headers": [*given, *(h for h in self._headers(names) if h[0] not in names)]}
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self.send(message)

    def _headers(self, given: Mapping[bytes, bytes]) -> Headers:
        """What is added unless the route itself said otherwise."""
        kind = given.get(b"content-type", b"")
        found = [(b"x-request-id", self.request_id.encode()), *(PAGE if kind.startswith(b"text/html") else API)]
        if self.may_close and self.body.announced and not self.body.complete:  # or the server would go on reading it
            found.append((b"connection", b"close"))
        if kind.startswith(b"text/event-stream"):
            found.append((b"x-accel-buffering", b"no"))  # or nginx collects the stream
        if self.origin:
            found += [(b"access-control-allow-origin", self.origin.encode("latin-1")), *CORS]
        return found


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes that are read")


def route_path(scope: Scope) -> str:
    """The path as routes know it: without the prefix that a reverse proxy stripped."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _plain_path(path: str) -> bool:
    """One spelling per route: paths that a proxy and a router could read differently are not served."""
    return path.startswith("/") and len(path) <= 2048 and not re.search(r"//|/\.\.?(/|$)|\\|[\x00-\x1f\x7f]", path)


def _single(headers: Headers) -> dict[bytes, str]:
    """The headers that are read here. Raises ApiError 400 where one of them is given twice with different values."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in _ONCE:
            text = value.decode("latin-1").strip()
            if found.setdefault(name, text) != text:
                raise ApiError(400, f"the header {name.decode()} is given more than once")
    return found


def _request_id(headers: Headers) -> str:
    """The client's own, if it can safely be logged and sent back, else a fresh one."""
    given = [value.decode("latin-1") for name, value in headers if name == b"x-request-id"]
    return given[0] if len(given) == 1 and _ID.fullmatch(given[0]) else f"req-{secrets.token_hex(12)}"


def _has_body(headers: Headers) -> bool:
    return any(n == b"transfer-encoding" or (n == b"content-length" and v.strip(b" 0")) for n, v in headers)


def _is_small(headers: Headers) -> bool:
    """Whether a body is on its way that is worth taking in; a client that asks first (Expect) has not sent it."""
    if any(n == b"expect" for n, _ in headers):
        return False
    lengths = [v for n, v in headers if n == b"content-length"]
    return bool(lengths) and all(len(v) <= len(str(UNWANTED)) and v.isdigit() and int(v) <= UNWANTED for v in lengths)


def _split(authority: str, scheme: str = "") -> tuple[str, int | None]:
    """(name in lower case, port or the scheme's own); an empty name where it cannot be read."""
    try:
        u = urlsplit(f"//{authority}")
        if u.path or u.query or u.fragment or "@" in authority or not u.hostname:
            return "", None
        return u.hostname.lower(), u.port or _PORTS.get(scheme)
    except ValueError:
        return "", None


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _same(origin: str, host: str) -> bool:
    """Whether a page of this origin was served under this Host. The scheme may differ: a proxy in front may speak TLS."""
    scheme, _, authority = origin.partition("://")
    name, port = _split(authority, scheme)
    return bool(name) and scheme in _PORTS and (name, port) == _split(host, scheme)
