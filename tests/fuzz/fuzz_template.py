# ruff: noqa: E501, SIM905  (templates and lists of words read best on one line)
"""Random mutations of chat templates: only TemplateError may escape, and every rendering ends in time.

Run for a while with `python tests/fuzz/fuzz_template.py --seconds 600 --seed 1`; the test run does a few hundred.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from paceline.checkpoints.template_meter import Limits
from paceline.checkpoints.templates import BUILTIN, ChatTemplate
from paceline.core.errors import TemplateError

LIMITS = Limits(seconds=1.0, steps=200_000, output=1 << 20, characters=8 << 20)
LONGEST = 10.0  # seconds for compiling and rendering, on a machine that does other things too
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Grüße <&>"}]},
    {
        "role": "assistant",
        "content": "x",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}],
    },
]
SEEDS = [
    *BUILTIN.values(),
    "{% set ns = namespace(n=0) %}{% for m in messages recursive %}{% set ns.n = ns.n + loop.index %}{{ ns.n ~ m | tojson }}{% endfor %}",
    "{% macro f(x, n=3) %}{{ x * n }}{{ caller() if caller else '' }}{% endmacro %}{{ f('a') }}{% call f([1]) %}in{% endcall %}",
    "{{ '%5s|%-3d' % ('x', 7) }}{{ '{:>5}{a!r}'.format(1, a='b') }}{{ 'a,b'.split(',') | join('-') | center(20) | indent(2) }}",
    "{% for i in range(10) if i is odd %}{% if i > 5 %}{% break %}{% else %}{{ [i, [i]] | batch(2) | list }}{% endif %}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | tojson(indent=2) }}",
    "{% generation %}{{ messages[-1]['content'][::-1] | upper | replace('X', 'yy') }}{% endgeneration %}{{ 2 ** 10 // 3 % 7 }}",
    "{% set d = {'a': (1, 2), 'b': [3]} %}{% for k, v in d.items() %}{{ k }}{{ v | sum }}{{ v | sort | first }}{% endfor %}{{ d | dictsort }}",
]
TOKENS = (
    "{{ }} {% %} {%- -%} {{- -}} {# #} for if else elif endif endfor in is not and or set macro endmacro call endcall filter endfilter "
    "with endwith block endblock raw endraw recursive break continue generation endgeneration include import extends autoescape "
    "messages loop self caller namespace range dict cycler joiner raise_exception strftime_now m.role m.content loop.index loop(m) ns "
    "|tojson |join |list |map('upper') |batch(9) |center(99) |indent(9) |replace('a','bb') |sort |unique |sum |int |string |length |e "
    "|safe |format(1) |attr('x') |groupby('role') |slice(3) |round(2) |truncate(5) |dictsort |items |select |reverse |tojson(indent=9) "
    ".format(1) .split() .join(messages) .upper() .replace('a','aaaa') .__class__ .items() .get('x') .append(1) .center(99) .encode() "
    "[0] [-1] [1:] [::2] ( ) [ ] { } , : . + - * ** / // % ~ == != < > <= = 0 1 2 99 100000 1000000000 1e308 'a' 'aaaaaaaa' '%s' '{0}' "
    "none true false \n \u00e9 \U0001f600 '%999999999d' '{:>999999999}'"
).split(" ")


def mutate(source: str, rng: random.Random) -> str:
    """A few edits: tokens inserted or put in place of text, pieces removed, doubled, swapped or taken from another template."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randint(0, len(source)) for _ in range(2))
        b = min(b, a + rng.choice((1, 3, 10, 40)))
        kind = rng.randrange(7)
        if kind == 0:
            source = source[:a] + source[b:]
        elif kind == 1:
            source = source[:b] + source[a:b] * rng.choice((1, 2, 20)) + source[b:]
        elif kind == 2:
            source = source[:a] + rng.choice(TOKENS) + source[b:]
        elif kind == 3:
            other = rng.choice(SEEDS)
            c = rng.randint(0, len(other))
            source = source[:a] + other[c : c + rng.choice((5, 30, 100))] + source[a:]
        elif kind == 4:
            source = source[:a] + chr(rng.choice((0, 10, 39, 123, 125, 37, 35, 0x2581, 0x10FFFF))) + source[b:]
        else:
            source = source[:a] + " " + rng.choice(TOKENS) + " " + source[a:]
    return source[:20_000]


def one(source: str) -> bool:
    """Compile and render; whether the template was fine. Anything but TemplateError escapes, lateness is an AssertionError."""
    start = time.monotonic()
    try:
        text = ChatTemplate(source, {"bos_token": "<s>"}, limits=LIMITS).render(MESSAGES, tools=[{"name": "f"}])
        assert len(text) <= LIMITS.output
        return True
    except TemplateError:
        return False
    finally:
        took = time.monotonic() - start
        assert took < LONGEST, f"{took:.1f} s for {source!r}"


def run(seconds: float, seed: int, limit: int = 1 << 40) -> tuple[int, int]:
    """(templates tried, templates that rendered)."""
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    tried = fine = 0
    while tried < limit and time.monotonic() < end:
        source = rng.choice(SEEDS)
        for _ in range(rng.choice((1, 1, 2))):
            source = mutate(source, rng)
        try:
            fine += one(source)
        except BaseException:
            print(f"seed {seed}, template {tried}: {source!r}")
            raise
        tried += 1
    return tried, fine


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tried, fine = run(arguments.seconds, arguments.seed)
    print(f"{tried} templates, {fine} rendered")
