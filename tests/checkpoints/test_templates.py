# ruff: noqa: E501  (templates and lists of words read best on one line)
"""Chat templates: transformers' text for real templates and for the language, bounded work for hostile ones."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from test_vocab import tiny_spm

from paceline.checkpoints.template_meter import Limits
from paceline.checkpoints.templates import BUILTIN, RESERVED, ChatTemplate, chat_template
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core.errors import TemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
USER = {"role": "user", "content": "Hello, how are you?"}
ASSISTANT = {"role": "assistant", "content": "I'm doing great. How can I help you today?"}
AGAIN = {"role": "user", "content": "I'd like to show off how chat templating works!"}
CONVERSATIONS = {
    "user": [USER],
    "user-assistant-user": [USER, ASSISTANT, AGAIN],
    "system-user-assistant-user": [SYSTEM, USER, ASSISTANT, AGAIN],
}
BROKEN = [ASSISTANT, USER, USER]  # many templates refuse roles that do not alternate
RECORDED = Path(__file__).parent / "data" / "chat-templates.json"


def templates(shared: Path) -> list[tuple[str, str]]:
    lines = (shared / "data/chat-templates/templates.jsonl").read_text("utf-8").splitlines()
    return [next(iter(json.loads(line).items())) for line in lines]


def rendered(template: str, messages: Any, prompt: bool = True, **more: Any) -> str | None:
    """Our text; None where the template refuses."""
    try:
        return ChatTemplate(template, TOKENS).render(messages, add_generation_prompt=prompt, **more)
    except TemplateError:
        return None


def theirs(template: str, messages: Any, prompt: bool = True, **more: Any) -> str | None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    try:
        texts = utils.render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=prompt, **more, **TOKENS
        )
    except Exception:
        return None
    text: str = texts[0][0]
    return text


def digest(text: str | None) -> str:
    return "raises" if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


# --- real templates ------------------------------------------------------------------------------


def test_real_templates_render_as_in_transformers(shared: Path) -> None:
    found = templates(shared)
    assert len(found) == 35
    for name, source in found:
        for messages in [*CONVERSATIONS.values(), BROKEN]:
            for prompt in (True, False):
                assert rendered(source, messages, prompt) == theirs(source, messages, prompt), (name, messages, prompt)


def test_real_templates_render_as_recorded(shared: Path) -> None:
    """The same without transformers: digests of its renderings (`python test_templates.py` writes them anew)."""
    assert record(shared, rendered) == json.loads(RECORDED.read_text())


def record(shared: Path, render: Any) -> dict[str, list[str]]:
    return {
        f"{i}-{name}": [digest(render(source, m)) for m in [*CONVERSATIONS.values(), BROKEN]]
        for i, (name, source) in enumerate(templates(shared))
    }


def test_most_real_templates_agree_with_a_second_engine(shared: Path) -> None:
    """Another engine's hand-written forms differ in whitespace and BOS, and for some models altogether."""
    agree = total = 0
    for name, source in templates(shared):
        for conversation, messages in CONVERSATIONS.items():
            file = shared / f"data/chat-templates/{name}.gotmpl" / conversation
            text = rendered(source, messages)
            if text is not None and file.is_file():
                total += 1
                bare = text.replace("<s>", "").replace("</s>", "").split()
                agree += bare == file.read_text("utf-8").replace("<s>", "").replace("</s>", "").split()
    assert total > 80
    assert agree / total > 0.4, (agree, total)


TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "Größe <&>", "parameters": {"type": "object", "properties": {}}},
    }
]
RICH = [
    SYSTEM,
    {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None, True]}}}],
    },
    {"role": "tool", "content": "ünïcode", "name": "f"},
    {"role": "assistant", "content": "  done\n", "reasoning": "because"},
]
LANGUAGE = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.revindex0 }};{% endfor %}",
    "{% for m in messages %}\n    {% if loop.previtem is defined %}\n{{ loop.previtem.role }}\n    {% endif %}\n{% endfor %}\n",
    "{%- for m in messages if m.role != 'system' -%} {{- m['role'] + '|' -}} {%- else -%} none {%- endfor -%}",
    "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{% if loop.index > 4 %}{% break %}{% endif %}x{% endfor %}",
    "{% for m in messages[1:] %}{{ m.role[:2] }}{{ m.role[::-1] }}{% endfor %}{{ messages[-1]['role'] }}{{ messages[99] }}",
    "{% set ns = namespace(n=0, found=false) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.found }}",
    "{% macro show(m, upper=false) %}{{ m.role | upper if upper else m.role }}{% endmacro %}{{ show(messages[0]) }}{{ show(messages[0], true) }}",
    "{% call(x) f() %}{% endcall %}",
    "{% macro f() %}[{{ caller('in') }}]{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}",
    "{% set text %}a{{ 1 + 1 }}b{% endset %}{{ text }}{{ text | length }}",
    "{% filter upper %}shout {{ messages[0].role }}{% endfilter %}",
    "{% generation %}{% set inner = 1 %}said{% endgeneration %}{{ inner is defined }}",
    "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ tools | tojson(indent=2, sort_keys=true) }}",
    "{{ {'b': 1, 'a': ['ü', none]} | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | rejectattr('content', 'defined') | map(attribute='role') | list }}",
    "{% for role, group in messages | groupby('role') %}{{ role }}{{ group | length }}{% endfor %}",
    "{{ [3, 1, 2] | sort | reverse | list }}{{ ['b', 'A', 'b'] | unique | list }}{{ [1, 2, 3] | sum }}{{ [1, 5] | max }}{{ [] | first }}",
    "{{ range(5) | batch(2, 'x') | list }}{{ range(5) | slice(2) | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1} | items | list }}",
    "{{ '  x ' | trim }}|{{ 'a b' | title }}|{{ 'x' | center(5) }}|{{ 'a\nb' | indent(2) }}|{{ 'aXa' | replace('a', 'b', 1) }}",
    "{{ 'abc'.upper() ~ 1 ~ none ~ [1, 'x'] }}{{ 'a,b'.split(',') }}{{ ' x'.lstrip() }}{{ 'x'.startswith('x') }}{{ '-'.join(['a', 'b']) }}",
    "{{ 'a{}b{x!r:>5}'.format(1, x='y') }}{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('z') }}{{ 'x'.rjust(3) }}{{ 'a\tb'.expandtabs(4) }}",
    "{{ 1 < 2 < 3 }}{{ 'a' in 'abc' }}{{ 'x' not in ['x'] }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -7 % 3 }}{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ [1] + [2] }}",
    "{{ undefined_thing }}|{{ undefined_thing | default('d') }}|{{ none | default('d', true) }}|{{ messages[0].nothing }}",
    "{{ undefined_thing.more }}",
    "{{ 1 / 0 }}",
    "{{ messages[0] is mapping }}{{ messages is sequence }}{{ 'x' is string }}{{ messages is iterable }}{{ 3 is odd }}{{ 'a' is in ['a'] }}",
    "{{ x if true }}{{ 'y' if false }}{{ 'a' if messages else 'b' }}{{ 3.7 | int }}{{ '3' | int + 1 }}{{ 3.14159 | round(2) }}{{ 2.5 | round }}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ {'a': 1}.get('b', 'none') }}{{ {1: 2}[1] }}",
    "{% for x in [1, [2, [3, 4]]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}{% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}{% set c = cycler('x', 'y') %}{{ c.next() }}",
    "{% set j = joiner('|') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}{{ dict(a=1, b=2) }}{{ dict.fromkeys([1, 2], 'z') }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{% raw %}{{ raw }}{% endraw %}{# comment #}{% block name %}in{% endblock %}",
    "{{ raise_exception('no') }}",
    "{% if false %}{{ raise_exception('no') }}{% endif %}fine",
    "{{ messages[4].reasoning_content }}{{ messages[4].thinking }}{{ messages[4].reasoning }}",
    "{% if add_generation_prompt %}go{% endif %}{{ documents }}{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}",
    "{{ '<b>' | e }}{{ '<b>' | safe }}{{ '<b>' }}{{ ('<' | e) ~ '<' }}{{ ('<' | e) + '<' }}{{ 'a b&' | urlencode }}",
    "{{ [[1, 2], [3]] | map('length') | list }}{{ ['a', 'b'] | map('upper') | list }}{{ [0, 1] | select | list }}{{ [1, 2] | select('odd') | list }}",
    "{{ messages[0].__class__ }}",
    "{{ messages.append(1) }}",
    "{{ namespace(_x=1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'other' %}",
    "{% import 'other' as o %}",
    "{% unknown %}",
    "{{ 'a' | nofilter }}",
    "{{ unclosed",
    "{{ 5 | string | length }}{{ [1,2] | string }}{{ 'abc' | list }}{{ 'a b c' | wordcount }}{{ 'abcdefghijkl' | truncate(8, true, '..') }}",
    "{{ 'ß'.upper() }}{{ 'ABC' | lower | capitalize }}{{ '%.2f' | format(3.14159) }}{{ 10 | float }}{{ -3 | abs }}{{ [1,2,3] | last }}",
    "{%- set x = messages | length -%}{%- if x >= 3 and not (x == 4) or x is divisibleby(5) -%}yes{%- endif -%}",
    "{% for i in range(0, 10, 3) %}{{ i }}{% endfor %}{% for a, b in [(1, 2), (3, 4)] %}{{ a * b }}{% endfor %}{% for c in 'xyz' %}{{ c }}-{% endfor %}",
    "line\n  {% if true %}  \n  kept {{ 'x' }}\n  {% endif %}\n\n{%+ if true %} y{% endif +%}\nend\n\n",
]  # fmt: skip


