"""The guard against what clients, browsers and attackers send. The app behind it is Starlette with routes of every kind."""

from __future__ import annotations

import asyncio
import builtins
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from paceline.core.clock import ManualClock
from paceline.core.errors import CheckpointError, ConfigError, OutOfMemory, RequestError, TemplateError
from paceline.server import errors
from paceline.server.access import Gate
from paceline.server.errors import ApiError
from paceline.server.guard import Guard, Rules, page_csp
from paceline.server.keys import Identity, Keyring, Record, digest, write
from paceline.server.quota import Quotas
from paceline.server.settings import Access, Bounds, Listen, Observe, ServeSettings

KEY, ADMIN = "pk-" + "u" * 43, "pk-" + "a" * 43
PAGE = "<html><style>p{}</style><script>let a = 1</script><p>Status</html>"


class Raised(Exception):
    pass


RAISES = {
    "request": RequestError("top_p = 3: must be from 0 to 1"),
    "template": TemplateError("messages: must alternate"),
    "config": ConfigError("/etc/secret/path is wrong"),
    "checkpoint": CheckpointError("/home/me/model.safetensors is truncated"),
    "memory": OutOfMemory("needs 7 GiB of /dev/shm"),
    "bug": Raised("/home/me/secret.py line 3"),
    "api": ApiError(409, "twice", param="id", code="conflict"),
    "group": getattr(builtins, "ExceptionGroup", lambda text, es: es[0])("x", [Raised("/home/me")]),
}


async def echo(request: Request) -> JSONResponse:
    body = await request.body()
    s = request.scope["state"]
    who = s.get("identity")
    return JSONResponse({"n": len(body), "who": who.name if who else None, "id": s["request_id"]})


async def fail(request: Request) -> JSONResponse:
    raise RAISES[request.path_params["kind"]]


async def pieces() -> AsyncIterator[bytes]:
    for i in range(3):
        yield b"data: %d\n\n" % i


async def stream(request: Request) -> StreamingResponse:
    return StreamingResponse(pieces(), media_type="text/event-stream")


async def broken() -> AsyncIterator[bytes]:
    yield b"data: 0\n\n"
    raise Raised("in the middle")


async def break_stream(request: Request) -> StreamingResponse:
    return StreamingResponse(broken(), media_type="text/event-stream")


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse(PAGE)


async def own_csp(request: Request) -> HTMLResponse:
    return HTMLResponse(PAGE, headers={"content-security-policy": page_csp(PAGE)})


APP = Starlette(
    routes=[
        Route("/", page),
        Route("/health", echo),
        Route("/ready", echo),
        Route("/page", own_csp),
        Route("/v1/models", echo),
        Route("/v1/echo", echo, methods=["POST", "PUT", "DELETE"]),
        Route("/v1/stream", stream, methods=["POST", "GET"]),
        Route("/v1/broken", break_stream),
        Route("/metrics", lambda r: PlainTextResponse("x 1")),
        Route("/fail/{kind}", fail),
        Route("/admin/reload", echo, methods=["POST"]),
    ],
    exception_handlers=errors.handlers(),
)


def guard(gate: Gate | None = None, app: Any = APP, **settings: Any) -> Guard:
    s = ServeSettings(**settings)
    return Guard(app, gate or Gate.of(s, ManualClock()), Rules.of(s))


@pytest.fixture
def keyed(tmp_path: Any) -> Guard:
    path = tmp_path / "keys.json"
    rows = [Record("alice", digest(KEY).hex(), 0), Record("root", digest(ADMIN).hex(), 0, admin=True)]
    write(path, rows)
    return guard(access=Access(keys_file=str(path), max_auth_failures=1000))


def ask(app: Any, method: str, path: str, base: str = "http://localhost:8000", **more: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **more)

    return asyncio.run(go())


def is_error(r: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Every failure has OpenAI's shape, an id and the headers of safety."""
    assert r.status_code == status, r.text
    assert r.headers["content-type"] == "application/json"
    assert set(r.json()) == {"error"}
    e = r.json()["error"]
    assert set(e) == {"message", "type", "param", "code"}
    assert e["message"]
    assert code is None or e["code"] == code
    assert r.headers["x-request-id"]
    assert r.headers["x-content-type-options"] == "nosniff"
    assert r.headers["cache-control"] == "no-store"
    return dict(e)


def auth(key: str = KEY) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def scope(method: str = "POST", path: str = "/v1/echo", headers: Any = (), **more: Any) -> dict[str, Any]:
    base = [(b"host", b"localhost")]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        "headers": [*base, *headers], **more,
    }  # fmt: skip


