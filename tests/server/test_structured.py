"""Structured output and tools over HTTP: every answer keeps to what was asked, and what cannot be kept is refused at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from served import Served, served

from paceline import lab

ASK: Any = [{"role": "user", "content": "Tell me about Paris."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["city", "size", "tags"],
    "additionalProperties": False,
}
HERMES = """{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}. Answer calls as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 10},
                "days": {"type": "integer", "maximum": 9, "minimum": 1},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a template that knows tools."""
    made = tmp_path_factory.mktemp("models") / "hermes"
    shutil.copytree(lab.path(), made)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (made / name).is_file() and name.endswith(".json"):
            config = json.loads((made / name).read_text())
            config["chat_template"] = HERMES
            (made / name).write_text(json.dumps(config))
    (made / "chat_template.jinja").write_text(HERMES)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(str(folder)) as s:
        yield s


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(**form: Any) -> Any:
    return {"model": "lab-8m", "messages": ASK, "max_tokens": 300, "seed": 1, **form}


def test_a_strict_schema_is_kept_whole_and_streamed(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    r = client.chat.completions.create(**asked(response_format=form, n=3, temperature=1.5))
    for choice in r.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    chunks = client.chat.completions.create(**asked(response_format=form, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_the_clients_own_parsing_of_types(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: str
        capital: bool

    r = client.chat.completions.parse(**asked(response_format=City, max_tokens=400, temperature=0))
    assert r.choices[0].finish_reason in ("stop", "length")
    if r.choices[0].finish_reason == "stop":
        assert isinstance(r.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"structured_outputs": {"choice": ["red", "green"]}}, lambda t: t in ("red", "green")),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}"}}, lambda t: len(t) == 6 and t[3] == "-"),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, lambda t: t in ("yes", "no")),
        ({"structured_outputs": {"json": SCHEMA}}, lambda t: jsonschema.validate(json.loads(t), SCHEMA) is None),
    ],
)
def test_vllms_structured_outputs(server: Served, form: dict[str, Any], fits: Any) -> None:
    with server.client() as c:
        for path, body in (("/v1/chat/completions", {"messages": ASK}), ("/v1/completions", {"prompt": "x"})):
            r = c.post(path, json={**body, **form, "max_tokens": 300, "seed": 2}).json()
            choice = r["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert fits(text), text


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "array", "uniqueItems": True}},
                }
            },
            "uniqueItems",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://example.com/x"}}}},
            "ref",
        ),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"structured_outputs": {"regex": "(a{1,1000}){1,1000}" * 50}}, "regex"),
        ({"structured_outputs": {"choice": ["x"] * 100_000}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "twice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ],
)
def test_what_cannot_be_kept_to_is_named(server: Served, form: dict[str, Any], names: str) -> None:
    with server.client() as c:
        r = c.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 4, **form})
        assert r.status_code == 400, r.text
        assert names in r.json()["error"]["message"]
        assert c.get("/health", timeout=1).status_code == 200


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_is_well_formed_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    ask = asked(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, temperature=1)
    r = client.chat.completions.create(**ask)
    (call,) = r.choices[0].message.tool_calls or []
    assert r.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"  # type: ignore[union-attr]
    arguments = call.function.arguments  # type: ignore[union-attr]
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
    name, streamed, reason = "", "", None
    for chunk in client.chat.completions.create(**ask, stream=True):
        for c in chunk.choices:
            reason = c.finish_reason or reason
            for t in c.delta.tool_calls or []:
                assert t.function is not None
                name += t.function.name or ""
                streamed += t.function.arguments or ""
    assert (name, streamed, reason) == ("weather", arguments, "tool_calls")
    back: Any = [*ASK, r.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    again = client.chat.completions.create(model="lab-8m", messages=back, tools=[WEATHER], max_tokens=8)  # type: ignore[list-item]
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_model_without_tools_says_so() -> None:
    with served() as s, s.client() as c:
        r = c.post("/v1/chat/completions", json={"messages": ASK, "tools": [WEATHER]})
        if s.server.models.loaded["lab-8m"].front.dialect == "plain":
            assert r.status_code == 400
            assert r.json()["error"]["param"] == "tools"


THINKING = "{# thoughts end with </think> #}" + HERMES.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_thoughts_may_come_before_a_constrained_answer(tmp_path: Path) -> None:
    """The prompt opens a block of thoughts, which the constraint leaves free (`test_dialects` has what the grammar accepts)."""
    shutil.copytree(lab.path(), tmp_path / "thinker")
    config = json.loads((tmp_path / "thinker/tokenizer_config.json").read_text())
    (tmp_path / "thinker/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": THINKING}))
    (tmp_path / "thinker/chat_template.jinja").unlink(missing_ok=True)
    with served(str(tmp_path / "thinker")) as s, s.client() as c:
        assert s.server.models.loaded["lab-8m"].front.tags is not None
        for form in (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"structured_outputs": {"choice": ["red", "green"]}},
            {"structured_outputs": {"regex": "[0-9]{4}"}},
            {"response_format": {"type": "json_object"}},
        ):
            r = c.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 20, **form})
            assert r.status_code == 200, r.text
            message = r.json()["choices"][0]["message"]
            assert message["reasoning_content"]
            assert not message["content"]
        grammar = {"structured_outputs": {"grammar": 'start: "x"'}}
        refused = c.post("/v1/chat/completions", json={"messages": ASK, **grammar})
        assert refused.status_code == 400
        assert "enable_thinking" in refused.json()["error"]["message"]
