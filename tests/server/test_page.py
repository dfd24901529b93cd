"""The page in a real browser, on a real server. Skipped where there is no Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from command import Served, serve

pytest.importorskip("playwright", reason="needs playwright (pip install 'paceline[browser]')")
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

KEY = "a-key-of-this-test"
CHAT = "**/v1/chat/completions"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    args = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox itself as root
    with sync_playwright() as p:
        found = None
        for path in (None, shutil.which("chromium"), shutil.which("google-chrome")):
            with contextlib.suppress(Exception):
                found = p.chromium.launch(executable_path=path, args=args)
                break
        if found is None:
            pytest.skip("no Chromium that starts (playwright install chromium)")
        yield found
        found.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    with serve("--api-key", KEY) as server:
        yield server


class Seen:
    """What a page did: the requests it made and what it complained of."""

    def __init__(self, page: Page):
        self.requests: list[Any] = []
        self.problems: list[str] = []
        page.on("request", lambda request: self.requests.append(request))
        page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.problems.append(str(e)))

    def clean(self, url: str) -> None:
        origins = {urlsplit(r.url).netloc for r in self.requests if not r.url.startswith("data:")}
        assert origins == {urlsplit(url).netloc}
        assert not self.problems


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    made = context.new_page()
    made.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    yield made
    context.close()


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answered(chunks: list[dict[str, Any]]) -> str:
    """A streamed answer of these deltas."""
    head = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    told = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in chunks]
    told.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    told.append({**head, "choices": [], "usage": {"completion_tokens": 3}})
    return "".join(f"data: {json.dumps(t)}\n\n" for t in told) + "data: [DONE]\n\n"


def reply(page: Page, *chunks: dict[str, Any]) -> None:
    page.route(CHAT, lambda route: route.fulfill(body=answered(list(chunks)), content_type="text/event-stream"))


def test_everything_fills_in_and_nothing_leaves_the_server(page: Page, served: Served) -> None:
    seen = Seen(page)
    page.goto(served.url)
    expect(page.locator("#state")).to_have_text("ready")
    for text in ("lab-8m", "bf16", "native", "serving/radix"):
        expect(page.locator("#plan")).to_contain_text(text)
    expect(page.locator("#fingerprint")).to_have_text(re.compile("pl-[0-9a-f]{16}"))
    expect(page.locator("#operators tbody tr th").filter(has_text=re.compile("^attention$"))).to_be_visible()
    assert page.locator("#operators tbody .bar rect").count() >= 10
    expect(page.locator("#operators-note")).to_contain_text("memory")
    page.get_by_role("button", name="prompt", exact=True).click()
    expect(page.locator("#operators-note")).to_contain_text("rows after")
    say(page, "Once upon a time there was a cat.")
    expect(page.locator("#last")).to_contain_text(re.compile(r"tokens/s · \d+ tokens · first token after .* finish: "))
    expect(page.locator(".turn.assistant .text")).not_to_be_empty()
    expect(page.locator("#requests")).to_contain_text("1 answered")
    expect(page.locator("#ttft td").first).to_contain_text(re.compile("ms|s"))
    expect(page.locator("#generation-chart polyline")).to_have_count(1)
    expect(page.locator("#generation-peak")).to_have_text(re.compile(r"peak [1-9]"))
    seen.clean(served.url)


def test_a_conversation_is_sent_as_a_whole(page: Page, served: Served) -> None:
    page.goto(served.url)
    expect(page.locator("#state")).to_have_text("ready")
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("5")
    say(page, "one")
    expect(page.locator("#last")).to_contain_text("finish")
    first = page.locator(".turn.assistant .text").inner_text()
    with page.expect_request(CHAT) as caught:
        say(page, "two")
    body = caught.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": first}, {"role": "user", "content": "two"},
    ]  # fmt: skip
    assert (body["temperature"], body["max_tokens"], body["model"], body["stream"]) == (0, 5, "lab-8m", True)
    expect(page.locator(".turn.assistant")).to_have_count(2)
    expect(page.locator("#send")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    with page.expect_request(CHAT) as caught:
        say(page, "three")
    assert [m["content"] for m in caught.value.post_data_json["messages"]] == ["Be brief.", "three"]


def test_stop_ends_the_request(page: Page, served: Served) -> None:
    def endless(route: Route) -> None:
        body = {**route.request.post_data_json, "ignore_eos": True, "max_tokens": 3900}
        route.continue_(post_data=json.dumps(body))

    page.route(CHAT, endless)
    page.goto(served.url)
    expect(page.locator("#state")).to_have_text("ready")
    say(page, "Tell me a story.")
    expect(page.locator(".turn.assistant .text")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#last")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    kept = page.locator(".turn.assistant .text").inner_text()
    assert kept
    for _ in range(100):
        now = page.request.get(f"{served.url}/stats").json()["models"]["lab-8m"]
        if now["in_hand"] == now["running"] == 0:
            break
        page.wait_for_timeout(50)
    else:
        raise AssertionError(now)
    assert page.locator(".turn.assistant .text").inner_text() == kept


def test_hostile_text_stays_text(page: Page, served: Served) -> None:
    plan = {"lab-8m": {"model": HOSTILE, "techniques": [HOSTILE], "refused": {HOSTILE: HOSTILE}, "notes": [HOSTILE]}}
    page.route("**/plan", lambda route: route.fulfill(json=plan))
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": HOSTILE, "arguments": HOSTILE}}
    reply(page, {"reasoning_content": HOSTILE}, {"content": HOSTILE}, {"tool_calls": [call]})
    seen = Seen(page)
    page.goto(served.url)
    expect(page.locator("#plan")).to_contain_text(HOSTILE)
    say(page, HOSTILE)
    expect(page.locator(".turn.assistant > .text")).to_have_text(HOSTILE)
    expect(page.locator(".turn.user .text")).to_have_text(HOSTILE)
    expect(page.locator(".turn.assistant pre")).to_contain_text("<img src=x onerror=")
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Paceline"
    seen.clean(served.url)


def test_thoughts_are_folded_and_calls_are_json(page: Page, served: Served) -> None:
    parts = [{"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}]
    more = [[{"index": 0, "function": {"arguments": piece}}] for piece in ('{"at"', ": 3}")]
    reply(
        page,
        {"reasoning_content": "Let me "},
        {"reasoning_content": "think."},
        *({"tool_calls": p} for p in (parts, *more)),
    )
    page.goto(served.url)
    expect(page.locator("#state")).to_have_text("ready")
    say(page, "look")
    thoughts = page.locator(".turn.assistant details .text")
    expect(thoughts).to_be_hidden()
    page.get_by_text("Reasoning", exact=True).click()
    expect(thoughts).to_have_text("Let me think.")
    calls = json.loads(page.locator(".turn.assistant pre").inner_text())
    assert calls == [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 3}'}}]


def test_errors_are_told_and_the_message_can_be_sent_again(page: Page, served: Served) -> None:
    page.goto(served.url)
    expect(page.locator("#state")).to_have_text("ready")
    page.get_by_text("Settings").click()
    page.get_by_label("Tools").fill("[")
    say(page, "hello")
    expect(page.locator("#last")).to_have_text("Tools: is not valid JSON")
    expect(page.get_by_label("Message")).to_have_value("hello")
    page.get_by_label("Tools").fill("")
    page.get_by_label("Temperature").fill("-3")
    say(page, "hello")
    expect(page.locator(".turn.assistant .problem")).to_contain_text("temperature")
    expect(page.get_by_label("Message")).to_have_value("hello")


def test_the_address_makes_the_page_do_nothing(page: Page, served: Served) -> None:
    seen = Seen(page)
    page.goto(f"{served.url}/?q=hello&prompt=hello&model=x&key={KEY}#hello")
    expect(page.locator("#state")).to_have_text("ready")
    page.wait_for_timeout(1500)
    expect(page.get_by_label("Message")).to_have_value("")
    expect(page.locator("#log")).to_have_text("Nothing said yet.")
    assert {r.method for r in seen.requests} == {"GET"}
    assert all("authorization" not in r.headers for r in seen.requests)
    seen.clean(served.url)


def test_the_key_is_asked_for_and_kept_in_this_tab(page: Page, guarded: Served) -> None:
    seen = Seen(page)
    page.goto(guarded.url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.wait_for_timeout(1500)
    assert [urlsplit(r.url).path for r in seen.requests if not r.url.startswith("data:")] == [
        "/"
    ]  # nothing before a key is given
    page.get_by_label("Key", exact=True).fill("a-wrong-key")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#key-problem")).to_contain_text("wrong")
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ready")
    expect(dialog).to_be_hidden()
    expect(page.locator("#plan")).to_contain_text("lab-8m")
    say(page, "Once upon a time")
    expect(page.locator("#last")).to_contain_text("finish")
    assert all(KEY not in r.url for r in seen.requests)
    assert all(
        w in ("", KEY) or "a-wrong-key" in w for w in (r.headers.get("authorization", "")[7:] for r in seen.requests)
    )
    kept = page.context.storage_state()
    assert KEY not in json.dumps(kept)  # neither cookies nor local storage
    page.reload()
    expect(page.locator("#state")).to_have_text("ready")
    other = page.context.new_page()
    other.goto(guarded.url)
    expect(other.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Key", exact=True).click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.locator("#state")).to_have_text("needs a key")


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark"), (950, "light"), (1360, "dark")])
def test_it_fits_and_follows_the_colour_scheme(browser: Browser, served: Served, width: int, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.url)
    expect(page.locator("#operators")).to_be_visible(timeout=30_000)
    for box in (page.locator(s).bounding_box() for s in ("header", ".chat", ".live", ".plan", ".operators")):
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    expect(page.locator("#generation-peak")).not_to_be_empty()
    assert (
        page.locator("html").evaluate("e => e.scrollWidth") <= width
    )  # only the table scrolls sideways, within its box
    ground = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", ground))) > 3 * 128
    assert light == (scheme == "light")
    context.close()


def test_it_can_be_used_by_keyboard_alone(page: Page, served: Served) -> None:
    page.goto(served.url)
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#works button")).to_have_count(2)
    reached = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if not focused.count():  # past the end of the page
            break
        reached.add(focused.get_attribute("id") or focused.inner_text())
    assert {"model", "clear", "Settings", "log", "prompt", "send", "decode"} <= reached
    page.get_by_role("button", name="prompt", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="prompt", exact=True)).to_be_focused()  # still there, and where it was
    expect(page.get_by_role("button", name="prompt", exact=True)).to_have_attribute("aria-pressed", "true")
