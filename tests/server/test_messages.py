"""Anthropic's API, by its own client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest
from conftest import ALICE, CAROL, Running

from paceline.core.errors import OutOfMemory
from paceline.server.errors import Fault

GREEDY = {"temperature": 0}  # no longer among the arguments of its client
ASK: list[Any] = [{"role": "user", "content": "Say something."}]
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def connected(running: Running, key: str = ALICE) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=running.url, api_key=key, max_retries=0)


@pytest.fixture
def client(server: Running) -> anthropic.Anthropic:
    return connected(server)


@pytest.fixture
def tools(thinker: Running) -> anthropic.Anthropic:
    return connected(thinker)


def names(events: list[dict[str, Any]]) -> list[str]:
    """Types of events, deltas with theirs, each run of the same once."""
    found: list[str] = []
    for e in events:
        name = e["delta"]["type"] if e["type"] == "content_block_delta" else e["type"]
        if not found or found[-1] != name:
            found.append(name)
    return found


def raw(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream as they are on the wire; their names are those in the data."""
    given = {"max_tokens": 16, "messages": ASK, "stream": True, **body}
    text = http.post("/v1/messages", json=given).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


# ---- the engine itself


def test_whole_and_stream_agree(client: anthropic.Anthropic) -> None:
    body: Any = {"model": "lab-8m", "max_tokens": 12, "messages": ASK, "extra_body": GREEDY}
    whole = client.messages.create(**body)
    assert (whole.type, whole.role, whole.model) == ("message", "assistant", "lab-8m")
    assert whole.id.startswith("msg_")
    assert whole.content[0].type == "text"
    assert whole.content[0].text
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) > 5
    assert whole.usage.output_tokens > 0
    with client.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_max_tokens_and_cached_tokens(client: anthropic.Anthropic) -> None:
    text = "A long beginning that many requests share. " * 20
    first, second = (
        client.messages.create(model="lab-8m", max_tokens=1, system=text, messages=ASK, extra_body=GREEDY) for _ in "ab"
    )
    assert first.stop_reason == second.stop_reason == "max_tokens"
    cached = second.usage.cache_read_input_tokens
    assert cached
    assert second.usage.input_tokens + cached == first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)


def test_stop_sequence(client: anthropic.Anthropic) -> None:
    free = client.messages.create(model="lab-8m", max_tokens=20, messages=ASK, extra_body=GREEDY)
    text = free.content[0].text  # type: ignore[union-attr]
    word = text[len(text) // 2 : len(text) // 2 + 2]
    held = client.messages.create(
        model="lab-8m", max_tokens=20, messages=ASK, extra_body=GREEDY, stop_sequences=["\x07", word]
    )
    assert (held.stop_reason, held.stop_sequence) == ("stop_sequence", word)
    assert held.content[0].text == text[: text.index(word)]  # type: ignore[union-attr]


def test_count_tokens(client: anthropic.Anthropic) -> None:
    """Blocks and text are the same prompt, and as long as what the answer's usage says."""
    blocks: list[Any] = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Say something.", "cache_control": {"type": "ephemeral"}}],
        }
    ]
    plain = client.messages.count_tokens(model="lab-8m", messages=ASK, system="Be brief.")
    assert plain.input_tokens == client.messages.count_tokens(
        model="lab-8m", messages=blocks, system=[{"type": "text", "text": "Be brief."}]
    ).input_tokens  # fmt: skip
    usage = client.messages.create(model="lab-8m", max_tokens=1, messages=ASK, system="Be brief.").usage
    assert plain.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_an_answer_begun(server: Running, client: anthropic.Anthropic) -> None:
    with server.says(" on."):
        client.messages.create(
            model="lab-8m", max_tokens=5, messages=[*ASK, {"role": "assistant", "content": "It goes"}]
        )
    assert server.prompt().endswith("<|im_start|>assistant\nIt goes")


# ---- tools and thoughts, with a scripted engine


