"""Grammars, in llguidance's Lark, that let a model write well-formed calls only, with arguments of the right schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llguidance

from paceline.core.errors import RequestError
from paceline.core.types import Constraint

if TYPE_CHECKING:
    from paceline.server.dialects.base import Parser
    from paceline.server.dialects.reasoning import Tags

MAX_TOOLS = 128
MAX_CALLS = 128  # of one answer
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Form:
    """How calls are written: first, then for each call head, name, middle, arguments, tail, then last.

    quoted: the name is a JSON string. trigger: the marker with which a call begins; None: calls are the whole answer.
    tag: a special token that may come before all.
    """

    head: str
    middle: str
    tail: str
    first: str = ""
    between: str = ""
    last: str = ""
    quoted: bool = True
    trigger: str | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Function:
    """A function that may be called. parameters: the JSON schema of its arguments, an object's."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


def functions(tools: Any) -> list[Function]:
    """The functions in a request's `tools`. Raises RequestError with all that is wrong."""
    if tools is None:
        return []
    if not isinstance(tools, (list, tuple)) or len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: must be a list of at most {MAX_TOOLS} functions")
    problems: list[str] = []
    found = [f for i, tool in enumerate(tools) if (f := _function(tool, f"tools[{i}]", problems))]
    twice = {f.name for f in found if sum(g.name == f.name for g in found) > 1}
    problems += [f"tools: the name {name!r} is given twice" for name in sorted(twice)]
    if problems:
        raise RequestError("; ".join(problems[:8]))
    return found


def _function(tool: Any, where: str, problems: list[str]) -> Function | None:
    body = tool.get("function") if isinstance(tool, Mapping) and tool.get("type", "function") == "function" else None
    if not isinstance(body, Mapping):
        problems.append(f'{where}: must be {{"type": "function", "function": {{...}}}}; other tools are not supported')
        return None
    name, strict = body.get("name"), body.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"{where}.function.name = {name!r:.80}: must be 1 to 128 letters, digits or any of _ . : -")
        return None
    if strict not in (None, True, False):
        problems.append(f"{where}.function.strict = {strict!r:.80}: must be true or false")
    parameters = body.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        problems.append(f"{where}.function.parameters: must be the JSON schema of an object")
        return None
    return Function(name, parameters, bool(strict))


def chosen(functions: Sequence[Function], tool_choice: Any) -> tuple[Sequence[Function], bool]:
    """The functions that `tool_choice` allows, and whether one must be called. Raises RequestError."""
    if tool_choice is None:
        tool_choice = "auto" if functions else "none"
    if tool_choice == "none":
        return [], False
    if isinstance(tool_choice, str) and tool_choice in _CHOICES:
        if tool_choice == "required" and not functions:
            raise RequestError("tool_choice = 'required': needs tools to choose from")
        return functions, tool_choice == "required"
    body = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not isinstance(body, Mapping) or tool_choice.get("type") != "function" or not isinstance(body.get("name"), str):
        raise RequestError(
            f"tool_choice = {tool_choice!r:.80}: must be none, auto, required or "
            '{"type": "function", "function": {"name": ...}}'
        )
    named = [f for f in functions if f.name == body["name"]]
    if not named:
        raise RequestError(f"tool_choice.function.name = {body['name']!r:.80}: is not among the tools")
    return named, True


def constraint(
    dialect: type[Parser],
    functions: Sequence[Function],
    tool_choice: Any = None,
    *,
    parallel: bool = True,
    tokens: Mapping[str, int] | None = None,
    tags: Tags | None = None,
    inside: bool = False,
) -> str | None:
    """The Lark grammar of an answer, or None when it is free.

    It is not free when a call is required, and when a function that may be called is strict: then text is free, and
    calls follow their schemas. A named function is called once; `parallel` allows several calls otherwise.
    tokens: the tokenizer's added tokens and their ids (`added`). tags, inside: how the model marks its thoughts, which stay
    free, and whether the prompt has opened them.
    Raises RequestError when calls cannot be constrained in this dialect, and for a bad `tool_choice`.
    """
    allowed, required = chosen(functions, tool_choice)
    if not required and not any(f.strict for f in allowed):
        return None
    tokens = tokens or {}
    parallel = parallel and not isinstance(tool_choice, Mapping)
    form = dialect.form(parallel, tokens)
    if form is None:
        raise RequestError(
            "tools: this model has no known format for calls; choose one with the option for the tool dialect"
        )
    but = f" & ~/\\s*{_regex(tags.open)}(?s:.*)/" if tags and not inside else ""  # thoughts are no free text
    rules = [f"answer: {_calls(form, parallel, tokens)}"] if required else _free(form, parallel, tokens, but)
    skip = 0 if required or form.first else len(form.trigger or "")
    for i, function in enumerate(allowed):
        name = json.dumps(function.name) if form.quoted else function.name
        head = (form.head + name + form.middle)[skip:]
        rules.append(f"call_{i}: {_literal(head, tokens)} arguments_{i} {_literal(form.tail, tokens)}")
        rules.append(f"arguments_{i}: %json {_schema(function)}")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(allowed))))
    thoughts = list(_thoughts(tags, inside, tokens))
    return "\n".join([f"start: {'thoughts ' if thoughts else ''}answer", *thoughts, *rules]) + "\n"