def raw(app: Any, s: dict[str, Any], messages: list[dict[str, Any]], stall: bool = False) -> list[dict[str, Any]]:
    """Drive the app by hand; `stall`: after the messages nothing more comes, not even the end of the connection."""
    sent: list[dict[str, Any]] = []
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            if stall:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}
        return left.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(s, receive, send), 20))
    return sent


def chunk(body: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


JSON_CHUNKED = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]

# ---- keys


def test_every_route_but_the_public_ones_needs_a_key(keyed: Guard) -> None:
    for route in APP.routes:
        assert isinstance(route, Route)
        path = route.path.replace("{kind}", "bug")
        for method in sorted({"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", *(route.methods or ())}):
            public = path in ("/", "/health", "/ready") and method in ("GET", "HEAD")
            r = ask(keyed, method, path)
            if public:
                assert r.status_code == 200, (method, path)
            elif method == "HEAD":
                assert r.status_code == 401
            else:
                is_error(r, 401, "missing_api_key")
                assert r.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    [
        "/invocations", "/pause", "/collective_rpc", "/score", "/v1/loras", "/docs", "/openapi.json", "/health/", "/healthz", "/Health",
        "/ready/../metrics", "/./metrics", "/health%2f..%2fmetrics", "/health/metrics", "/metrics/", "/%2e%2e/metrics",
        "/health;x", "/health%00", "/health\\..\\metrics", "/ready%0d%0ax",
    ],
)  # fmt: skip
def test_unknown_and_disguised_paths_stay_closed(keyed: Guard, path: str) -> None:
    r = ask(keyed, "GET", path)
    assert r.status_code in (401, 404)
    is_error(r, r.status_code)


@pytest.mark.parametrize(
    "path", ["//health", "/a//b", "/../x", "/a/..", "/a/./b", "/a\\b", "/a\x00", "x", "", "/" + "a" * 5000]
)
def test_paths_with_two_readings_are_not_served(keyed: Guard, path: str) -> None:
    sent = raw(keyed, scope("GET", path, [(b"authorization", b"Bearer " + KEY.encode())]), [chunk()])
    assert sent[0]["status"] == 404


@pytest.mark.parametrize("headers", [auth(), {"x-api-key": KEY}, {"api-key": KEY}])
def test_a_key_opens_and_names(keyed: Guard, headers: dict[str, str]) -> None:
    r = ask(keyed, "POST", "/v1/echo", json={"a": 1}, headers=headers)
    assert r.status_code == 200
    assert r.json()["who"] == "alice"
    is_error(ask(keyed, "GET", "/v1/models", headers=auth(KEY[:-1])), 401, "invalid_api_key")
    is_error(ask(keyed, "GET", "/nowhere", headers=headers), 404, "not_found")
    r = ask(keyed, "GET", "/v1/echo", headers=headers)
    is_error(r, 405, "method_not_allowed")
    assert "POST" in r.headers["allow"]


def test_administration_needs_an_administrator(keyed: Guard) -> None:
    e = is_error(ask(keyed, "POST", "/admin/reload", headers=auth()), 403)
    assert e["type"] == "permission_error"
    is_error(ask(keyed, "GET", "/admin", headers=auth()), 403)
    is_error(ask(keyed, "GET", "/admin/any/thing", headers=auth()), 403)
    assert ask(keyed, "POST", "/admin/reload", headers=auth(ADMIN)).json()["who"] == "root"


def test_hammering_is_turned_away_before_the_body_is_read() -> None:
    app = guard(access=Access(api_key=("the-right-key",), max_auth_failures=3))
    for _ in range(3):
        is_error(ask(app, "GET", "/v1/models", headers=auth("wrong")), 401)
    r = ask(app, "GET", "/v1/models", headers=auth("the-right-key"))
    assert is_error(r, 429)["type"] == "rate_limit_error"
    assert int(r.headers["retry-after"]) > 0
    assert ask(app, "GET", "/health").status_code == 200


def test_root_path_is_stripped_before_the_lists_are_read(keyed: Guard) -> None:
    for path, status in (("/llm/health", 200), ("/llm/v1/models", 401), ("/llm/llm/health", 401), ("/llmhealth", 401)):
        assert raw(keyed, scope("GET", path, root_path="/llm"), [chunk()])[0]["status"] == status, path