def test_tools_round_trip(thinker: Running, tools: anthropic.Anthropic) -> None:
    asked: Any = {"model": "thinker", "max_tokens": 64, "tools": [WEATHER], "messages": ASK}
    model = tools.models.list().data[0].id
    asked["model"] = model
    with thinker.says("Let me ", "look.", CALL[:20], CALL[20:40], CALL[40:]):
        whole = tools.messages.create(**asked)
    assert [b.type for b in whole.content] == ["text", "tool_use"]
    call = whole.content[1]
    assert call.type == "tool_use"
    assert (whole.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Oslo"})
    assert '"name": "weather"' in thinker.prompt()
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
    failed = {**result, "content": "no route", "is_error": True}
    asked["messages"] = [*ASK, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    with thinker.says("It rains."):
        assert tools.messages.create(**asked).stop_reason == "end_turn"
    assert f"Let me look.{CALL}<|im_end|>\n<|im_start|>tool\nRain.<|im_end|>" in thinker.prompt()
    asked["messages"][-1] = {"role": "user", "content": [failed, {"type": "text", "text": "And now?"}]}
    with thinker.says("Hm."):
        tools.messages.create(**asked)
    assert "tool\nError: no route<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>" in thinker.prompt()


def test_streamed_call(thinker: Running, tools: anthropic.Anthropic, thinking: httpx.Client) -> None:
    two = CALL.replace("Oslo", "Rome")
    with thinker.says("Look: ", CALL[:30], CALL[30:], "\n", two, cached=3):
        events = raw(thinking, tools=[WEATHER])
    block = ["content_block_start", "input_json_delta", "content_block_stop"]
    text = ["content_block_start", "text_delta", "content_block_stop"]
    assert names(events) == ["message_start", "ping", *text, *block, *block, "message_delta", "message_stop"]
    assert [e["index"] for e in events if e["type"] == "content_block_start"] == [0, 1, 2]
    start, end = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["cache_read_input_tokens"] == 3
    assert end["usage"]["input_tokens"] + 3 == start["usage"]["input_tokens"]
    with (
        thinker.says("Look: ", CALL[:30], CALL[30:], "\n", two),
        tools.messages.stream(model=model_of(tools), max_tokens=9, messages=ASK, tools=[WEATHER]) as stream,  # type: ignore[list-item]
    ):
        final = stream.get_final_message()
    assert [b.input for b in final.content if b.type == "tool_use"] == [{"city": "Oslo"}, {"city": "Rome"}]


def model_of(client: anthropic.Anthropic) -> str:
    return client.models.list().data[0].id


def test_a_malformed_call_is_text(thinker: Running, tools: anthropic.Anthropic) -> None:
    bad = CALL.replace('"Oslo"}', '"Oslo"]')
    with thinker.says("So: ", bad[:50], bad[50:]):
        whole = tools.messages.create(model=model_of(tools), max_tokens=9, messages=ASK, tools=[WEATHER])  # type: ignore[list-item]
    assert "".join(b.text for b in whole.content if b.type == "text") == f"So: {bad}"
    assert whole.stop_reason == "end_turn"
    with (
        thinker.says("So: ", bad[:50], bad[50:]),
        tools.messages.stream(model=model_of(tools), max_tokens=9, messages=ASK, tools=[WEATHER]) as stream,  # type: ignore[list-item]
    ):
        assert stream.get_final_message().stop_reason == "end_turn"


def test_thoughts(thinker: Running, tools: anthropic.Anthropic, thinking: httpx.Client) -> None:
    said = ("<think>\nI wonder", " a bit.\n</think>", "\n\nYes.")
    asked: Any = {"model": model_of(tools), "max_tokens": 2000, "messages": ASK}
    with thinker.says(*said):
        whole = tools.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [b.type for b in whole.content] == ["thinking", "text"]
    assert whole.content[0].thinking.strip() == "I wonder a bit."  # type: ignore[union-attr]
    assert whole.content[1].text == "Yes."  # type: ignore[union-attr]
    assert thinker.prompt().endswith("assistant\n")
    with thinker.says(*said):
        events = raw(thinking)
    assert thinker.prompt().endswith("</think>\n\n")  # this API's default is not to think
    thought = ["content_block_start", "thinking_delta", "signature_delta", "content_block_stop"]
    text = ["content_block_start", "text_delta", "content_block_stop"]
    assert names(events)[2:-2] == [*thought, *text]
    with thinker.says("Yes."):
        tools.messages.create(**{**asked, "messages": [*ASK, {"role": "assistant", "content": whole.content}, *ASK]})
    assert "assistant\n<think>\nI wonder a bit." in thinker.prompt()


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]
)
def test_forced_call(caller: Running, choice: Any) -> None:
    tools = connected(caller)
    asked: Any = {
        "model": model_of(tools),
        "max_tokens": 200,
        "messages": ASK,
        "tools": [WEATHER],
        "extra_body": GREEDY,
    }
    whole = tools.messages.create(**asked, tool_choice=choice)
    call = next(b for b in whole.content if b.type == "tool_use")
    assert whole.stop_reason == "tool_use"
    assert call.input["city"] in ("Rome", "Oslo")
    with tools.messages.stream(**asked, tool_choice=choice) as stream:
        assert [b.input for b in stream.get_final_message().content] == [b.input for b in whole.content]  # type: ignore[union-attr]


# ---- refusals


