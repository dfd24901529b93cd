"""Output under a constraint: what ends with "stop" keeps to it, alone, batched, speculated or preempted; what cannot be kept is refused."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from paceline import lab
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core.errors import RequestError
from paceline.core.runner import Parts
from paceline.core.sequence import NO_DRAFT, Draft, Sequence
from paceline.core.types import GREEDY, Constraint, Output, SamplingParams
from paceline.core.verify import coupled, rejection
from paceline.llm import LLM
from paceline.techniques.output.llguidance import STATE, Masks
from paceline.techniques.parts.grammar import Grammars, Mask
from paceline.techniques.parts.grammar_trial import Trial

from .tiny import request, tiny_engine

S: dict[str, Any] = {"type": "string", "maxLength": 12}
I: dict[str, Any] = {"type": "integer", "minimum": -50, "maximum": 5000}  # noqa: E741
PROMPT = "A record as JSON: "


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: list[Any] = [
    obj(name=S, age=I),
    obj(name=S, paid={"type": "boolean"}),
    obj(a={"type": "null"}),
    obj(x={"type": "number", "minimum": 0, "maximum": 1}),
    obj(x={"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.5}),
    obj(x={"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700}),
    obj(kind={"enum": ["a", "b", 3, None, True, {"k": [1]}]}),
    obj(kind={"const": "fixed \"text\" é 漢字 😀"}),
    obj(nested=obj(inner=obj(deep=S))),
    obj(items={"type": "array", "items": I, "minItems": 2, "maxItems": 4}),
    obj(pair={"type": "array", "prefixItems": [S, I], "items": False, "minItems": 2}),
    obj(rows={"type": "array", "items": obj(a=I, b=S), "minItems": 1, "maxItems": 3}),
    obj(matrix={"type": "array", "items": {"type": "array", "items": I, "maxItems": 2}, "minItems": 1, "maxItems": 2}),
    obj(either={"anyOf": [S, I, {"type": "null"}]}),
    obj(one={"oneOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": 0, "maximum": 9}]}),
    obj(both={"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]}),
    obj(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    obj(part={"type": "string", "pattern": "ab", "maxLength": 6}),
    obj(day={"type": "string", "format": "date"}),
    obj(at={"type": "string", "format": "date-time", "maxLength": 24}),
    obj(at={"type": "string", "format": "time", "maxLength": 16}),
    obj(id={"type": "string", "format": "uuid"}),
    obj(ip={"type": "string", "format": "ipv4"}),
    obj(text={"type": "string", "minLength": 3, "maxLength": 6}),
    obj(empty={"type": "string", "maxLength": 0}),
    obj(list={"type": "array", "maxItems": 0}),
    {"type": "object", "properties": {"a": I, "b": I}, "required": ["b"], "additionalProperties": False},
    {"type": "object", "properties": {"a": I}, "required": ["a"], "additionalProperties": I, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^k[0-9]$": I}, "additionalProperties": False, "minProperties": 1, "maxProperties": 2},
    {"$defs": {"p": obj(x=I, y=I)}, **obj(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"})},
    {"definitions": {"s": S}, "type": "array", "items": {"$ref": "#/definitions/s"}, "minItems": 1, "maxItems": 2},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
    {"type": "integer", "minimum": 10, "maximum": 20},
    {"type": "boolean"},
    {"type": ["integer", "null"], "maximum": 3, "minimum": 1},
    {"enum": ["red", "green", "blue"]},
    {"const": {"a": [1, 2.5, "x"]}},
    {"anyOf": [obj(kind={"const": "cat"}, lives=I), obj(kind={"const": "dog"}, tricks={"type": "array", "items": S, "maxItems": 2})]},
    {"title": "T", "description": "d", "default": {}, "examples": [1], "$comment": "c", **obj(a={"title": "A", **I})},
    obj(**{'odd "key"\n é': I, "": I, "a/b~c": I}),
]  # fmt: skip


def constraint(schema: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


def sampled(seed: int, c: Constraint, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 300, "constraint": c, **more})


def tokens_of(output: Output) -> list[list[int]]:
    return [c.token_ids for c in output.completions]


def check(output: Output, schema: Any) -> None:
    assert output.error is None
    for c in output.completions:
        assert c.finish_reason == "stop", c.text
        jsonschema.validate(json.loads(c.text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("lab-8m", context=1024) as found:
        yield found


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    found = Grammars(Tokenizer.from_folder(lab.path("lab-8m")))
    yield found
    found.close()


def test_every_schema_is_kept(llm: LLM) -> None:
    """Greedy and sampled, all in one batch; and each gives alone what it gives there."""
    params = [
        p
        for i, s in enumerate(SCHEMAS)
        for p in (sampled(i, constraint(s)), sampled(i, constraint(s), temperature=0.0))
    ]
    outputs = llm.generate([PROMPT] * len(params), params)
    for schema, pair in zip(SCHEMAS, zip(outputs[::2], outputs[1::2], strict=True), strict=True):
        for output in pair:
            check(output, schema)
    for i in range(0, len(params), 9):
        assert llm.generate(PROMPT, params[i])[0].token_ids == outputs[i].token_ids


def test_neighbours_without_a_constraint_are_untouched(llm: LLM) -> None:
    free = [SamplingParams(temperature=t, seed=5, max_tokens=40, ignore_eos=True) for t in (0.0, 0.9)]
    alone = [llm.generate(PROMPT, p)[0].token_ids for p in free]
    bound = [sampled(i, constraint(s)) for i, s in enumerate(SCHEMAS[:6])]
    together = llm.generate([PROMPT] * 8, [free[0], *bound, free[1]])
    assert [together[0].token_ids, together[-1].token_ids] == alone
    assert all(STATE not in s.states for o in (together[0], together[-1]) for s in o.sequences)


def test_the_completions_of_a_request_follow_it_each_on_its_own(llm: LLM) -> None:
    schema = SCHEMAS[0]
    output = llm.generate(PROMPT, sampled(3, constraint(schema), n=3, temperature=1.3))[0]
    check(output, schema)
    assert len({c.text for c in output.completions}) == 3


def test_other_kinds(llm: LLM) -> None:
    output = llm.generate(PROMPT, sampled(1, Constraint("json_object"), temperature=0.0))[0]
    assert isinstance(json.loads(output.text), dict)
    for seed in range(4):
        output = llm.generate(PROMPT, sampled(seed, Constraint("regex", r"\d{3}-[a-z]{2,4}(x|é)/")))[0]
        assert re.fullmatch(r"[0-9]{3}-[a-z]{2,4}(x|é)/", output.text)
        choices = ["yes", "no", 'a "quoted"\nline', "日本", ""]
        output = llm.generate(PROMPT, sampled(seed, Constraint("choice", json.dumps(choices)), temperature=2.0))[0]
        assert output.text in choices
        lark = 'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]{1,3}/'
        output = llm.generate(PROMPT, sampled(seed, Constraint("grammar", lark), max_tokens=30))[0]
        assert re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3})*\+?", output.text)
        gbnf = 'root ::= "<" word ">" # a tag\nword ::= [a-z]+ | "_"'
        output = llm.generate(PROMPT, sampled(seed, Constraint("grammar", gbnf), max_tokens=200))[0]
        assert re.fullmatch(
            r"<([a-z]+|_)>" if output.completions[0].finish_reason == "stop" else "<[a-z]+", output.text
        )
        tool = 'start: "<call>" %json ' + json.dumps(SCHEMAS[0]) + ' "</call>"'
        output = llm.generate(PROMPT, sampled(seed, Constraint("grammar", tool)))[0]
        jsonschema.validate(json.loads(output.text[len("<call>") : -len("</call>")]), SCHEMAS[0])


def test_truncation_and_stop_strings(llm: LLM) -> None:
    c = constraint(SCHEMAS[0])
    whole = llm.generate(PROMPT, GREEDY.with_(constraint=c))[0]
    cut = llm.generate(PROMPT, GREEDY.with_(constraint=c, max_tokens=4))[0]
    assert cut.token_ids == whole.token_ids[:4]
    assert cut.completions[0].finish_reason == "length"
    stopped = llm.generate(PROMPT, GREEDY.with_(constraint=c, stop=['"age"']))[0]
    assert stopped.text == whole.text[: whole.text.index('"age"')]
    assert stopped.completions[0].stop_reason == '"age"'


def test_the_end_is_the_constraints(llm: LLM) -> None:
    """min_tokens and ignore_eos put the end off while something else is allowed, and no longer."""
    fixed = Constraint("choice", '["yes"]')
    for late in ({"min_tokens": 50}, {"ignore_eos": True}):
        output = llm.generate(PROMPT, sampled(1, fixed, **late))[0]
        assert (output.text, output.completions[0].finish_reason) == ("yes", "stop")
        output = llm.generate(
            PROMPT, sampled(1, Constraint("regex", "[ab]{0,99}"), temperature=0.0, max_tokens=120, **late)
        )[0]
        assert len(output.token_ids) >= 50 or len(output.text) == 99
        assert output.completions[0].finish_reason == "stop"
        assert re.fullmatch("[ab]{0,99}", output.text)
    blocked = [t for t in range(3, llm.plan.model.n_vocab) if llm.tokenizer.token_bytes(t)[:1] == b"7"][:64]  # type: ignore[union-attr]
    output = llm.generate(PROMPT, sampled(1, Constraint("regex", "7"), min_tokens=2, stop_token_ids=blocked))[0]
    assert output.completions[0].finish_reason == "error"
    assert "stop_token_ids" in (output.error or "")
    assert output.text == ""


def test_a_matcher_that_fails_ends_the_sequence(llm: LLM) -> None:
    """This expression is accepted and grows beyond all limits after a hundred characters; the neighbour goes on."""
    bomb = sampled(1, Constraint("regex", "(x{1,1000}){1,1000}"), ignore_eos=True, max_tokens=900)
    output, other = llm.generate([PROMPT, PROMPT], [bomb, GREEDY.with_(max_tokens=5)])
    assert output.completions[0].finish_reason == "error"
    assert "constraint" in (output.error or "")
    assert set(output.text) == {"x"}
    assert other.completions[0].finish_reason in ("stop", "length")
    assert not llm.engine.has_work


def test_whitespace_comes_to_an_end(llm: LLM) -> None:
    assert llm.tokenizer is not None
    blank = [
        t
        for t in range(llm.tokenizer.n_vocab)
        if llm.tokenizer.token_bytes(t) and not llm.tokenizer.token_bytes(t).strip(b" \n\t\r")
    ]
    push = dict.fromkeys(blank[:1000], 100.0)
    schema = obj(a={"type": "boolean"}, b={"type": "array", "items": {"type": "null"}, "maxItems": 2})
    output = llm.generate(PROMPT, sampled(1, constraint(schema), logit_bias=push, max_tokens=600))[0]
    check(output, schema)
    runs = [len(r) for r in re.findall(r"\s+", output.text)]
    assert 8 < max(runs) <= 22


class Oracle:
    """Proposes the plain run's own tokens with mistakes, and goes on beyond the end."""

    def __init__(self, plain: dict[int, list[int]], tree: bool, n_vocab: int, q: bool = False):
        self.plain, self.tree, self.n_vocab, self.q = plain, tree, n_vocab, q
        self.rng = random.Random(1)
        self.n_accepted = self.n_rejected = 0

    def propose(self, seqs: Seq[Sequence]) -> list[Draft]:
        return [self._draft(s) for s in seqs]

    def _draft(self, seq: Sequence) -> Draft:
        rest = self.plain[seq.seed][len(seq.output) :][: self.rng.randint(0, 6)]
        if not rest:
            return NO_DRAFT
        tokens: list[int] = []
        parents: list[int] = []
        last = -1
        for t in [*rest, 65]:
            if self.tree:
                tokens.append((t + 1) % self.n_vocab)
                parents.append(last)
            tokens.append(t if self.rng.random() < 0.8 else self.rng.randrange(self.n_vocab))
            parents.append(last)
            last = len(tokens) - 1
        q = None
        if self.q:
            q = np.full((len(tokens), self.n_vocab), 1e-3 / self.n_vocab, np.float32)
            q[np.arange(len(tokens)), tokens] += 1
        return Draft(np.array(tokens, np.int32), np.array(parents, np.int32), q)

    def observe(self, seq: Sequence, n: int) -> None:
        self.n_accepted += n
        self.n_rejected += 1


