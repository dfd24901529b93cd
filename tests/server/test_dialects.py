"""Parsers of calls: the same however the text is cut, no text lost, no garbage that raises; grammars, and messages."""

from __future__ import annotations

import json as jsonlib
import random
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from paceline import lab
from paceline.assemble import StreamText
from paceline.checkpoints.templates import ChatTemplate
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.checkpoints.vocab import Vocabulary
from paceline.core.errors import ConfigError, RequestError
from paceline.core.types import Constraint, SamplingParams
from paceline.server.dialects import added, detect, get, names, reads_parts, visible
from paceline.server.dialects.base import Parser
from paceline.server.dialects.events import (
    Answer,
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    collect,
)
from paceline.server.dialects.grammar import MAX_CALLS, Function, after_thoughts, chosen, constraint, functions
from paceline.server.dialects.messages import conversation
from paceline.server.dialects.reading import MAX_DEPTH
from paceline.server.dialects.reasoning import TAGS, ReasoningParser, opens_reasoning, tags

CALLING = ("hermes", "json", "llama3", "mistral")
THINK = TAGS[0]


def events(parser: Parser, text: str, cuts: list[int] | None = None) -> list[Event]:
    edges = [0, *sorted(cuts or []), len(text)]
    out = [e for a, b in pairwise(edges) for e in parser.push(text[a:b])]
    return out + parser.finish()


def answer(name: str, text: str, names: Any = None, cuts: list[int] | None = None) -> Answer:
    return collect(events(get(name)(names), text, cuts))


def calls(name: str, text: str) -> list[tuple[str, Any]]:
    return [(c.name, jsonlib.loads(c.arguments)) for c in answer(name, text).calls]


def written(name: str, told: list[tuple[str, Any]], tokens: Any = (), **how: Any) -> str:
    """The calls as the dialect's own form has them."""
    form = get(name).form(True, tokens)
    assert form is not None
    each = [
        form.head + (jsonlib.dumps(n) if form.quoted else n) + form.middle + jsonlib.dumps(a, **how) + form.tail
        for n, a in told
    ]
    return form.first + form.between.join(each) + form.last


# --- the formats -----------------------------------------------------------------------------------

HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F = ("f", {"a": 1})
G = ("g", {"b": ["x", None, {"c": -2.5e3}]})
FORMATS: list[tuple[str, str, list[Any], str]] = [
    ("hermes", HERMES, [F], ""),
    ("hermes", "Let me see.\n\n" + HERMES + "\n" + HERMES + "\n", [F, F], "Let me see."),
    ("hermes", "before " + HERMES + " after", [F], "before after"),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [F], ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', [F], ""),  # the end marker forgotten
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', [F], ""),  # the brace forgotten
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [F], ""),  # arguments as text
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", {})], ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', [("f", {"a": "x\ny"})], ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', [("f", {"a": "</tool_call>"})], ""),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', [F], ""),
    ("llama3", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', [F], ""),
    ("llama3", '\n{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', [F, F], ""),
    ("llama3", '{"name": "f", "parameters": {"a": 1}};\n', [F], ""),
    ("llama3", '{"name": "f", "parameters": {"a": 1}} done', [F], "done"),
    ("llama3", 'I call <|python_tag|>{"name": "f", "arguments": {"a": 1}}', [F], "I call"),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', [F], ""),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 1}}]', [F, F], ""),
    ("mistral", 'ok[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', [F, F], "ok"),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', [F], ""),
    ("json", '{"name": "f", "arguments": {"a": 1}}', [F], ""),
    ("json", '[{"name": "f", "parameters": {"a": 1}}, {"arguments": {"a": 1}, "name": "f"}]\n', [F, F], ""),
    ("json", '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}', [F], ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "told", "content"), FORMATS)
def test_formats(name: str, text: str, told: list[Any], content: str) -> None:
    for cuts in ([], list(range(len(text)))):
        found = answer(name, text, cuts=cuts)
        assert [(c.name, jsonlib.loads(c.arguments)) for c in found.calls] == told
        assert found.content == content


