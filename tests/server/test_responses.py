"""The Responses API, by OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from conftest import ALICE, BOB, DAVE, Running

from paceline.server.errors import Fault
from paceline.server.stored import Kept, Stored

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def connected(running: Running, key: str = ALICE) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return connected(server)


@pytest.fixture
def tools(thinker: Running) -> openai.OpenAI:
    return connected(thinker)


def raw(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream as they are on the wire, with names that are those in the data and numbers without a gap."""
    text = http.post("/v1/responses", json={"input": "Say something.", "stream": True, **body}).text
    found = []
    for i, block in enumerate(text.strip().split("\n\n")):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == i
    return found


def names(events: list[dict[str, Any]]) -> list[str]:
    """Types of events, each run of the same once."""
    short = [e["type"].removeprefix("response.") for e in events]
    return [n for i, n in enumerate(short) if i == 0 or short[i - 1] != n]


TEXT = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
THOUGHT = [n.replace("output_text", "reasoning_text") for n in TEXT]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


# ---- the engine itself


def test_whole_and_stream_agree(client: openai.OpenAI) -> None:
    body: Any = {"model": "lab-8m", "input": "Say something.", "max_output_tokens": 40, "temperature": 0}
    whole = client.responses.create(**body)
    assert (whole.object, whole.status, whole.model) == ("response", "completed", "lab-8m")
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    with client.responses.stream(**body) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_events_of_a_text(http: httpx.Client) -> None:
    events = raw(http, max_output_tokens=6, temperature=0, ignore_eos=True, metadata={"a": "b"})
    assert names(events) == ["created", "in_progress", *TEXT, "incomplete"]
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["output"][0]["status"] == "incomplete"
    assert last["metadata"] == {"a": "b"}
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert last["output"][0]["content"][0]["text"] == text
    assert last["usage"]["output_tokens"] == 6


def test_log_probabilities(client: openai.OpenAI) -> None:
    body: Any = {"model": "lab-8m", "input": "Say something.", "max_output_tokens": 60, "temperature": 0}
    whole = client.responses.create(**body, top_logprobs=2, include=["message.output_text.logprobs"])
    part = whole.output[0].content[0]  # type: ignore[union-attr]
    tokens = [lp.token for lp in part.logprobs]  # type: ignore[union-attr,arg-type]
    assert "".join(tokens).startswith(part.text)  # type: ignore[union-attr]
    assert all(len(lp.top_logprobs) == 2 and lp.logprob <= 0 for lp in part.logprobs)  # type: ignore[union-attr,union-attr]
    with client.responses.stream(**body, top_logprobs=2) as stream:
        told = [lp.token for e in stream if e.type == "response.output_text.delta" for lp in e.logprobs]
        assert told == [lp.token for lp in stream.get_final_response().output[0].content[0].logprobs]  # type: ignore[union-attr]
    assert client.responses.create(**body).output[0].content[0].logprobs == []  # type: ignore[union-attr]


def test_going_on(server: Running, client: openai.OpenAI) -> None:
    """A second turn has the first one's items, but not its instructions."""
    with server.says("I am fine."):
        first = client.responses.create(model="lab-8m", input="How are you?", instructions="Be kind.")
    with server.says("Good."):
        second = client.responses.create(
            model="lab-8m",
            input=[{"role": "user", "content": [{"type": "input_text", "text": "Really?"}]}],
            instructions="Be brief.",
            previous_response_id=first.id,
        )
    prompt = server.prompt()
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n")
    assert "<|im_start|>assistant\nI am fine.<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n" in prompt
    assert "kind" not in prompt
    with server.says("Bye."):
        third = client.responses.create(model="lab-8m", input="Bye.", previous_response_id=second.id, store=False)
    assert server.prompt().count("<|im_start|>") == 6
    assert third.previous_response_id == second.id
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="lab-8m", input="?", previous_response_id=third.id)