@pytest.mark.parametrize("source", LANGUAGE)
def test_the_language_is_transformers(source: str) -> None:
    messages = [{k: v for k, v in m.items() if v is not None} for m in RICH]  # as apply_chat_template does before
    for prompt in (True, False):
        assert rendered(source, RICH, prompt, tools=TOOLS) == theirs(source, messages, prompt, tools=TOOLS)


# --- prefill, tools, variables -------------------------------------------------------------------

PREFILL = [
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}",
    "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}!{% endfor %}",
]


@pytest.mark.parametrize("source", [*PREFILL, *BUILTIN.values()])
@pytest.mark.parametrize("content", ["The answer is", "trailing space ", "  ", [{"type": "text", "text": "in blocks"}]])
def test_continuing_the_last_message(source: str, content: Any) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    assert rendered(source, messages, False, continue_final_message=True) == theirs(
        source, messages, False, continue_final_message=True
    )


def test_continuing_refuses_what_cannot_be_continued() -> None:
    template = ChatTemplate("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(TemplateError, match="drops or changes"):
        template.render([USER, ASSISTANT], continue_final_message=True)
    with pytest.raises(TemplateError, match="exclude each other"):
        template.render([USER], continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="no content"):
        template.render([USER, {"role": "assistant", "tool_calls": []}], continue_final_message=True)


def test_named_templates_are_chosen_by_the_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "with tools", "rag": "{{ broken"})
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "with tools"
    assert template.render([USER], tools=[]) == "plain"
    with pytest.raises(TemplateError, match="default"):
        ChatTemplate({"rag": "x"})


def test_variables_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ level }}")
    assert template.render([USER], variables={"enable_thinking": False, "level": ["x"]}) == "False['x']"


@pytest.mark.parametrize("name", sorted([*RESERVED, "image_token", "__class__", "_x", "a b", "", "x" * 100]))
def test_variables_cannot_replace_what_the_engine_sets(name: str) -> None:
    """Attack 17: template arguments of a client overriding internal ones (CVE-2025-62426)."""
    template = ChatTemplate("{{ messages | length }}", {"image_token": "<image>"})
    with pytest.raises(TemplateError, match="template variable"):
        template.render([USER], variables={name: "evil"})


def test_the_callers_messages_stay_as_they_were() -> None:
    messages = [dict(USER), {"role": "assistant", "content": "x", "reasoning": "r", "name": None}]
    before = json.dumps(messages)
    ChatTemplate(BUILTIN["chatml"]).render(messages, continue_final_message=True)
    assert json.dumps(messages) == before


def test_the_clock_can_be_set() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", clock=lambda: datetime(2024, 7, 26))
    assert template.render([USER]) == "26 Jul 2024"


class Odd:
    def __str__(self) -> str:
        raise AssertionError("a template may not run code of its arguments")


@pytest.mark.parametrize(
    "messages",
    [[], None, "hello", ["hello"], [{}], [{"role": 1, "content": ""}], [{"role": "user", "content": Odd()}], [{"role": "user", 3: ""}],
     [{"role": "user", "content": b"x"}]],
)  # fmt: skip
def test_unusable_messages_are_refused(messages: Any) -> None:
    with pytest.raises(TemplateError, match="messages"):
        ChatTemplate("{{ messages }}").render(messages)