@pytest.fixture
def drafting(llm: LLM) -> Iterator[Parts]:
    parts = llm.engine.runner.parts
    yield parts
    parts.drafter, parts.acceptor = None, coupled


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_gives_the_constrained_tokens(llm: LLM, drafting: Parts, tree: bool, temperature: float) -> None:
    params = [
        sampled(i, constraint(s), temperature=temperature, logprobs=1, min_tokens=5 * (i % 2))
        for i, s in enumerate(SCHEMAS[:16])
    ]
    plain = llm.generate([PROMPT] * len(params), params)
    drafter = Oracle({i: o.token_ids for i, o in enumerate(plain)}, tree, llm.plan.model.n_vocab)
    drafting.drafter = drafter
    before = llm.engine.runner.n_steps
    got = llm.generate([PROMPT] * len(params), params)
    assert drafter.n_accepted > 100
    assert llm.engine.runner.n_steps - before < max(len(o.token_ids) for o in plain)
    for i, (a, b) in enumerate(zip(plain, got, strict=True)):
        check(b, SCHEMAS[i])
        assert a.token_ids == b.token_ids
        assert a.completions[0].logprobs == b.completions[0].logprobs


def test_rejection_sampling_keeps_to_the_constraint(llm: LLM, drafting: Parts) -> None:
    params = [sampled(i, constraint(s)) for i, s in enumerate(SCHEMAS[:12])]
    plain = llm.generate([PROMPT] * len(params), params)
    drafter = Oracle({i: o.token_ids for i, o in enumerate(plain)}, False, llm.plan.model.n_vocab, q=True)
    drafting.drafter, drafting.acceptor = drafter, rejection
    for schema, output in zip(SCHEMAS, llm.generate([PROMPT] * len(params), params), strict=False):
        check(output, schema)
    assert drafter.n_accepted > 20
    bomb = sampled(20, Constraint("regex", "(x{1,1000}){1,1000}"), ignore_eos=True, max_tokens=900)
    drafter.plain[20] = llm.tokens("xxxx")[-2:] * 200
    output = llm.generate(PROMPT, bomb)[0]
    assert output.completions[0].finish_reason == "error"
    assert set(output.text) <= {"x"}