def test_what_is_kept(server: Running, client: openai.OpenAI) -> None:
    """For its identity, until it is deleted; a stream's like any other; nothing when `store` is false."""
    with server.says("All of it."), client.responses.stream(model="lab-8m", input="a") as stream:
        made = stream.get_final_response()
    found = client.responses.retrieve(made.id)
    assert found.to_dict() == {**made.to_dict(), "output": found.to_dict()["output"]}
    assert found.output_text == made.output_text
    bob = connected(server, BOB)
    for attempt in (
        lambda: bob.responses.retrieve(made.id),
        lambda: bob.responses.delete(made.id),
        lambda: bob.responses.cancel(made.id),
    ):
        with pytest.raises(openai.NotFoundError):
            attempt()
    with pytest.raises(openai.BadRequestError) as e:
        bob.responses.create(model="lab-8m", input="a", previous_response_id=made.id)
    assert (e.value.param, e.value.code) == ("previous_response_id", "previous_response_not_found")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(made.id)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    unkept = client.responses.create(model="lab-8m", input="a", max_output_tokens=1, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_truncation(server: Running, client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "system", "content": "Stay."}]
    for i in range(40):
        turns += [{"role": "user", "content": f"Q{i} " + "word " * 40}, {"role": "assistant", "content": f"A{i}"}]
    turns.append({"role": "user", "content": "The last."})
    with pytest.raises(openai.BadRequestError) as e:
        client.responses.create(model="lab-8m", input=turns)
    assert (e.value.code, e.value.param) == ("context_length_exceeded", "input")
    with server.says("Yes."):
        client.responses.create(model="lab-8m", input=turns, truncation="auto", max_output_tokens=50)
    prompt = server.prompt()
    assert prompt.startswith("<|im_start|>system\nStay.<|im_end|>\n<|im_start|>user\nQ")
    assert "The last." in prompt
    n = len(server.requests[-1].tokens)
    assert 1024 - 50 - 70 < n <= 1024 - 50  # as much as fits: another turn would not
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="lab-8m", input="word " * 3000, truncation="auto")


# ---- tools and thoughts, with a scripted engine


def test_tools_round_trip(thinker: Running, tools: openai.OpenAI) -> None:
    model = tools.models.list().data[0].id
    with thinker.says("<think>\nWell.\n</think>\n\nLet me look.", CALL[:20], CALL[20:]):
        whole = tools.responses.create(model=model, input="Rain?", tools=[WEATHER])
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    call = whole.output[2]
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Oslo"}, "completed")
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == 1
    assert '"name": "weather"' in thinker.prompt()
    items: list[Any] = [
        {"role": "user", "content": "Rain?"},
        *whole.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."},
    ]
    with thinker.says("It does."):
        final = tools.responses.create(model=model, input=items, tools=[WEATHER])
    assert final.output_text == "It does."
    whole_turn = (
        f"assistant\n<think>\nWell.\n</think>\n\nLet me look.{CALL}<|im_end|>\n<|im_start|>tool\nIt rains.<|im_end|>"
    )
    assert whole_turn in thinker.prompt()
    with thinker.says("It does."):  # the same by reference
        tools.responses.create(model=model, input=items[-1:], previous_response_id=whole.id, tools=[WEATHER])
    assert whole_turn in thinker.prompt()


def test_streamed_thoughts_and_calls(thinker: Running, tools: openai.OpenAI, thinking: httpx.Client) -> None:
    two = CALL.replace("Oslo", "Rome")
    said = ("<think>\nWell", ".\n</think>", "\n\nLook: ", CALL[:40], CALL[40:], "\n", two)
    with thinker.says(*said):
        events = raw(thinking, tools=[WEATHER])
    assert names(events) == ["created", "in_progress", *THOUGHT, *TEXT, *CALLED, *CALLED, "completed"]
    output = events[-1]["response"]["output"]
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == output
    assert [item["status"] for item in output] == ["completed"] * 4
    for i, item in enumerate(output):
        assert {e["item_id"] for e in events if e.get("output_index") == i and "item_id" in e} == {item["id"]}
    with thinker.says(*said), tools.responses.stream(model=model_of(tools), input="a", tools=[WEATHER]) as stream:
        final = stream.get_final_response()
    calls = [item for item in final.output if item.type == "function_call"]
    assert [json.loads(c.arguments) for c in calls] == [{"city": "Oslo"}, {"city": "Rome"}]
    assert len({c.call_id for c in calls}) == 2