def test_dialects_are_found_by_their_files() -> None:
    assert names() == ("hermes", "json", "llama3", "mistral", "plain")
    with pytest.raises(ConfigError, match="hermes, json"):
        get("base")


NONE = [
    ("hermes", "no call"),
    ("hermes", "a <tool_call> b </tool_call> c"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\x"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": }"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "never closed </tool_call>'),
    ("hermes", "  <tool_ca"),
    ("llama3", '{"name": "Ada", "age": 36}'),
    ("llama3", 'Like this: {"name": "f", "parameters": {}}'),
    ("llama3", '<|python_tag|>brave_search.call(query="x")'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]two words[ARGS]{}"),
    ("json", '{"answer": {"name": "f", "arguments": {}}}'),
    ("json", "[1, 2, 3]"),
    ("json", '{"tool_calls": []}'),
    ("json", "\n\n  {not json}\n"),
    ("json", "\0 " + HERMES),
    ("plain", HERMES),
]


@pytest.mark.parametrize(("name", "text"), NONE)
def test_what_is_no_call_is_content_verbatim(name: str, text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert answer(name, text, cuts=cuts) == Answer(text, "", [])


def test_a_call_that_follows_a_broken_one_counts() -> None:
    found = answer("hermes", '<tool_call>{"name": "f", "arguments": {"a": ?}}</tool_call>\n' + HERMES)
    assert [c.name for c in found.calls] == ["f"]
    assert found.content == '<tool_call>{"name": "f", "arguments": {"a": ?}}</tool_call>'


def test_functions_that_were_not_offered_are_not_called() -> None:
    assert answer("hermes", HERMES, ["g"]) == Answer(HERMES, "", [])
    assert answer("hermes", HERMES, {"f", "g"}).calls
    assert answer("json", '{"name": "Ada", "arguments": {}}', {"f"}).calls == []


def test_arguments_come_as_they_are_written() -> None:
    parser = get("hermes")()
    assert parser.push('Hello <tool_call>\n{"name": "write",') == [Content("Hello")]
    told = parser.push(' "arguments": {"text": "once upon')
    assert isinstance(told[0], CallStart)
    assert (told[0].index, told[0].name, told[1:]) == (0, "write", [CallArguments(0, '{"text": "once upon')])
    assert parser.push(" a time") == [CallArguments(0, " a time")]
    assert parser.push('"}') == [CallArguments(0, '"}'), CallEnd(0)]
    assert parser.push("}\n</tool_call>") == []
    assert parser.finish() == []


def test_arguments_before_the_name_wait_for_it() -> None:
    parser = get("json")()
    assert parser.push('{"arguments": {"a": [1, 2]}, "name": ') == []
    told = parser.push('"f"}')
    assert [type(e) for e in told] == [CallStart, CallArguments, CallEnd]
    assert told[1] == CallArguments(0, '{"a": [1, 2]}')


def test_a_call_broken_off_is_told_to_be() -> None:
    told = events(get("hermes")(), 'x <tool_call>{"name": "f", "arguments": {"a": "b')
    assert told[-1] == CallBroken(0, ' <tool_call>{"name": "f", "arguments": {"a": "b')
    assert collect(told) == Answer('x <tool_call>{"name": "f", "arguments": {"a": "b', "", [])


def test_depth_and_number_of_calls_are_bounded() -> None:
    def nested(n: int) -> str:
        return '<tool_call>{"name": "f", "arguments": ' + '{"a":' * n + "1" + "}" * n + "}</tool_call>"

    assert len(answer("hermes", nested(MAX_DEPTH)).calls) == 1
    assert answer("hermes", nested(MAX_DEPTH + 1)) == Answer(nested(MAX_DEPTH + 1), "", [])
    assert answer("hermes", nested(100_000)).calls == []
    assert len(answer("hermes", HERMES * (MAX_CALLS + 2)).calls) == MAX_CALLS
    assert answer("hermes", HERMES * (MAX_CALLS + 2)).content == HERMES * 2
    wrapped = '{"tool_calls": [' * 5000
    assert answer("json", wrapped) == Answer(wrapped, "", [])
    functions = '{"function": ' * 5000
    assert answer("json", functions) == Answer(functions, "", [])


HOSTILE = [
    "<tool_call>", "[TOOL_CALLS]", "<tool_call>{", '\\"', "\\", " ", "\n", "{", "[", '{"a":', "<", "<tool_cal", "x ", "1",
    '{"name":"f","arguments":{}}',
]  # fmt: skip
BEGINS = ["", '<tool_call>{"name": "f", "arguments": {"a": "', '[TOOL_CALLS] [{"name": "f", "arguments": {"a": ', '[{"']


@pytest.mark.parametrize("name", CALLING)
def test_work_is_linear(name: str) -> None:
    """Twice the text, twice the function calls, whatever it is made of and however it arrives."""
    for begin in BEGINS:
        for piece in HOSTILE:
            for one_push in (True, False):
                few, many = (work(name, begin, piece, n, one_push) for n in (200, 400))
                assert many < 2.2 * few + 100, (begin, piece, one_push)


def work(name: str, begin: str, piece: str, n: int, one_push: bool) -> int:
    count = 0

    def seen(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += 1

    parser = get(name)()
    sys.setprofile(seen)
    try:
        for text in [begin, piece * n] if one_push else [begin, *[piece] * n]:
            parser.push(text)
        parser.finish()
    finally:
        sys.setprofile(None)
    return count


# --- properties ------------------------------------------------------------------------------------

WORDS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>", "{", "}", "[", "]", ",",
    ":", '"', "\\", '"name"', '"arguments"', '"parameters"', '"tool_calls"', '"function"', '"f"', '"a"', "1", "-", "true", "nul", " ", "\n",
    ";", "x", "é", "😀", '{"name": "f", ', '"arguments": {', '"arguments": {"a": "b"}', HERMES, '{"name": "f", "parameters": {"a": 1}}',
    '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', '"\\u00e9', "\\ud83d", "<tool_", "[TOOL",
]  # fmt: skip
mixed = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=24).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4),
    max_leaves=12,
)  # fmt: skip
json_objects = st.dictionaries(st.text(), json_values, max_size=4)
function_names = st.from_regex(r"[A-Za-z0-9_.:-]{1,20}", fullmatch=True)
several = st.lists(st.tuples(function_names, json_objects), min_size=1, max_size=4)


