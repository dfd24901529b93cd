"""A look at a JSON Schema before it is compiled: bounds, and keywords that the compiler would pass over in silence.

What is reported is reported with its place, as a JSON pointer. The meaning of the schema is the compiler's business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from paceline.core.errors import RequestError

MAX_DEPTH = 64  # levels of objects and arrays
MAX_SCHEMAS = 5_000
MAX_PROPERTIES = 2_000  # of all objects together, as with MAX_ENUM; compilation grows with their square
MAX_ENUM = 4_096
MAX_REFS = 256  # different targets; the compiler recurses once for each in a chain
MAX_PATTERN = 2_048  # characters of one pattern
MAX_PATTERNS = 256
MAX_COUNT = 100_000  # of minLength, minItems, ...: nobody writes so much
MAX_MULTIPLE = 10_000  # a multiple of n is recognised by an automaton of n states
MAX_ALL_OF = 64

_ONE = ("additionalProperties", "items", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
        "unevaluatedProperties", "additionalItems")  # fmt: skip
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Assertions of older drafts that the compiler takes for unknown words, which have no meaning.
_PASSED_OVER = ("extends", "disallow", "divisibleBy")
_LOWER_COUNTS = ("minLength", "minItems", "minProperties")
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def parse(text: str, name: str) -> Any:
    """JSON of bounded depth. Raises RequestError that begins with `name`."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise RequestError(f"{name}: is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as e:
        raise RequestError(f"{name}: is not valid JSON ({str(e)[:200]})") from e
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [c for v in level if isinstance(v, (dict, list)) for c in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return value
    raise RequestError(f"{name}: is nested more than {MAX_DEPTH} levels deep")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number of JSON")


def places(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema object within a schema, with its place: "#", "#/properties/a", ..."""
    todo: list[tuple[str, Any]] = [("#", schema)]
    while todo:
        at, s = todo.pop()
        if not isinstance(s, dict):
            continue
        yield at, s
        below: list[tuple[str, Any]] = [(f"{at}/{k}", s[k]) for k in _ONE if k in s]
        for k in _MANY:
            if isinstance(s.get(k), list):
                below += [(f"{at}/{k}/{i}", c) for i, c in enumerate(s[k])]
        for k in _NAMED:
            if isinstance(s.get(k), dict):
                below += [(f"{at}/{k}/{_escape(name)}", c) for name, c in s[k].items()]
        todo += reversed(below)


def check(schema: Any, name: str) -> None:
    """Raises RequestError with the keyword and its place for the first things wrong with a parsed schema."""
    if not isinstance(schema, (dict, bool)):
        raise RequestError(f"{name}: a JSON Schema must be an object or a boolean, found {type(schema).__name__}")
    problems: list[str] = []
    counts = dict.fromkeys(("schemas", "properties", "enum", "patterns"), 0)
    refs: set[str] = set()
    for at, s in places(schema):
        counts["schemas"] += 1
        problems += [f"{at}: {p}" for p in _problems(s, schema, counts, refs)]
        if len(problems) >= 5 or counts["schemas"] > MAX_SCHEMAS or len(refs) > MAX_REFS:
            break
    for what, most in (("schemas", MAX_SCHEMAS), ("properties", MAX_PROPERTIES), ("enum", MAX_ENUM),
                       ("patterns", MAX_PATTERNS)):  # fmt: skip
        if counts[what] > most:
            problems.append(f"{what}: more than the {most:,} that are accepted in all")
    if len(refs) > MAX_REFS:
        problems.append(f"$ref: more than the {MAX_REFS} different targets that are accepted")
    if problems:
        raise RequestError("; ".join(f"{name}: {p}" for p in problems[:5]))


def _problems(s: dict[str, Any], root: Any, counts: dict[str, int], refs: set[str]) -> Iterator[str]:
    for key in ("properties", "patternProperties"):
        if isinstance(s.get(key), dict):
            counts["properties"] += len(s[key])
    if isinstance(s.get("enum"), list):
        counts["enum"] += len(s["enum"])
    for key in _PASSED_OVER:
        if key in s:
            yield f"keyword {key!r} is not supported"
    if "additionalItems" in s and isinstance(s.get("items"), list):
        yield "keyword 'additionalItems' is not supported; write prefixItems and items"
    if "x-guidance" in s:
        yield "'x-guidance' is not accepted: how a schema is compiled is not for the request to say"
    if "$ref" in s:
        yield from _ref(s["$ref"], root, refs)
    if isinstance(s.get("allOf"), list) and len(s["allOf"]) > MAX_ALL_OF:
        yield f"allOf: {len(s['allOf'])} schemas, more than the {MAX_ALL_OF} that are accepted"
    yield from _numbers(s)
    for pattern in (
        s.get("pattern"),
        *(s["patternProperties"] if isinstance(s.get("patternProperties"), dict) else ()),
    ):
        if isinstance(pattern, str):
            counts["patterns"] += 1
            if len(pattern) > MAX_PATTERN:
                yield f"pattern: {len(pattern)} characters, more than the {MAX_PATTERN:,} that are accepted"


def _numbers(s: dict[str, Any]) -> Iterator[str]:
    for key in _LOWER_COUNTS:
        if _is_number(s.get(key)) and s[key] > MAX_COUNT:
            yield f"{key}: {str(s[key])[:40]} is more than the {MAX_COUNT:,} that are accepted"
    for key in _LIMITS:
        value = s.get(key)
        if value is None:
            continue
        if not _is_number(value):
            yield f"{key}: must be a number, found {value!r:.40}"
        elif abs(value) >= 1 << 53 and key != "multipleOf":
            yield f"{key}: {str(value)[:40]} is beyond the integers that JSON readers agree on (2^53)"
    multiple = s.get("multipleOf")
    if _is_number(multiple) and not (1e-9 <= multiple <= MAX_MULTIPLE):
        yield f"multipleOf: {str(multiple)[:40]} is not from 1e-9 to {MAX_MULTIPLE:,}"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _ref(ref: Any, root: Any, refs: set[str]) -> Iterator[str]:
    """References go to a place in the same schema, and arrive: a ring of them would have no meaning."""
    seen: set[str] = set()
    while True:
        if not isinstance(ref, str) or not re.fullmatch(r"#(/.*)?", ref):
            yield f"$ref: {ref!r:.80} is not a place in this schema (#/...); nothing is fetched"
            return
        refs.add(ref)
        if len(seen) > MAX_REFS:
            return  # reported with all the targets
        if ref in seen:
            yield f"$ref: {ref!r:.80} leads back to itself"
            return
        seen.add(ref)
        found, target = _resolve(root, ref)
        if not found:
            yield f"$ref: there is nothing at {ref!r:.80}"
            return
        if not isinstance(target, dict) or "$ref" not in target:
            return
        ref = target["$ref"]


def _resolve(root: Any, ref: str) -> tuple[bool, Any]:
    for step in ref.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, dict) and key in root:
            root = root[key]
        elif isinstance(root, list) and key.isdecimal() and int(key) < len(root):
            root = root[int(key)]
        else:
            return False, None
    return True, root


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


# --- what the compiler says -----------------------------------------------------------------------

_KEYS = re.compile(r"Unimplemented keys: \[(.*?)\]")
_CULPRITS = (
    (re.compile(r"oneOf"), ("oneOf",)),
    (re.compile(r"Unknown format: (?P<value>.*)"), ("format",)),
    (re.compile(r"patternProperty"), ("patternProperties",)),
    (re.compile(r"regex parse error|look-around|invalid regex"), ("pattern", "patternProperties")),
    (re.compile(r"(integer|float) range|minimum|multiple"), _LIMITS),
    (re.compile(r"anyOf is empty"), ("anyOf", "enum", "type")),
    (re.compile(r"Invalid type"), ("type",)),
    (re.compile(r"Pointer|Resource"), ("$ref",)),
    (re.compile(r"for '(?P<key>[^']+)'"), ()),
    (re.compile(r"minLength|maxLength"), ("minLength", "maxLength")),
    (re.compile(r"minItems|maxItems"), ("minItems", "maxItems")),
    (re.compile(r"minProperties|maxProperties"), ("minProperties", "maxProperties")),
    (re.compile(r"required property"), ("required",)),
    (re.compile(r"incompatible types|type"), ("type", "const", "enum", "allOf")),
    (re.compile(r"schema is false"), ("additionalProperties", "items", "properties", "allOf")),
    (re.compile(r"schema too large"), ("allOf", "anyOf", "oneOf")),
    (re.compile(r"fuel|too big|too complex|too many"), ("pattern", "enum", "allOf", "multipleOf", "properties")),
)


def explain(error: str, schema: Any) -> str:
    """The compiler's complaint, with the keywords it concerns and where the schema has them."""
    found = _KEYS.search(error)
    if found is not None:
        keys = re.findall(r'"([^"]+)"', found[1])
        return "; ".join(f"{_first(schema, k)}: keyword {k!r} is not supported" for k in keys)
    for pattern, candidates in _CULPRITS:
        match = pattern.search(error)
        if match is None:
            continue
        groups = match.groupdict()
        keys = [groups["key"]] if groups.get("key") else [k for k in candidates if _first(schema, k, groups) != "#?"]
        if keys:
            where = ", ".join(f"{k!r} at {_first(schema, k, groups)}" for k in keys)
            return f"{where}: {error}"
    return error


def _first(schema: Any, key: str, groups: dict[str, str] | None = None) -> str:
    """The first place that has `key`, with the value in question if there is one; "#?" when none has."""
    value = (groups or {}).get("value")
    for at, s in places(schema):
        if key in s and (value is None or s[key] == value):
            return at
    return "#?"