def test_preemption_and_branches_make_the_matcher_again(llm: LLM) -> None:
    params = [sampled(i, constraint(s)) for i, s in enumerate(SCHEMAS[9:17])]
    prompts = [f"{i} {PROMPT}" * 12 for i in range(len(params))]
    plain = [llm.generate(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    with LLM("lab-8m", context=448, page_size=4, kv_memory=2 << 20, use=["no:serving/radix"]) as small:
        outputs = small.generate(prompts, params)
        assert sum(o.n_preempted for o in outputs) > 0
        assert list(map(tokens_of, outputs)) == list(map(tokens_of, plain))
    first = llm.generate(PROMPT, params[0], park=True)[0]
    branch = llm.branch(first)
    check(llm.generate(branch, sampled(9, constraint(SCHEMAS[0])))[0], SCHEMAS[0])
    llm.release(branch)


# --- what is refused ------------------------------------------------------------------------------


def chain(n: int, template: str, last: str) -> str:
    return "start: r0\n" + "\n".join(template.format(i, i + 1) for i in range(n)) + last.format(n)


def refs(n: int) -> str:
    defs: dict[str, Any] = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(n)
    }
    return json.dumps({"$defs": {**defs, f"a{n}": S}, "$ref": "#/$defs/a0"})


def nested(n: int) -> Any:
    schema: Any = S
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


J = json.dumps
REFUSED = [
    ("json_schema", J(obj(a={"not": S})), r"#/properties/a: keyword 'not'"),
    ("json_schema", J(obj(a=obj(b={"if": S, "then": S}))), r"#/properties/a/properties/b: keyword 'if'"),
    ("json_schema", J({"type": "array", "uniqueItems": True}), "'uniqueItems'"),
    ("json_schema", J({"type": "array", "contains": S}), "'contains'"),
    ("json_schema", J({"type": "object", "propertyNames": S}), "'propertyNames'"),
    ("json_schema", J({"type": "object", "dependentRequired": {"a": ["b"]}}), "'dependentRequired'"),
    ("json_schema", J({"extends": {}}), "'extends'"),
    ("json_schema", J({"items": [S], "additionalItems": False}), "'additionalItems'"),
    ("json_schema", J(obj(a={"type": "string", "format": "iri"})), r"'format' at #/properties/a"),
    ("json_schema", J(obj(a={"type": "string", "pattern": "a(?=b)"})), r"'pattern' at #/properties/a"),
    ("json_schema", J({"oneOf": [S, {"type": "string"}]}), "'oneOf' at #"),
    ("json_schema", J({"type": "text"}), "'type' at #"),
    ("json_schema", J({"minimum": 3, "exclusiveMinimum": True}), "exclusiveMinimum: must be a number"),
    ("json_schema", J({"maxItems": -1}), "maxItems"),
    ("json_schema", J({"type": "object", "required": True}), "required"),
    ("json_schema", J({"type": "integer", "minimum": 5, "maximum": 4}), "minimum"),
    ("json_schema", J({"$ref": "https://example.org/s.json"}), r"\$ref: .*nothing is fetched"),
    ("json_schema", J({"$ref": "file:///etc/passwd"}), r"\$ref"),
    ("json_schema", J({"$ref": "#/$defs/none"}), r"\$ref: there is nothing at"),
    ("json_schema", J({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "leads back"),
    ("json_schema", J({"$ref": "#"}), r"\$ref"),
    ("json_schema", J({"x-guidance": {"lenient": True}, "not": S}), "x-guidance"),
    ("json_schema", J(obj(a={"x-guidance": {"lenient": True}, "not": S})), "x-guidance"),
    ("json_schema", "false", "false"),
    ("json_schema", "{", "not valid JSON"),
    ("json_schema", "[]", "must be an object"),
    ("json_schema", '{"minimum": NaN}', "NaN"),
    ("json_schema", "[" * 100_000, "nested"),
    ("json_schema", J(nested(65)), "nested"),
    ("json_schema", J({"type": "array", "items": I, "minItems": 10**9}), "minItems"),
    ("json_schema", J({"type": "string", "minLength": 10**9}), "minLength"),
    ("json_schema", J({"type": "integer", "multipleOf": 99_999_989}), "multipleOf"),
    ("json_schema", J({"type": "integer", "maximum": 10**300}), "maximum"),
    ("json_schema", J({"enum": list(range(10_000))}), "enum"),
    ("json_schema", J({"properties": {f"p{i}": S for i in range(3000)}}), "properties"),
    ("json_schema", refs(300), r"\$ref"),
    ("json_schema", J({"allOf": [{"anyOf": [{"minLength": 2 * i}, {"minLength": 2 * i + 1}]} for i in range(20)]}), "'allOf'"),
    ("json_schema", J({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(20)]}), "'pattern'"),
    ("regex", "a" * 9000, "8,192"),
    ("regex", "(", "(?s)regex: .*unclosed"),
    ("regex", "a(?=b)", "look-around"),
    ("regex", "(" * 3000 + ")" * 3000, "regex"),
    ("regex", "((((x{1,100}){1,100}){1,100}){1,100}){1,100}", "too complex"),
    ("regex", "(a*)*" * 1000, "too complex"),
    ("choice", "[]", "1 to 4,096 strings"),
    ("choice", "[1]", "strings"),
    ("choice", '["\\ud800"]', "surrogates"),
    ("choice", J([str(i) for i in range(5000)]), "4,096"),
    ("grammar", "start: nothing", "nothing"),
    ("grammar", "start: a\na: b\nb: a", "too complex"),
    ("grammar", "start: A\nA: B\nB: A", "circular"),
    ("grammar", "start: <|nobody|>", "unknown special token"),
    ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
    ("grammar", chain(4000, "r{0}: r{1}", '\nr{}: "a"'), "too complex"),
    ("grammar", chain(60, "T{0}: T{1} T{1}", '\nT{}: "a"').replace("r0", "T0"), "too big|too complex"),
    ("grammar", "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(20)), "too complex|fuel"),
    ("grammar", 'start: %json {"not": {}, "x-guidance": {"lenient": true}}', "x-guidance"),
    ("grammar", 'start: %json {"not": {}}', "not"),
    ("grammar", "start: %json {", "not valid JSON"),
    ("grammar", 'root ::= "a', "GBNF"),
    ("grammar", 'root ::= r0\n' + "\n".join(f"r{i} ::= r{i + 1}" for i in range(3500)) + '\nr3500 ::= "a"', "grammar"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_kept_is_refused_with_its_reason(grammars: Grammars, kind: Any, text: str, says: str) -> None:
    """In a process that goes on, in bounded time: the guard is generous, what it would catch does not end at all."""
    start = time.monotonic()
    with pytest.raises(RequestError, match=says) as found:
        grammars.compile(Constraint(kind, text))
    assert len(str(found.value)) < 2500
    assert time.monotonic() - start < 60, "compilation is not bounded"
    with pytest.raises(RequestError, match=says):
        grammars.compile(Constraint(kind, text))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", J({"type": "array", "items": I, "maxItems": 10**9})),
        ("json_schema", J({"type": "string", "maxLength": 10**9})),
        (
            "json_schema",
            J(
                {
                    "$defs": {"t": obj(v=I, next={"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]})},
                    "$ref": "#/$defs/t",
                }
            ),
        ),
        ("json_schema", J({"enum": [f"value {i}" for i in range(4000)]})),
        ("json_schema", J({"properties": {"x-guidance": S, "not": I}})),
        ("json_schema", "true"),
        ("choice", J([f"option {i}" for i in range(4096)])),
        ("grammar", 'start: start "a" | "a"'),
        ("grammar", 'start: start start | "a" | ""'),
        ("grammar", 'root ::= root "a" | "a"'),
        ("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"'),
        ("grammar", "start: ((((r{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}\n" + 'r: "a" | r "b"'),
        ("regex", "(.*)a.{200}"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_large_but_harmless(grammars: Grammars, kind: Any, text: str) -> None:
    matcher = grammars.compile(Constraint(kind, text)).matcher()
    assert Mask(matcher, grammars.n_vocab)
    assert not matcher.is_error()


def test_the_helper_process_is_replaced_when_lost_and_ended_on_close() -> None:
    trial = Trial(["<|call|>"])
    good, endless = 'start: <|call|> "a"', "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(40))
    assert trial.why_not(good) is None
    first = trial._helper
    assert first is not None
    assert "too complex" in (trial.why_not(endless) or "")
    assert first.poll() is not None
    assert trial.why_not(good) is None
    assert trial._helper is not None
    trial._helper.kill()
    trial._helper.wait()
    assert trial.why_not(good) is None
    last = trial._helper
    trial.close()
    assert last.poll() is not None


def test_compiled_grammars_are_kept_and_bounded(grammars: Grammars) -> None:
    a = grammars.compile(Constraint("choice", '["first"]'))
    assert grammars.compile(Constraint("choice", '["first"]')) is a
    for i in range(200):
        grammars.compile(Constraint("choice", f'["{i}"]'))
    assert len(grammars._kept) <= 128
    assert grammars.compile(Constraint("choice", '["first"]')) is not a


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [("xml", "a", "kind"), ("regex", "", "needs a text"), ("json_object", "{}", "takes no text"),
     ("regex", "a" * (1 << 19), "bytes"), ("choice", "\ud800", "surrogates"), ("regex", b"a", "string")],
)  # fmt: skip
def test_constraints_are_checked_when_made(kind: Any, text: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Constraint(kind, text)
    with pytest.raises(RequestError, match="constraint: must be a Constraint"):
        SamplingParams(constraint="[a-z]")  # type: ignore[arg-type]


def test_without_the_technique_or_a_tokenizer_requests_are_refused(model: Any, llm: LLM) -> None:
    c = Constraint("regex", "a+")
    with (
        LLM("lab-1m", context=128, use=["no:output/llguidance"]) as plain,
        pytest.raises(RequestError, match="switched off"),
    ):
        plain.generate("a", GREEDY.with_(constraint=c))
    for parts, says in ((Parts(), "switched off"), (Parts(logits=[Masks(None, frozenset({1}))]), "no tokenizer")):
        engine = tiny_engine(model, parts=parts)
        with pytest.raises(RequestError, match=says):
            engine.add(request("a", [1, 2], constraint=c))
        engine.add(request("b", [1, 2], max_tokens=2))
    with pytest.raises(RequestError, match="no end token"):
        Masks(llm.tokenizer, frozenset({1 << 20})).grammars.compile(c)  # type: ignore[union-attr]
    with pytest.raises(RequestError, match=r"logit_bias: .*; regex: "):
        llm.generate("a", GREEDY.with_(constraint=Constraint("regex", "("), logit_bias={1 << 20: 1.0}))


# --- masks of every kind of vocabulary ------------------------------------------------------------


@pytest.mark.parametrize("name", ["lab", "llama2-fixed", "gpt-neox-20b", "llama3.2"])
def test_masks_are_those_of_brute_force(name: str, request: pytest.FixtureRequest) -> None:
    """Every token that stands for bytes with which one of the texts goes on, and no other; the end exactly at the end."""
    if name == "lab":
        folder = lab.path("lab-8m")
    else:
        folder = request.getfixturevalue("shared") / "tokenizers" / name
    tokenizer = Tokenizer.from_folder(Path(folder), **({"pre": "llama-bpe"} if name == "llama3.2" else {}))
    n = tokenizer.n_vocab
    eos = min(tokenizer.ends, default=n - 1)
    grammars = Grammars(tokenizer, frozenset({eos}))
    texts = ["hello world", "hello there", "help", "über 漢字 😀", "<s>", "12345", "  x", "he"]
    pieces = [b"" if t in tokenizer.special_ids or t == eos else tokenizer.token_bytes(t) for t in range(n)]
    matcher = grammars.compile(Constraint("choice", json.dumps(texts))).matcher()
    rng = random.Random(2)
    for text in texts:
        whole, at = text.encode(), 0
        n_taken = 0
        while True:
            rest = [t.encode()[at:] for t in texts if t.encode()[:at] == whole[:at]]
            want = {i for i, p in enumerate(pieces) if p and any(r.startswith(p) for r in rest)}
            want |= {eos} if b"" in rest else set()
            assert set(Mask(matcher, n).tokens().tolist()) == want
            if at == len(whole):
                break
            token = rng.choice([i for i in want if i != eos and whole[at:].startswith(pieces[i])])
            assert matcher.consume_token(token)
            at += len(pieces[token])
            n_taken += 1
        assert matcher.rollback(n_taken)
    grammars.close()


def test_sequences_of_schemas_do_not_disturb_one_another(llm: LLM) -> None:
    """The same schema by several sequences at once, of which some are aborted."""
    c = constraint(SCHEMAS[0])
    want = {seed: llm.generate(PROMPT, sampled(seed, c))[0].token_ids for seed in range(4)}
    ids = [llm.submit(PROMPT, sampled(seed % 4, c)) for seed in range(8)]
    outputs: dict[str, Output] = {}
    for step in itertools.count():
        if step == 3:
            llm.engine.abort(ids[5])
        outputs.update({o.id: o for o in llm.engine.step()[1]})
        if not llm.engine.has_work:
            break
    outputs.update({o.id: o for o in llm.engine.step()[1]})
    for i, name in enumerate(ids):
        if i != 5:
            assert outputs[name].token_ids == want[i % 4]