def parsers(name: str) -> list[Parser]:
    made = get(name)
    return [made(), made(["f"]), ReasoningParser(made(), THINK), ReasoningParser(made(), THINK, open=True)]


def shape(told: list[Event]) -> list[Any]:
    """Events without the random ids, neighbouring text joined."""
    out: list[Any] = []
    for event in told:
        if isinstance(event, CallStart):
            out.append((CallStart, event.index, event.name))
        elif isinstance(event, (CallEnd, CallBroken)):
            out.append(event)
        elif out and isinstance(out[-1], list) and out[-1][0] == (type(event), getattr(event, "index", None)):
            out[-1][1] += event.text
        else:
            out.append([(type(event), getattr(event, "index", None)), event.text])
    return out


@pytest.mark.parametrize("name", names())
@settings(max_examples=250, deadline=None)
@given(text=mixed, data=st.data())
def test_cuts_make_no_difference(name: str, text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    for whole, cut, single in zip(parsers(name), parsers(name), parsers(name), strict=True):
        expected = shape(events(whole, text))
        assert shape(events(cut, text, cuts)) == expected
        assert shape(events(single, text, list(range(len(text))))) == expected


@pytest.mark.parametrize("name", names())
@settings(max_examples=250, deadline=None)
@given(text=mixed)
def test_no_text_is_lost(name: str, text: str) -> None:
    """Without calls the content is the text. Each finished call takes JSON away, and whitespace, markers; no letter x."""
    found = answer(name, text)
    if not found.calls:
        assert found.content == text
    taken = sum(c.arguments.count("x") + c.name.count("x") for c in found.calls)
    assert found.content.count("x") + taken <= text.count("x")
    for call in found.calls:
        assert isinstance(jsonlib.loads(call.arguments), dict)
    said = collect(events(ReasoningParser(get(name)(), THINK, open=True), text))
    if not said.calls:
        said_text = (said.reasoning + said.content).replace("\n", "").replace(" ", "")
        bare = "".join(text.split())
        assert "".join(said_text.split()) in (bare, bare.replace("</think>", "", 1), *without_open(bare))


def without_open(text: str) -> tuple[str, ...]:
    """The text without the tag it begins with, and without the first end tag after it."""
    rest = text.removeprefix("<think>")
    return rest, rest.replace("</think>", "", 1)


@pytest.mark.parametrize("name", CALLING)
@settings(max_examples=100, deadline=None)
@given(told=several, indent=st.sampled_from([None, 2]), plain=st.booleans(), data=st.data())
def test_valid_calls_come_back(name: str, told: Any, indent: Any, plain: bool, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([(), ("[ARGS]",)])) if name == "mistral" else ()
    text = written(name, told, tokens, indent=indent, ensure_ascii=plain)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    found = answer(name, text, cuts=cuts)
    assert [(c.name, jsonlib.loads(c.arguments)) for c in found.calls] == told
    assert found.content == ""
    assert len({c.id for c in found.calls}) == len(told)


@pytest.mark.parametrize("name", CALLING)
@settings(max_examples=100, deadline=None)
@given(told=several, data=st.data())
def test_a_text_broken_off_keeps_its_whole_calls(name: str, told: Any, data: st.DataObject) -> None:
    text = written(name, told)
    found = answer(name, text[: data.draw(st.integers(0, len(text)))])
    assert [(c.name, jsonlib.loads(c.arguments)) for c in found.calls] == told[: len(found.calls)]
    if not found.calls:
        assert text.startswith(found.content)


# --- reasoning -------------------------------------------------------------------------------------


def think(text: str, open: bool = False, name: str = "hermes") -> Answer:
    found = collect(events(ReasoningParser(get(name)(), THINK, open), text))
    again = collect(events(ReasoningParser(get(name)(), THINK, open), text, list(range(len(text)))))
    assert (found.content, found.reasoning) == (again.content, again.reasoning)
    return found


def test_thoughts_are_told_apart() -> None:
    assert think("<think>\nwell\n</think>\n\nyes ") == Answer("yes ", "well", [])
    assert think("well, a < b\n</think>\n\n yes", open=True) == Answer(" yes", "well, a < b", [])
    assert think("<think>well</think>yes", open=True) == Answer("yes", "well", [])
    assert think("\n<think></think>yes") == Answer("yes", "", [])
    assert think("no thoughts <think>x</think>") == Answer("no thoughts <think>x</think>", "", [])
    assert think("  no thoughts") == Answer("  no thoughts", "", [])
    assert think("never closed </thin", open=True) == Answer("", "never closed </thin", [])
    assert think("<thin") == Answer("<thin", "", [])


def test_a_call_among_thoughts_is_none() -> None:
    found = think(f"<think>I might {HERMES}</think>\n{HERMES}")
    assert found.reasoning == f"I might {HERMES}"
    assert [c.name for c in found.calls] == ["f"]
    found = think('<think>x</think>\n\n{"name": "f", "parameters": {"a": 1}}', name="llama3")
    assert [c.name for c in found.calls] == ["f"]


def test_whether_a_prompt_opens_thoughts() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n", THINK)
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", THINK)
    assert not opens_reasoning("user: <think>\nassistant:", THINK)
    assert not opens_reasoning("<think>", None)


# --- which dialect ---------------------------------------------------------------------------------

# Templates of ours, with what the published ones of each family ask of messages.
HERMES_TEMPLATE = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>
{%- endfor %}
{%- if m.role == "tool" and not m.name is defined %}{{ raise_exception("a tool's message needs a name") }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"""
LLAMA_TEMPLATE = """{%- if tools is not none %}Environment: ipython
{"name": function name, "parameters": dictionary of argument name and its value}
{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if 'tool_calls' in m %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}
{%- elif m.role in ("tool", "ipython") %}ipython: {{ m.content | tojson }}
{%- elif m['content'] is string %}{{ m.role + ": " + m['content'] | trim }}
{%- else %}{% for c in m['content'] %}{{ c.text }}{% endfor %}{% endif %}<|eot_id|>
{%- endfor %}"""
MISTRAL_TEMPLATE = """{%- for m in messages %}
{%- if m.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}
{%- if call.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}
{%- if not loop.last %}, {% endif %}{% endfor %}]</s>
{%- elif m.role == "tool" %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- if m.tool_call_id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}
{%- elif m.role == "system" %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]
{%- else %}{{ m.content }}{% endif %}{% endfor %}{# tools #}"""
PARTS_TEMPLATE = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}|{% endfor %}{% endfor %}"
TEMPLATES = {"hermes": HERMES_TEMPLATE, "llama3": LLAMA_TEMPLATE, "mistral": MISTRAL_TEMPLATE}


def test_the_dialect_is_seen_in_the_template() -> None:
    for name, source in TEMPLATES.items():
        assert detect(source) == name
    assert detect({"default": "plain", "tool_use": HERMES_TEMPLATE}) == "hermes"
    assert detect("{# tools #}<tool_call>\n<function=name>") == "plain"  # XML in Hermes's markers
    assert detect('{% if tools %}Answer {"name": ..., "arguments": ...}{% endif %}') == "json"
    assert detect('{# tools #}<|im_start|>{{ "Answer [{\\"name\\": ..., \\"arguments\\": ...}]" }}') == "json"
    assert detect('{# tools #}<|tool_call|>[{"name": ..., "arguments": ...}]') == "plain"
    assert detect("{# tools #}<|tool_call_begin|>") == "plain"
    assert detect(None) == "plain"
    assert tags(HERMES_TEMPLATE) == THINK
    assert tags(LLAMA_TEMPLATE) is None
    assert reads_parts(PARTS_TEMPLATE)
    assert not any(reads_parts(t) for t in TEMPLATES.values())


def test_templates_without_tools_are_plain_and_render_as_before(shared: Path) -> None:
    lines = (shared / "data/chat-templates/templates.jsonl").read_text("utf-8").splitlines()
    sources = [source for line in lines for source in jsonlib.loads(line).values()]
    assert len(sources) == 35
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}], "tool_calls": []} for m in chat]
    for source in sources:
        assert (detect(source), tags(source), reads_parts(source)) == ("plain", None, False)
        template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
        assert template.render(conversation(parts)) == template.render(chat)