def test_nesting_is_bounded() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(TemplateError, match="nested"):
        ChatTemplate("x").render([{"role": "user", "content": deep}])
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    with pytest.raises(TemplateError, match="nested"):
        ChatTemplate("x").render([{"role": "user", "content": cyclic}])


# --- choosing ------------------------------------------------------------------------------------


def test_choosing_a_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny_spm())
    with pytest.raises(TemplateError, match="--chat-template"):
        chat_template(tokenizer)
    assert chat_template(tokenizer, "llama3").render([USER]).startswith("<s><|start_header_id|>user")
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}own")
    assert chat_template(tokenizer, str(file)).render([USER]) == "<s>own"
    with pytest.raises(TemplateError, match="neither a file nor"):
        chat_template(tokenizer, "absent")
    file.write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="UTF-8"):
        chat_template(tokenizer, str(file))
    tokenizer.chat_template = {"default": "D", "rag": "R"}
    assert chat_template(tokenizer).render([USER]) == "D"
    assert chat_template(tokenizer, "rag").render([USER]) == "R"


def test_builtin_templates() -> None:
    texts = {name: ChatTemplate(source, TOKENS).render([SYSTEM, USER]) for name, source in BUILTIN.items()}
    assert texts["chatml"] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello, how are you?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert texts["llama3"] == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello, how are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert texts["plain"] == "System: You are a helpful assistant.\n\nUser: Hello, how are you?\n\nAssistant:"


# --- bounds --------------------------------------------------------------------------------------