def after_thoughts(constraint: Constraint, tags: Tags, inside: bool, tokens: Mapping[str, int]) -> Constraint:
    """The same constraint for a model that may think first: thoughts stay free, what follows them is held to it.

    tags, inside, tokens: as for `constraint`. Raises RequestError for a grammar of the client's, whose rules could meet ours.
    """
    answer = _whole(constraint)
    if answer is None and not inside:
        return constraint
    if answer is None:
        raise RequestError(
            "structured_outputs.grammar: cannot follow thoughts, which this prompt has opened; switch them off "
            '(chat_template_kwargs {"enable_thinking": false}), or use json, regex or choice'
        )
    rules = ["start: thoughts answer", *_thoughts(tags, inside, tokens), *answer]
    return Constraint("grammar", "\n".join(rules) + "\n")


def _whole(constraint: Constraint) -> list[str] | None:
    """The rule `answer` for a constraint; None for a grammar, which has rules of its own."""
    kind, text = constraint.kind, constraint.text
    if kind == "json_object":
        return ['answer: %json {"type": "object"}']
    if kind == "json_schema":
        return [f"answer: %json {text}"]
    if kind == "regex":
        return [f"answer: WHOLE\nWHOLE: /{llguidance.regex_to_lark(text, 'd')}/"]
    if kind == "choice":
        return ["answer: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in json.loads(text))]
    return None


def _calls(form: Form, parallel: bool, tokens: Mapping[str, int], skip: int = 0) -> str:
    """All calls, without the first `skip` characters."""
    more = f"({_literal(form.between, tokens)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    tag = f"{_literal(form.tag, tokens)}?" if form.tag and form.tag in tokens else ""
    return f"{tag} {_literal(form.first[skip:], tokens)} call {more} {_literal(form.last, tokens)}"


def _free(form: Form, parallel: bool, tokens: Mapping[str, int], but: str) -> list[str]:
    """Text, and calls that obey their schemas: after the trigger there is no way but a call. but: what is no text."""
    if form.trigger is None:
        return [f"answer: PLAIN? | {_calls(form, parallel, tokens)}", rf"PLAIN: /\s*[^\s{{\[](?s:.*)/{but}"]
    trigger = _regex(form.trigger)
    calls = _calls(form, parallel, tokens, len(form.trigger)) if form.first else "call"
    lead = f"(lead | REST <[{tokens[form.trigger]}]>)" if form.trigger in tokens else "lead"
    return [
        f"answer: ({lead} {calls}){'*' if parallel else '?'} REST",
        "lead[lazy]: LEAD",
        f"LEAD: /(?s:.*){trigger}/{but}",
        f"REST: /(?s:.*)/ & ~/(?s:.*){trigger}(?s:.*)/{but}",
    ]


def _thoughts(tags: Tags | None, inside: bool, tokens: Mapping[str, int]) -> Iterator[str]:
    if tags is None:
        return
    yield f"thoughts: {'thought' if inside else f'({_literal(tags.open, tokens)} thought)?'}"
    end = ""
    if tags.close in tokens:
        others = ",".join(str(i) for mark, i in tokens.items() if mark != tags.close)  # may be thought of as well
        end = f" | FREE {f'(<[{others}]> FREE)* ' if others else ''}<[{tokens[tags.close]}]>"
        yield "FREE: /(?s:.*)/"
    yield f"thought: (thinking{end}) /\\n{{0,4}}/"
    yield f"thinking[lazy]: /(?s:.*){_regex(tags.close)}/"


def _literal(text: str, tokens: Mapping[str, int]) -> str:
    """`text` in Lark; an added token in it is written as such or spelled.

    Both, because llguidance takes some added tokens for special ones, which are not text to it, that are none.
    """
    marks = [m for m in tokens if m in text]
    if not marks:
        return json.dumps(text, ensure_ascii=False) if text else ""
    mark = min(marks, key=lambda m: (text.index(m), -len(m)))
    before, after = text.split(mark, 1)
    either = f"(<[{tokens[mark]}]> | {json.dumps(mark, ensure_ascii=False)})"
    return f"{_literal(before, tokens)} {either} {_literal(after, tokens)}".strip()


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _schema(function: Function) -> str:
    """A keyword that cannot be kept to is an error, told when the grammar is compiled."""
    try:
        return json.dumps({**function.parameters, "type": "object"}, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as e:
        raise RequestError(f"tools: the parameters of {function.name} are no JSON schema ({str(e)[:80]})") from e