def model_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_malformed_call_is_text(thinker: Running, thinking: httpx.Client) -> None:
    bad = CALL.replace('"Oslo"}', '"Oslo"]')
    with thinker.says("So: ", bad[:50], bad[50:]):
        whole = thinking.post("/v1/responses", json={"input": "a", "tools": [WEATHER]}).json()
    assert [item["type"] for item in whole["output"]] == ["message"]
    assert whole["output"][0]["content"][0]["text"] == f"So: {bad}"
    with thinker.says("So: ", bad[:50], bad[50:]):
        events = raw(thinking, tools=[WEATHER])
    output = [(item["type"], item["status"]) for item in events[-1]["response"]["output"]]
    assert output[:2] == [("message", "completed"), ("function_call", "incomplete")]  # cannot be taken back


def test_effort(thinker: Running, thinking: httpx.Client) -> None:
    for level, end in (("none", "</think>\n\n"), ("high", "assistant\n")):
        with thinker.says("a"):
            thinking.post("/v1/responses", json={"input": "a", "reasoning": {"effort": level}})
        assert thinker.prompt().endswith(end)


def test_an_empty_answer(thinker: Running, thinking: httpx.Client) -> None:
    with thinker.says(""):
        events = raw(thinking)
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_forced_call(caller: Running, choice: Any) -> None:
    tools = connected(caller)
    asked: Any = {
        "model": model_of(tools),
        "input": "a",
        "tools": [WEATHER],
        "max_output_tokens": 200,
        "temperature": 0,
    }
    whole = tools.responses.create(**asked, tool_choice=choice, parallel_tool_calls=False)
    call = next(item for item in whole.output if item.type == "function_call")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    whole = client.responses.create(model="lab-8m", input="a", text=form, max_output_tokens=100)
    assert json.loads(whole.output_text)["n"] in (1, 2)


# ---- refusals


def test_an_error_in_a_stream(thinker: Running, thinking: httpx.Client) -> None:
    with thinker.says("Well", fails=Fault("the engine fell over")):
        events = raw(thinking)
    last = events[-1]["response"]
    assert (events[-1]["type"], last["status"]) == ("response.failed", "failed")
    assert last["error"] == {"code": "server_error", "message": "the engine fell over"}


def test_quotas_hold_for_streams(server: Running) -> None:
    """Refused with their own status, before any event."""
    dave = connected(server, DAVE)
    for _ in range(2):
        dave.responses.create(model="lab-8m", input="a", max_output_tokens=1)
    for stream in (True, False):
        with pytest.raises(openai.RateLimitError) as e:
            dave.responses.create(model="lab-8m", input="a", max_output_tokens=1, stream=stream)
        assert e.value.response.headers["retry-after"]
    with pytest.raises(openai.RateLimitError):
        dave.chat.completions.create(model="lab-8m", messages=[{"role": "user", "content": "a"}], stream=True)
    with pytest.raises(openai.RateLimitError):
        dave.completions.create(model="lab-8m", prompt="a", stream=True)


