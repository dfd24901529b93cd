"""The page as a document, its figures, and the operators measured in a serving engine's idle moments. No browser needed."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from command import Served, serve
from starlette.testclient import TestClient

from paceline.core.config import EngineConfig
from paceline.server.api import dashboard
from paceline.server.api.status import described
from paceline.server.app import Server, make_app
from paceline.server.models import Offer
from paceline.server.settings import Access, Observe, ServeSettings

KEY = "a-key-of-this-test"
SVG = "http://www.w3.org/2000/svg"


def client(settings: ServeSettings) -> TestClient:
    """A server that has loaded nothing."""
    app = make_app(Server([Offer(("lab-8m",), None, EngineConfig())], settings))
    return TestClient(app, base_url="http://localhost")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve("--api-key", KEY) as server:
        yield server


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60) as made:
        yield made


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_refers_to_nothing_outside_and_has_no_inline_handlers() -> None:
    html = dashboard.html(False)
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[\w./-]+", html.replace(SVG, "")))
    assert not addresses
    tags = Tags(html).found
    assert {t for t, _ in tags} >= {"style", "script", "dialog", "main"}
    for tag, attributes in tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        for name in ("src", "href", "action"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), f"{tag} {name}"
    assert "url(" not in html
    assert "@import" not in html


def test_the_script_never_parses_markup_nor_reads_its_address() -> None:
    script = "\n".join(re.findall(r"<script>(.*?)</script>", dashboard.html(False), re.DOTALL))
    assert len(script) > 10_000
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "DOMParser",
        "createContextual",
    ):
        assert word not in script
    for word in (
        "location.search",
        "location.hash",
        "location.href",
        "URLSearchParams",
        "localStorage",
        "document.cookie",
    ):
        assert word not in script


def test_every_field_of_the_page_has_a_name() -> None:
    html = dashboard.html(True)
    labelled = set(re.findall(r'<label[^>]* for="([\w-]+)"', html))
    labelled |= {
        m
        for inner in re.findall(r"<label[^>]*>(.*?)</label>", html, re.DOTALL)
        for m in re.findall(r'id="([\w-]+)"', inner)
    }
    fields = {a.get("id") for t, a in Tags(html).found if t in ("input", "select", "textarea")}
    assert fields
    assert fields <= labelled


def test_the_policy_allows_this_script_and_style_alone() -> None:
    answer = client(ServeSettings()).get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(d.strip().split(" ", 1) for d in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in str(policy)
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks]
        assert digests
        assert policy[directive].split() == ["'self'", *(f"'sha256-{d}'" for d in digests)]


def test_the_page_is_sent_once() -> None:
    http = client(ServeSettings())
    first = http.get("/")
    etag = first.headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        again = http.get("/", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert http.get("/", headers={"if-none-match": '"other"'}).text == first.text
    assert http.head("/").headers["content-length"] == str(len(first.content))


def test_the_page_needs_no_key_but_its_figures_do() -> None:
    http = client(ServeSettings(access=Access(api_key=(KEY,))))
    page = http.get("/")
    assert page.status_code == 200
    assert 'data-keys="required"' in page.text
    assert KEY not in page.text
    assert 'data-keys="none"' in client(ServeSettings()).get("/").text
    for path in ("/stats", "/operators"):
        assert http.get(path).status_code == 401
    assert http.get("/stats", headers={"x-api-key": KEY}).json()["models"] == {"lab-8m": {"state": "not loaded"}}


def test_no_dashboard_no_routes() -> None:
    http = client(ServeSettings(observe=Observe(dashboard=False)))
    for path in ("/", "/stats", "/operators"):
        answer = http.get(path)
        assert answer.status_code == 404
        assert "dashboard = false" in answer.json()["error"]["message"]


def test_operators_of_a_model_that_is_not_there() -> None:
    http = client(ServeSettings())
    assert http.get("/operators?model=other").status_code == 404
    answer = http.get("/operators")
    assert answer.status_code == 503  # asking does not load it
    assert "not loaded" in answer.json()["error"]["message"]


def test_operators_wait_for_an_idle_engine_and_leave_no_trace(http: httpx.Client) -> None:
    body = {"prompt": "def", "max_tokens": 3500, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        busy = http.get("/operators").json()
    assert "requests are being served" in busy["refused"]
    assert "steps" not in busy
    before = _settled(http)
    told = _measured(http)
    assert told["refused"] is None
    after = http.get("/stats").json()["models"]["lab-8m"]
    assert after["totals"] == before["totals"]
    assert {s["work"]: s["rows"] for s in told["steps"]}["decode"] == 1
    for step in told["steps"]:
        names = {o["name"] for o in step["operators"]}
        assert {"attention", "rope", "embed", "sample"} < names
        for o in step["operators"]:
            assert o["seconds"] > 0
            memory = o["bytes"] / told["bandwidth"]
            arithmetic = 0 if o["bound"] == "memory" else o["flops"] / told["peaks"][o["bound"]]
            assert o["share"] == pytest.approx(max(memory, arithmetic) / o["seconds"])
    again = http.get("/operators").json()
    assert again["steps"] == told["steps"]  # told again, not measured again
    assert again["age"] > 0


def _settled(http: httpx.Client) -> dict[str, Any]:
    """The figures when they no longer change."""
    last = None
    for _ in range(100):
        now = http.get("/stats").json()["models"]["lab-8m"]
        if now == last and not now["in_hand"]:
            return now
        last = now
        time.sleep(0.3)
    raise AssertionError(last)


def _measured(http: httpx.Client) -> dict[str, Any]:
    """Right after a request was given up, the worker may still be at its last step."""
    for _ in range(100):
        told = http.get("/operators").json()
        if "steps" in told:
            return told
        time.sleep(0.1)
    raise AssertionError(told)


def test_figures_grow_with_what_was_answered(http: httpx.Client) -> None:
    def now() -> dict[str, Any]:
        return http.get("/stats").json()["models"]["lab-8m"]

    before = now()
    answer = http.post("/v1/completions", json={"prompt": "one two three", "max_tokens": 20, "ignore_eos": True}).json()
    after = now()
    grown = {k: after["totals"][k] - before["totals"][k] for k in after["totals"]}
    assert grown["generation_tokens"] == answer["usage"]["completion_tokens"] == 20
    assert grown["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert grown["request_success"] == 1
    assert after["latency"]["ttft"]["+Inf"] == before["latency"]["ttft"].get("+Inf", 0) + 1
    counts = list(after["latency"]["itl"].values())
    assert counts == sorted(counts)
    assert after["state"] == "ready"


def test_the_plan_tells_the_notes_of_the_worker_too() -> None:
    plan = {"model": "m", "notes": ["of the plan"]}
    ready = SimpleNamespace(plan=plan, notes=("of the plan", "of the weights"))
    told = described(SimpleNamespace(ready=ready, fingerprint="pl-1", adapter="", offer=SimpleNamespace(names=("m",))))
    assert told == {"model": "m", "notes": ["of the plan", "of the weights"], "fingerprint": "pl-1", "names": ["m"]}