def test_websockets_are_closed_and_lifespan_passes() -> None:
    assert raw(guard(), {"type": "websocket", "path": "/v1/realtime", "headers": []}, []) == [
        {"type": "websocket.close", "code": 1008}
    ]
    sent = raw(
        guard(), {"type": "lifespan", "state": {}}, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    )
    assert [m["type"] for m in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# ---- bodies and headers


SMALL = Bounds(max_body=1024, max_headers=8, max_header_bytes=1024, body_timeout=0.2)


def test_a_body_too_large_is_refused_by_its_length_unread() -> None:
    for length in (b"1025", b"99999999999999999"):
        s = scope(headers=[(b"content-type", b"application/json"), (b"content-length", length)])
        sent = raw(guard(bounds=SMALL), s, [], stall=True)
        assert sent[0]["status"] == 413
        assert (b"connection", b"close") in sent[0]["headers"]
    assert (
        ask(
            guard(bounds=SMALL), "POST", "/v1/echo", content=b"x" * 1024, headers={"content-type": "application/json"}
        ).json()["n"]
        == 1024
    )


def test_a_chunked_body_is_counted_while_it_comes() -> None:
    sent = raw(guard(bounds=SMALL), scope(headers=JSON_CHUNKED), [chunk(b"x" * 400, True)] * 10**4, stall=True)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"


def test_a_body_that_dribbles_is_given_up() -> None:
    sent = raw(guard(bounds=SMALL), scope(headers=JSON_CHUNKED), [chunk(b"{", True)], stall=True)
    assert sent[0]["status"] == 408


def test_a_body_that_no_header_announces_is_refused() -> None:
    assert raw(guard(), scope(http_version="2"), [chunk(b"{}")])[0]["status"] == 411
    assert raw(guard(), scope(http_version="2"), [chunk()])[0]["status"] == 200


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b"1, 1", b" ", b"1" * 30])
def test_odd_lengths(length: bytes) -> None:
    s = scope(headers=[(b"content-type", b"application/json"), (b"content-length", length)])
    assert raw(guard(), s, [chunk()])[0]["status"] in (200, 400)


def test_a_client_that_leaves_while_sending_is_nobodys_fault(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        raw(guard(), scope(headers=JSON_CHUNKED), [chunk(b"{", True)])
    assert not caplog.records


def test_many_and_long_headers_are_refused() -> None:
    for headers in ({f"x-{i}": "1" for i in range(9)}, {"x": "y" * 1025}, {"x" * 1025: "y"}):
        is_error(ask(guard(bounds=SMALL), "GET", "/health", headers=headers), 431)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": "Application/JSON; charset=utf-8"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "application/jsonp"}, 415),
        ({"content-type": "text/plain; application/json"}, 415),
        ({}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
    ],
)
def test_only_json_is_taken(headers: dict[str, str], status: int) -> None:
    r = ask(guard(), "POST", "/v1/echo", content=b"{}", headers=headers)
    assert r.status_code == status
    if status != 200:
        is_error(r, status)


def test_a_post_without_body_needs_no_type() -> None:
    assert ask(guard(), "POST", "/v1/echo").status_code == 200
    assert ask(guard(), "DELETE", "/v1/echo").status_code == 200


def test_too_many_at_once_get_503_but_health_answers() -> None:
    app = guard(bounds=Bounds(max_connections=2))
    app.n_running = 2
    r = ask(app, "GET", "/v1/models")
    assert is_error(r, 503)["type"] == "overloaded"
    assert r.headers["retry-after"]
    assert ask(app, "GET", "/health").status_code == 200
    assert app.n_running == 2


# ---- browsers


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:9", "[::1]:8000", "mine.example"]
)
def test_names_of_this_machine_are_answered(host: str) -> None:
    app = guard(listen=Listen(allowed_hosts=("mine.example",)))
    assert ask(app, "GET", "/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "",
        "localhost@evil",
        "evil@localhost",
        "[::2]",
        "[",
        "a:b:c",
    ],
)
def test_dns_rebinding_is_misdirected(host: str) -> None:
    is_error(ask(guard(), "GET", "/v1/models", headers={"host": host}), 421, "misdirected_request")
    is_error(ask(guard(), "GET", "/health", headers={"host": host}), 421)