# --- messages --------------------------------------------------------------------------------------

CHAT: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather in"}, {"type": "text", "text": "Paris?"}]},
    {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [
        {"id": "call_123", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Orléans", "n": [1]}'}}]},
    {"role": "tool", "tool_call_id": "call_123", "content": '"rain"'},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}]


def test_conversations_with_tools_render_in_each_dialect() -> None:
    for name, source in TEMPLATES.items():
        before = jsonlib.dumps(CHAT)
        chat = conversation(CHAT, call_id=get(name).call_id)
        assert jsonlib.dumps(CHAT) == before
        text = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(chat, tools=TOOLS)
        assert '{"city": "Orléans", "n": [1]}' in text, text
        assert "Be brief." in text
        assert "rain" in text
        # What the template writes for the model to learn from, the dialect reads back.
        call = next(
            line for line in text.replace("<|eot_id|>", "\n").replace("</s>", "\n").split("<|im_end|>") if "Orl" in line
        )
        if name != "llama3":
            assert calls(name, call) == [("weather", {"city": "Orléans", "n": [1]})]


def test_messages_are_normalised() -> None:
    chat = conversation(CHAT)
    assert [m["role"] for m in chat] == ["system", "user", "assistant", "tool"]
    assert chat[1]["content"] == "Weather in\nParis?"
    assert set(chat[2]) == {"role", "content", "tool_calls"}
    assert chat[2]["content"] == ""
    assert chat[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Orléans", "n": [1]}
    assert chat[3]["name"] == "weather"
    assert conversation(CHAT[:1], keep_parts=True)[0]["content"] == [{"type": "text", "text": "Be brief."}]
    empty = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]}
    assert conversation([empty])[0]["tool_calls"][0]["function"]["arguments"] == {}
    assert conversation([{"role": "assistant", "content": None, "refusal": "no"}])[0]["content"] == "no"
    thought = {"role": "assistant", "content": "x", "reasoning_content": "y"}
    assert conversation([thought])[0]["reasoning_content"] == "y"