def test_a_reader_who_leaves(server: Running, http: httpx.Client) -> None:
    """Ends the work, and nothing is kept."""
    body = {"input": "a", "stream": True, "max_output_tokens": 900, "ignore_eos": True}
    with http.stream("POST", "/v1/responses", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: response.created"
        line = next(lines)
    server.wait_for(lambda: not server.model.supervisor.n_live)
    assert http.get(f"/v1/responses/{json.loads(line[6:])['response']['id']}").status_code == 404


def message(*parts: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": list(parts)}]


RESULT = {"type": "function_call_output", "call_id": "c", "output": "a"}
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"input": None}, ["input"]),
    ({"input": []}, ["input"]),
    ({"input": [5]}, ["input"]),
    ({"input": message({"type": "input_image", "image_url": "http://a"})}, ["input[0].content[0].type", "input_image"]),
    (
        {"input": [*message(5), {"type": "web_search_call"}]},
        ["input[0].content[0]", "input[1].type = 'web_search_call'"],
    ),
    ({"input": [{"role": "tool", "content": "a"}]}, ["input[0].role"]),
    ({"input": [{"role": "user", "content": "a", "shiny": 1}]}, ["input[0]", "shiny"]),
    ({"input": [RESULT]}, ["no function_call with call_id = 'c'"]),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, ["input[0].encrypted_content"]),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}, RESULT]},
        ["arguments", "JSON"],
    ),
    (
        {"temperature": "hot", "shiny": 1, "top_logprobs": -1},
        ["temperature", "shiny: is not supported", "top_logprobs"],
    ),
    ({"background": True, "conversation": "c", "prompt": {}}, ["background", "conversation", "prompt"]),
    ({"tools": [{"type": "web_search"}]}, ["tools[0]"]),
    ({"tools": [WEATHER, WEATHER]}, ["'weather' is given twice"]),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, ["tool_choice", "'x'"]),
    ({"tool_choice": "required"}, ["tool_choice", "tools"]),
    ({"text": {"format": {"type": "json_schema"}}}, ["text.format: json_schema needs name and schema"]),
    ({"text": {"verbosity": "high"}}, ["text.verbosity"]),
    ({"reasoning": {"summary": "detailed"}}, ["reasoning.summary"]),
    ({"include": ["file_search_call.results"]}, ["include"]),
    ({"max_output_tokens": 0}, ["max_output_tokens"]),
    ({"top_logprobs": 21}, ["logprobs = 21"]),
    ({"metadata": {str(i): "a" for i in range(17)}}, ["metadata"]),
    ({"metadata": {"a": "b" * 513}}, ["metadata"]),
    ({"stop": [""]}, ["stop: "]),
    (
        {"tools": [WEATHER], "tool_choice": "required", "text": {"format": {"type": "json_object"}}},
        ["tool_choice: calls that are required"],
    ),
    ({"stream_options": {"include_obfuscation": False}}, ["stream_options: needs stream"]),
    ({"previous_response_id": "resp_0"}, ["previous_response_id"]),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_refused(thinking: httpx.Client, change: dict[str, Any], words: list[str]) -> None:
    answer = thinking.post("/v1/responses", json={"input": "a", "max_output_tokens": 2, **change})
    assert answer.status_code == 400
    for word in words:
        assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b'{"shiny": 1, ', "JSON"),
        (b'{"shiny": "\xff"}', "JSON"),
        (b'{"shiny": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"input": [' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]}", "nested"),
        (b'{"input": "a", "temperature": 1e400}', "temperature"),
        (b'{"input": "a", "seed": 1' + b"0" * 30 + b"}", "seed"),
    ],
)
def test_no_request_at_all(http: httpx.Client, body: bytes, word: str) -> None:
    for path in ("/v1/responses", "/v1/embeddings"):
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
    answer = http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize("id", ["resp_0", "%2e%2e", "a" * 1000])
def test_bad_ids(http: httpx.Client, id: str) -> None:
    for answer in (http.get(f"/v1/responses/{id}"), http.delete(f"/v1/responses/{id}")):
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"


# ---- the store


def kept(n: int, before: Kept | None = None) -> Kept:
    return Kept.of(b"x" * n, [{"n": n}], before)


def test_a_store_forgets() -> None:
    store = Stored(most=3, most_bytes=1000, all_bytes=1500)
    for i in range(4):
        store.put("a", str(i), kept(10))
    assert [store.get("a", str(i)) is not None for i in range(4)] == [False, True, True, True]
    store.get("a", "1")
    store.put("a", "4", kept(10))
    assert store.get("a", "2") is None  # the longest unused
    assert store.get("a", "1") is not None
    store.put("b", "0", kept(900))
    store.put("c", "0", kept(700))  # more than all may have: the largest gives way
    assert store.get("b", "0") is None
    assert store.get("a", "1") is not None
    store.put("c", "big", kept(2000))
    assert store.get("c", "big") is None
    assert store.n_bytes == sum(s.n_bytes for s in store._shelves.values()) <= 1500


def test_a_conversation_is_counted_whole() -> None:
    store = Stored(most_bytes=2000)
    one: Kept | None = None
    for i in range(10):
        one = kept(100 + i, one)
        store.put("a", str(i), one)
    assert one is not None
    assert [item["n"] for item in one.conversation()] == list(range(100, 110))
    assert store.n_bytes <= 2000
    assert store.delete("a", "9")
    assert not store.delete("a", "9")
    assert not store.delete("b", "8")