def test_hosts_beyond_loopback() -> None:
    far = Listen(host="0.0.0.0", insecure=True)
    for listen, access, host, status in (
        (far, Access(), "evil.example", 421),  # anybody may use it, but no page by a lying DNS
        (far, Access(), "10.1.2.3:8000", 200),
        (far, Access(api_key=(KEY,)), "any.example", 200),
        (Listen(host="0.0.0.0", allowed_hosts=("llm.example",)), Access(api_key=(KEY,)), "evil.example", 421),
        (Listen(host="0.0.0.0", allowed_hosts=("llm.example",)), Access(api_key=(KEY,)), "llm.example", 200),
        (Listen(uds="/run/x"), Access(), "anything", 200),
    ):
        r = ask(guard(listen=listen, access=access), "GET", "/v1/models", headers={"host": host, **auth()})
        assert r.status_code == status, (listen, host, r.text)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://localhost:8000.evil.example"},
        {"origin": "http://evil@localhost:8000"},
        {"origin": "file://"},
        {"origin": "localhost:8000"},
        {"origin": "://localhost:8000"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_foreign_pages_are_refused(headers: dict[str, str]) -> None:
    for method, path in (
        ("POST", "/v1/echo"),
        ("GET", "/v1/models"),
        ("POST", "/admin/reload"),
        ("OPTIONS", "/v1/echo"),
    ):
        r = ask(guard(), method, path, headers={**headers, "access-control-request-method": "POST"})
        is_error(r, 403)
        assert not any(h.startswith("access-control") for h in r.headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://localhost:8000"},
        {"origin": "HTTP://LOCALHOST:8000"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ],
)
def test_the_servers_own_page_and_links_to_it_work(headers: dict[str, str]) -> None:
    assert ask(guard(), "GET", "/", headers=headers).status_code == 200


def test_default_ports_are_the_same_origin() -> None:
    app = guard(listen=Listen(allowed_hosts=("llm.example",)))
    for origin, host in (
        ("https://llm.example", "llm.example"),
        ("http://llm.example", "llm.example:80"),
        ("https://llm.example:443", "llm.example"),
    ):
        assert ask(app, "POST", "/v1/echo", headers={"origin": origin, "host": host}).status_code == 200
    is_error(ask(app, "POST", "/v1/echo", headers={"origin": "https://llm.example:444", "host": "llm.example"}), 403)


def test_cors_is_for_the_origins_listed_and_never_with_credentials() -> None:
    origin = "https://chat.example"
    app = guard(listen=Listen(cors_origins=(origin,)), access=Access(api_key=(KEY,)))
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    r = ask(app, "OPTIONS", "/v1/echo", headers=asked)
    assert (r.status_code, r.headers["access-control-allow-origin"], r.headers["vary"]) == (204, origin, "Origin")
    assert "authorization" in r.headers["access-control-allow-headers"]
    for r in (
        ask(app, "POST", "/v1/echo", headers={"origin": origin}),
        ask(app, "POST", "/v1/echo", headers={"origin": origin, **auth()}),
    ):
        assert r.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in r.headers
    is_error(ask(app, "OPTIONS", "/v1/echo", headers={**asked, "origin": "https://chat.example.evil"}), 403)
    is_error(ask(app, "OPTIONS", "/v1/echo", headers={"origin": origin}), 401)


def test_one_header_twice_with_two_readings_is_refused() -> None:
    for name in (b"origin", b"host", b"content-length", b"content-type", b"sec-fetch-site"):
        s = scope(headers=[*JSON_CHUNKED, (name, b"1"), (name, b"2")])
        assert raw(guard(), s, [chunk(b"{}")])[0]["status"] in (400, 421), name


def test_pages_may_run_only_what_they_came_with() -> None:
    r = ask(guard(), "GET", "/")
    csp = r.headers["content-security-policy"]
    for part in (
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "form-action 'none'",
        "base-uri 'none'",
    ):
        assert part in csp
    assert "unsafe" not in csp
    assert r.headers["x-frame-options"] == "DENY"
    own = ask(guard(), "GET", "/page").headers["content-security-policy"]
    assert own == page_csp(PAGE)
    assert own.count("'sha256-") == 2
    off = guard(observe=Observe(dashboard=False), access=Access(api_key=(KEY,)))
    is_error(ask(off, "GET", "/"), 401)


# ---- answers


def test_request_ids_are_echoed_when_safe_and_made_otherwise() -> None:
    for given_id in ("abc-1.2:3_X", "a" * 128):
        r = ask(guard(), "POST", "/v1/echo", headers={"x-request-id": given_id})
        assert r.headers["x-request-id"] == r.json()["id"] == given_id
    fresh = set()
    for given_id in ("", "a" * 129, "a b", "ä".encode(), "<script>", "a,b"):
        r = ask(guard(), "POST", "/v1/echo", headers={"x-request-id": given_id})
        fresh.add(r.headers["x-request-id"])
        assert re.fullmatch(r"req-[0-9a-f]{24}", r.headers["x-request-id"])
    assert len(fresh) == 6


READ = ["host", "origin", "content-type", "content-length", "x-request-id", "authorization"]


@given(st.lists(st.tuples(st.sampled_from(READ), st.binary(max_size=40)), max_size=8))
def test_any_headers_get_a_well_formed_answer(headers: list[tuple[str, bytes]]) -> None:
    sent = raw(guard(), {**scope(), "headers": [(n.encode(), v) for n, v in headers]}, [chunk(b"{}")])
    start = sent[0]
    assert start["status"] in (200, 400, 403, 411, 413, 415, 421)
    for name, value in start["headers"]:
        assert re.fullmatch(rb"[a-z0-9-]+", name)
        assert not re.search(rb"[\r\n\x00]", value)
    if start["status"] != 200:
        assert set(json.loads(sent[1]["body"])["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("kind", "status", "type_", "param"),
    [
        ("request", 400, "invalid_request_error", "top_p"),
        ("template", 400, "invalid_request_error", "messages"),
        ("config", 500, "server_error", None),
        ("checkpoint", 500, "server_error", None),
        ("memory", 503, "overloaded", None),
        ("bug", 500, "server_error", None),
        ("group", 500, "server_error", None),
        ("api", 409, "invalid_request_error", "id"),
    ],
)
def test_exceptions_become_errors_without_internals(
    kind: str, status: int, type_: str, param: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    r = ask(guard(), "GET", f"/fail/{kind}", headers={"x-request-id": "the-id"})
    e = is_error(r, status)
    assert (e["type"], e["param"]) == (type_, param)
    if status >= 500:
        assert not re.search(r"/home|/etc|/dev|secret|Traceback", r.text)
    if status == 500:
        assert "the-id" in e["message"]
        logged = [m for m in caplog.records if "the-id" in m.getMessage()]
        assert len(logged) == 1
        assert logged[0].exc_info
    else:
        assert not caplog.records


def test_an_app_without_handlers_is_answered_for_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Raised("/home/me")

    assert "/home" not in is_error(ask(guard(app=app), "GET", "/v1/models"), 500)["message"]


def test_streams_pass_piece_by_piece() -> None:
    """Each piece is out before the next is made."""
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
            }
        )
        for i in range(3):
            events.append(f"made {i}")
            await send({"type": "http.response.body", "body": b"%d" % i, "more_body": i < 2})

    async def send(message: dict[str, Any]) -> None:
        events.append(message.get("body", b"start").decode())
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            assert headers[b"x-accel-buffering"] == b"no"
            assert headers[b"cache-control"] == b"no-store"

    async def receive() -> dict[str, Any]:
        return chunk()

    asyncio.run(guard(app=app)(scope("GET", "/v1/stream"), receive, send))
    assert events == ["start", "made 0", "0", "made 1", "1", "made 2", "2"]
    r = ask(guard(), "POST", "/v1/stream", json={})
    assert r.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"


def test_a_stream_may_outlast_the_time_for_bodies() -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in range(4):
            await asyncio.sleep(0.1)
            yield b"x"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await Request(scope, receive).body()
        await StreamingResponse(slow())(scope, receive, send)

    for method, headers, messages in (("POST", JSON_CHUNKED, [chunk(b"{}")]), ("GET", [], [chunk()])):
        sent = raw(guard(app=app, bounds=SMALL), scope(method, headers=headers), messages, stall=True)
        assert b"".join(m.get("body", b"") for m in sent) == b"xxxx"


def test_a_stream_that_fails_is_cut_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Exception, match="middle"):
        raw(guard(), scope("GET", "/v1/broken", [(b"x-request-id", b"cut-1")]), [chunk()], stall=True)
    assert any("cut-1" in m.getMessage() for m in caplog.records)
    app = guard()
    with pytest.raises(Exception, match="middle"):
        raw(app, scope("GET", "/v1/broken"), [chunk()], stall=True)
    assert app.n_running == 0


def test_identity_reaches_the_quotas() -> None:
    clock = ManualClock()
    gate = Gate(Keyring([KEY]), Identity(""), clock)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        who = scope["state"]["identity"]
        gate.ledger.admit(who.name, Quotas(1), 0)
        grant = gate.admit(Identity(who.name, quotas=Quotas(1)), 0)
        gate.settle(grant, 0)

    r = ask(guard(gate, app), "GET", "/v1/models", headers=auth())
    is_error(r, 429, "rate_limit_exceeded")
    assert r.headers["retry-after"] == "61"
    assert r.headers["x-ratelimit-remaining-requests"] == "0"


def test_errors_in_streams_are_events() -> None:
    text = ApiError(503, "gone").event()
    assert text.startswith(b"data: {")
    assert text.endswith(b"\n\n")
    assert json.loads(text[6:]) == {
        "error": {"message": "gone", "type": "overloaded", "param": None, "code": "overloaded"}
    }