def test_ids_of_other_models_fit_mistral() -> None:
    fit = get("mistral").call_id
    assert fit("abcDEF123") == "abcDEF123"
    assert fit("call_123") == fit("call_123") != fit("call_124")
    for fitted in (fit("call_123"), fit("\ud800"), fit()):
        assert len(fitted) == 9
        assert fitted.isascii()
        assert fitted.isalnum()


def call_with(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": arguments}, **more}]}


WRONG: list[tuple[Any, str]] = [
    ([], "messages: must be a list"),
    ("hi", "messages: must be a list"),
    (["hi"], r"messages\[0\]: must be an object"),
    ([{"content": "a"}], r"messages\[0\]\.role = None"),
    ([{"role": "function", "content": "a"}], r"messages\[0\]\.role = 'function'"),
    ([{"role": "user"}], r"messages\[0\]\.content: is missing"),
    ([{"role": "user", "content": 3}], r"messages\[0\]\.content: must be text"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]\.type = 'image_url'"),
    ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content\[0\]: must be a part"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text: must be text"),
    ([call_with("{")], r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: is not valid JSON"),
    ([call_with("[" * 100_000)], r"function\.arguments: is not valid JSON"),
    ([call_with("[1]")], r"function\.arguments: must be the JSON text of an object"),
    ([call_with(4)], r"function\.arguments: must be the JSON text of an object"),
    ([call_with("{}", type="custom")], r"messages\[0\]\.tool_calls\[0\]: must be"),
    ([{**call_with("{}"), "role": "user", "content": ""}], "only the assistant"),
    ([{"role": "assistant", "function_call": {"name": "f"}}], r"messages\[0\]\.function_call: is not supported"),
    ([{"role": "tool", "content": "a", "tool_call_id": 3}], r"messages\[0\]\.tool_call_id"),
]


@pytest.mark.parametrize(("messages", "error"), WRONG)
def test_wrong_messages_are_named(messages: Any, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        conversation(messages)


def test_what_is_wrong_is_told_at_once_and_in_bounds() -> None:
    with pytest.raises(RequestError) as e:
        conversation([{"role": "user"}, {"role": "user", "content": [{"type": "image"}] * 100_000}] * 1000)
    assert "messages[0].content" in str(e.value)
    assert "messages[1].content[0]" in str(e.value)
    assert len(str(e.value)) < 2000


# --- grammars --------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"$ref": "#/$defs/days"}, "on": {"type": "boolean"}},
    "required": ["unit", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
OFFERED = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "weather_now"}},
]
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[THINK]", "[/THINK]"]
ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
MARKS = frozenset(SPECIAL + ADDED)