def test_an_error_in_a_stream(thinker: Running, tools: anthropic.Anthropic, thinking: httpx.Client) -> None:
    with thinker.says("Well", fails=Fault("the engine fell over")):
        events = raw(thinking)
    assert events[-1]["error"] == {"type": "api_error", "message": "the engine fell over"}
    assert "message_stop" not in names(events)
    with (
        thinker.says("Well", fails=OutOfMemory("no room at /secret")),
        pytest.raises(anthropic.APIStatusError) as caught,
        tools.messages.stream(model=model_of(tools), max_tokens=9, messages=ASK) as stream,
    ):
        stream.get_final_message()
    assert caught.value.type == "overloaded_error"
    assert "secret" not in str(caught.value)


def test_errors_before_the_route(server: Running, client: anthropic.Anthropic) -> None:
    """Raised by the guard, and by quotas; with streams as without."""
    with pytest.raises(anthropic.AuthenticationError) as e:
        connected(server, "not a key at all").messages.create(model="lab-8m", max_tokens=1, messages=ASK)
    assert e.value.type == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="gpt-9", max_tokens=1, messages=ASK)
    assert missing.value.type == "not_found_error"
    big = {"role": "user", "content": "x" * (server.server.settings.bounds.max_body + 1)}
    large = httpx.post(
        f"{server.url}/v1/messages", json={"messages": [big]}, headers={"x-api-key": ALICE, "connection": "close"}
    )
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    assert large.headers["request-id"] == large.headers["x-request-id"] == large.json()["request_id"]
    carol = connected(server, CAROL)
    for _ in range(2):
        carol.messages.create(model="lab-8m", max_tokens=1, messages=ASK)
    for stream in (False, True):
        with pytest.raises(anthropic.RateLimitError) as over:
            carol.messages.create(model="lab-8m", max_tokens=1, messages=ASK, stream=stream)
        assert over.value.type == "rate_limit_error"
        assert over.value.response.headers["retry-after"]


def test_draining(server: Running, client: anthropic.Anthropic) -> None:
    server.server.draining = True
    try:
        with pytest.raises(anthropic.InternalServerError) as e:
            client.messages.create(model="lab-8m", max_tokens=1, messages=ASK)
        assert (e.value.status_code, e.value.type) == (503, "overloaded_error")
    finally:
        server.server.draining = False


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_tokens": None}, ["max_tokens"]),
    ({"max_tokens": 0, "temperature": "hot", "shiny": 1}, ["max_tokens", "temperature", "shiny: is not supported"]),
    ({"messages": []}, ["messages"]),
    ({"messages": user(PICTURE)}, ["messages[0].content[0].type", "image"]),
    ({"messages": user({"type": "text", "text": "a", "citations": [{}]})}, ["messages[0].content[0].citations"]),
    ({"messages": [{"role": "tool", "content": "a"}]}, ["messages[0].role"]),
    (
        {"messages": user({"type": "tool_use", "id": "a", "name": "b", "input": {}})},
        ["[0].content[0]: a tool_use block"],
    ),
    (
        {"messages": [*ASK, {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}]},
        ["to be continued"],
    ),
    ({"system": [{"type": "text", "text": "a"}, PICTURE]}, ["system[1].type"]),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, ["tools[0].type"]),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, ["tool_choice.name"]),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, ["tool_choice", "'x'"]),
    ({"tool_choice": {"type": "any"}}, ["tool_choice.type = 'any': needs tools"]),
    ({"tools": [WEATHER, WEATHER]}, ["'weather' is given twice"]),
    ({"thinking": {"type": "enabled"}}, ["thinking.budget_tokens"]),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, ["must be less than max_tokens = 5"]),
    ({"stop_sequences": [""]}, ["stop_sequences: "]),
    ({"top_k": -3, "top_p": 7}, ["top_k", "top_p"]),
    ({"metadata": {"user_id": "a", "more": 1}}, ["metadata", "more"]),
    ({"mcp_servers": [{}], "container": "a"}, ["mcp_servers", "container"]),
    ({"messages": [{"role": "user", "content": "word " * 4000}]}, ["tokens"]),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_refused(thinking: httpx.Client, change: dict[str, Any], words: list[str]) -> None:
    answer = thinking.post("/v1/messages", json={"max_tokens": 5, "messages": ASK, **change})
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    for word in words:
        assert word in body["error"]["message"]


def test_the_headers_of_its_clients(thinking: httpx.Client) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "prompt-caching-2024-07-31"}
    body = {
        "max_tokens": 1,
        "messages": user({"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}),
        "system": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}],
        "tools": [{**WEATHER, "cache_control": {"type": "ephemeral"}}],
        "metadata": {"user_id": "somebody"},
        "cache_control": {"type": "ephemeral"},
    }
    answer = thinking.post("/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