SMALL = Limits(seconds=2.0, steps=40_000, characters=8 << 20, output=1 << 20)
DOUBLE = "{{% set ns = namespace(a={0}) %}}{{% for i in range(60) %}}{{% set ns.a = {1} %}}{{% endfor %}}"
NESTED = DOUBLE.format("[1]", "[ns.a, ns.a]")
TUPLES = DOUBLE.format("(1,)", "(ns.a, ns.a)")
ENDLESS = [
    "{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ [1] * 10**9 }}", "{{ (1,) * 10**9 }}", "{{ 10**1000000 }}", "{{ (10**1000)**100 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% for i in range(99999) if range(99999) | list %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%.1000000000f' % 1.5 }}", "{{ '%1000000000s' | format('x') }}",
    "{{ '{:>1000000000}'.format(1) }}", "{{ '{:>{w}}'.format(1, w=10**9) }}", "{{ '{x:.1000000000f}'.format_map({'x': 1.5}) }}",
    "{{ 'a' | center(1000000000) }}", "{{ 'a'.center(1000000000) }}", "{{ 'a'.ljust(10**9) }}", "{{ 'a'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(1000000000) }}", "{{ 'a\nb' | indent(1000000000) }}", "{{ 'a\nb\n' * 100000 | indent('x' * 100000) }}",
    "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}", "{{ ('x' * 1000000) | replace('', 'y' * 1000) }}",
    "{{ ('x' * 100000).join(range(99999) | map('string')) }}", "{{ range(99999) | join('x' * 100000) }}",
    "{{ ['a'] | batch(1000000000, 'x') | list }}", "{{ [1] | slice(1000000000) | list }}", "{{ [[]] | tojson(indent=1000000000) }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}", "{{ strftime_now('%1000000000Y') }}", "{{ range(99999) | map('list') | list }}",
    DOUBLE.format("'aa'", "ns.a + ns.a"), DOUBLE.format("'aa'", "ns.a ~ ns.a"), DOUBLE.format("'aa'", "'%s%s' % (ns.a, ns.a)"),
    DOUBLE.format("'aa'", "'{0}{0}'.format(ns.a)"), DOUBLE.format("'aa'", "[ns.a, ns.a] | join"), DOUBLE.format("[1]", "ns.a + ns.a"),
    DOUBLE.format("9", "ns.a * ns.a"), DOUBLE.format("'<' | e", "ns.a + '<<<<' * 1000 + ns.a"),
    NESTED + "{{ ns.a }}", NESTED + "{{ ns.a | tojson }}", NESTED + "{{ ns.a | string }}", NESTED + "{{ ns.a ~ '' }}", NESTED + "{{ ns }}",
    NESTED + "{{ '%s' % [ns.a] }}", NESTED + "{{ '{}'.format(ns.a) }}", NESTED + "{{ ns.a == [ns.a] }}", NESTED + "{{ 1 in ns.a }}",
    NESTED + "{{ [ns.a, ns.a] | sort }}", NESTED + "{{ ns.a is eq(ns.a) }}", NESTED + "{{ [ns.a].count(1) }}", NESTED + "{{ ns.a | join }}",
    TUPLES + "{{ {ns.a: 1} }}", TUPLES + "{{ dict([[ns.a, 1]]) }}", TUPLES + "{{ {}[ns.a] }}", TUPLES + "{{ {}.get(ns.a) }}",
    TUPLES + "{{ [ns.a] | unique | list }}", TUPLES + "{{ dict.fromkeys([ns.a]) }}", TUPLES + "{{ {1: ns.a}.values() | list }}",
    "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns | tojson }}",
    "{% set b = range(99999) | list %}{% for i in range(99999) %}{% set y = b[:] %}{% endfor %}",
    "{% set b = 'x' * 1000000 %}{% for i in range(99999) %}{% set y = b | upper %}{% endfor %}",
    "{% set b = 'x' * 1000000 %}{% for i in range(99999) %}{% set y = b == b ~ 'x' %}{% endfor %}",
    "{{ 'f' * 500000 | int(0, 16) * 2 }}{{ ('f' * 500000) | int(0, 16) }}", "{{ range(99999) | map('center', 9999) | join }}",
]  # fmt: skip
REFUSED = [
    "{{ 'a'.encode() }}", "{{ lipsum() }}", "{{ 'a'.translate({97: 'b'}) }}", "{{ {}.fromkeys([1]) }}", "{{ (5).to_bytes(9, 'big') }}",
    "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}", "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}", "{{ ('a' | attr('format')).__self__ }}{{ ''.format.__globals__.x }}",
    "{{ '{0.__class__.__mro__[1]}'.format('x') }}", "{{ '<a>' | striptags }}", "{{ messages | random }}", "{{ messages[0].update(x=1) }}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{{ namespace.__init__(1) }}", "{{ dict.__call__.__globals__ }}",
    "{{ [1].sort() }}", "{{ raise_exception.__globals__['sys'] }}", "{{ (messages | map('upper')).gi_frame.f_globals.x }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_templates_end(source: str) -> None:
    """TemplateError, soon, without much memory, whatever the template multiplies."""
    gc.collect()
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(TemplateError):
            print(len(ChatTemplate(source, limits=SMALL).render([USER])), file=sys.stderr)
        used = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used < 10  # under tracemalloc, which takes most of it
    assert peak < 120 << 20


@pytest.mark.parametrize("source", REFUSED)
def test_escapes_are_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        print(ChatTemplate(source).render([USER]), file=sys.stderr)


def test_time_is_bounded() -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"longer than 0\.3 s"):
        ChatTemplate(ENDLESS[6], limits=Limits(seconds=0.3, steps=10**12)).render([USER])
    assert time.monotonic() - start < 5


def test_source_is_bounded() -> None:
    with pytest.raises(TemplateError, match="characters"):
        ChatTemplate("x" * (Limits.source + 1))
    for source in (
        "{{ " + "(" * 50_000,
        "{{ " + "-" * 50_000 + "1 }}",
        "{% if 1 %}" * 20_000,
        "{{ 1" + "+1" * 50_000 + " }}",
        "{" * 200_000,
    ):
        with pytest.raises(TemplateError):
            ChatTemplate(source)


def test_output_is_bounded() -> None:
    with pytest.raises(TemplateError, match="characters"):
        ChatTemplate("{% for i in range(99999) %}0123456789{% endfor %}", limits=Limits(output=1000)).render([USER])


def test_long_conversations_fit() -> None:
    """Two thousand messages of a kilobyte are far inside the default bounds."""
    messages = [USER if i % 2 == 0 else ASSISTANT for i in range(2000)]
    messages = [{**m, "content": "word " * 200} for m in messages]
    text = ChatTemplate(BUILTIN["llama3"], TOKENS).render(messages)
    assert text.count("<|eot_id|>") == 2000


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    folder = Path(__file__).resolve().parents[3] / "shared"
    RECORDED.write_text(json.dumps(record(folder, theirs), indent=0) + "\n")