@cache
def marked_tokenizer() -> Tokenizer:
    """The embedded model's, with the markers of all dialects as tokens, special as in the models that have them."""
    backend = tokenizers.Tokenizer.from_file(str(lab.path() / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(ADDED)
    return Tokenizer(Vocabulary(backend, {}, frozenset()))


@cache
def guide(marked: bool) -> LLTokenizer:
    if not marked:
        return LLTokenizer(str(lab.path() / "tokenizer.json"))
    return LLTokenizer(marked_tokenizer().backend.to_str())


def accepts(grammar: str | None, text: str, marked: bool) -> bool:
    assert grammar is not None
    backend = (
        marked_tokenizer().backend if marked else tokenizers.Tokenizer.from_file(str(lab.path() / "tokenizer.json"))
    )
    ids = backend.encode(text, add_special_tokens=False).ids
    matcher = LLMatcher(guide(marked), LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def grammar(name: str, choice: Any, marked: bool, **more: Any) -> str | None:
    tokens = added(marked_tokenizer(), MARKS) if marked else {}
    return constraint(get(name), functions(OFFERED), choice, tokens=tokens, **more)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", CALLING)
def test_required_calls(name: str, marked: bool) -> None:
    tokens = MARKS if marked else ()
    good, now = ("weather", {"unit": "C", "days": 3}), ("weather_now", {})
    one, two = written(name, [good], tokens), written(name, [good, now], tokens)
    if name == "json":
        one, two = one[1:-1], two
    many, single = grammar(name, "required", marked), grammar(name, "required", marked, parallel=False)
    assert accepts(many, two, marked)
    assert accepts(single, one, marked)
    assert not accepts(single, two, marked)
    named = {"type": "function", "function": {"name": "weather"}}
    assert accepts(grammar(name, named, marked), one, marked)
    assert not accepts(grammar(name, {"type": "function", "function": {"name": "weather_now"}}, marked), one, marked)
    for wrong in (
        "",
        "hello",
        one[:-1],
        one.replace("3", "30"),
        one.replace('"C"', '"K"'),
        one.replace("weather", "other"),
    ):
        assert not accepts(single, wrong, marked), wrong


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", CALLING)
def test_strict_functions_leave_text_free(name: str, marked: bool) -> None:
    tokens = MARKS if marked else ()
    free = grammar(name, "auto", marked)
    call = written(name, [("weather", {"unit": "C", "days": 3})], tokens)
    assert accepts(free, "", marked)
    assert accepts(free, "hello <tool or [TOOL", marked)
    assert accepts(free, call, marked)
    assert not accepts(free, call.replace("3", "30"), marked)
    if name in ("hermes", "mistral"):
        assert accepts(free, "hello " + call, marked)
        assert not accepts(free, "hello " + call.replace('"C"', '"K"'), marked)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_thoughts_stay_free(choice: str, marked: bool) -> None:
    call = written("hermes", [("weather", {"unit": "C", "days": 3})])
    for inside in (True, False):
        thinking = grammar("hermes", choice, marked, tags=THINK, inside=inside)
        begin = "" if inside else "<think>"
        assert accepts(thinking, f"{begin}\nperhaps <tool_call> no\n</think>\n\n{call}", marked)
        assert not accepts(thinking, f"{begin}\nhm</think>\n\n{call.replace('3', '0')}", marked)
        assert accepts(thinking, call, marked) is not inside


def test_a_named_or_required_function_without_strictness_and_none() -> None:
    loose = functions([{"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}])
    for name in CALLING:
        assert constraint(get(name), loose) is None
        assert constraint(get(name), loose, "none") is None
        needed = constraint(get(name), loose, "required")
        assert needed is not None
        assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(needed), guide(False)) == ""
    assert constraint(get("plain"), loose, "auto") is None
    with pytest.raises(RequestError, match="no known format"):
        constraint(get("plain"), loose, "required")


@pytest.mark.parametrize("name", CALLING)
def test_what_a_grammar_lets_through_is_a_call_of_its_schema(name: str) -> None:
    """Random tokens that the grammar allows, read by the parser."""
    guided, marked = guide(True), marked_tokenizer()
    text = grammar(name, "required", True)
    assert text is not None
    for seed in range(4):
        rng = random.Random(seed)
        matcher = LLMatcher(guided, LLMatcher.grammar_from_lark(text))
        mask = allocate_token_bitmask(1, guided.vocab_size)
        ids: list[int] = []
        while len(ids) < 4000:
            fill_next_token_bitmask(matcher, mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: guided.vocab_size])
            if matcher.is_accepting() and (len(allowed) <= 1 or rng.random() < 0.5):
                break
            token = int(rng.choice([i for i in allowed.tolist() if i != guided.eos_token] or [guided.eos_token]))
            if token == guided.eos_token:
                break
            assert matcher.consume_token(token)
            ids.append(token)
        written_text = StreamText(marked, SamplingParams(show_special=visible(marked, get(name).markers)))
        said = "".join(written_text.push(i)[0] for i in ids) + written_text.finish()
        found = answer(name, said, {"weather", "weather_now"})
        assert found.calls, said
        assert found.content == "", said
        for call in found.calls:
            jsonschema.validate(
                jsonlib.loads(call.arguments), SCHEMA if call.name == "weather" else {"maxProperties": 0}
            )


BAD_TOOLS: list[tuple[Any, str]] = [
    ({}, "tools: must be a list"),
    ([OFFERED[0]] * 129, "at most 128"),
    ([{"type": "web_search"}], r"tools\[0\]: must be"),
    ([3], r"tools\[0\]: must be"),
    ([{"type": "function", "function": {"name": 'a"b'}}], r"tools\[0\]\.function\.name"),
    ([{"type": "function", "function": {"name": "a", "strict": "yes"}}], r"tools\[0\]\.function\.strict"),
    ([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], r"tools\[0\]\.function\.parameters"),
    ([OFFERED[0], OFFERED[0]], "given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "error"), BAD_TOOLS)
def test_wrong_tools_are_named(tools: Any, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        functions(tools)


def test_tool_choice() -> None:
    offered = functions(OFFERED)
    assert chosen(offered, None) == (offered, False)
    assert chosen([], None) == ([], False)
    assert functions(None) == []
    one = {"type": "function", "function": {"name": "weather_now"}}
    assert chosen(offered, one) == ([Function("weather_now", offered[1].parameters)], True)
    for choice in ("any", 3, {"type": "function"}, {"type": "function", "function": {"name": "other"}}):
        with pytest.raises(RequestError, match="tool_choice"):
            chosen(offered, choice)
    with pytest.raises(RequestError, match="needs tools"):
        chosen([], "required")


# --- from tokens to calls --------------------------------------------------------------------------


def test_special_markers_reach_the_parser() -> None:
    tokenizer = marked_tokenizer()
    text = '[TOOL_CALLS]weather[ARGS]{"unit": "C"}'
    ids = tokenizer.encode(text, parse_special=True)
    for markers, seen in ((get("mistral").markers, text), ((), 'weather{"unit": "C"}')):
        stream = StreamText(tokenizer, SamplingParams(show_special=visible(tokenizer, markers)))
        assert "".join(stream.push(i)[0] for i in ids) + stream.finish() == seen
    assert set(visible(tokenizer, MARKS)) == {tokenizer.backend.token_to_id(m) for m in SPECIAL}
    assert set(added(tokenizer, MARKS)) == MARKS
    with pytest.raises(RequestError, match="show_special"):
        SamplingParams(show_special=[-1])


CONSTRAINTS = [
    (
        Constraint("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
        '{"a": 3}',
        '{"a": "x"}',
    ),
    (Constraint("json_object"), '{"b": []}', "[]"),
    (Constraint("regex", "[0-9]{2}"), "42", "4x"),
    (Constraint("choice", '["red", "gr\\"een"]'), 'gr"een', "blue"),
]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("held", "good", "bad"), CONSTRAINTS, ids=lambda c: getattr(c, "kind", ""))
def test_answers_behind_thoughts_are_held(held: Constraint, good: str, bad: str, marked: bool) -> None:
    tokens = added(marked_tokenizer(), MARKS) if marked else {}
    inside = after_thoughts(held, THINK, True, tokens).text
    outside = after_thoughts(held, THINK, False, tokens).text
    assert accepts(inside, f"hm {good} <x> hm\n</think>\n\n{good}", marked)
    assert not accepts(inside, f"hm</think>\n\n{bad}", marked)
    assert not accepts(inside, "hm and no more", marked)
    assert accepts(outside, f"<think>hm</think>\n{good}", marked)
    assert accepts(outside, good, marked)
    assert not accepts(outside, bad, marked)


def test_a_grammar_of_the_clients_cannot_follow_open_thoughts() -> None:
    own = Constraint("grammar", 'start: "x"')
    assert after_thoughts(own, THINK, False, {}) is own
    with pytest.raises(RequestError, match="enable_thinking"):
        after_thoughts(own, THINK, True, {})
