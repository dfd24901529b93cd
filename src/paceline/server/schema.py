"""JSON bodies to typed requests, with every problem named at once, and the same types as an OpenAPI document."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any, TypeVar, get_type_hints

import msgspec

from paceline.server.errors import ANTHROPIC, ApiError

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r" - at `(\$[^`]*)`$")
MAX_PROBLEMS = 20


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of request bodies: a field that is not listed is refused by name."""


@functools.cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


def parse(body: bytes, kind: type[T]) -> T:
    """The typed request in a body. Raises ApiError 400 naming every field that is wrong."""
    try:
        return _decoder(kind).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        problems = _problems(body, kind, e)
    raise bad_fields(problems)


def _problems(body: bytes, kind: type[T], e: Exception) -> list[tuple[str | None, str]]:
    """What is wrong with a body that could not be decoded. The decoder stops at the first error, so worse may come after it."""
    if isinstance(e, msgspec.ValidationError):
        try:
            return _all_problems(body, kind) or [problem_of(str(e))]
        except msgspec.ValidationError:  # a number that no type has room for
            return [problem_of(str(e))]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as worse:
            e = worse
    if isinstance(e, RecursionError):
        return [(None, "body: is nested too deeply")]
    return [(None, f"body: is not valid JSON ({e})")]


def bad_fields(problems: Iterable[tuple[str | None, str]]) -> ApiError:
    """400 for (field, text) pairs; `param` is the first of the fields."""
    told = list(problems)
    texts = [text for _, text in told[:MAX_PROBLEMS]]
    if len(told) > MAX_PROBLEMS:
        texts.append("and more")
    return ApiError(400, "; ".join(texts), param=next((field for field, _ in told if field), None))


def _all_problems(body: bytes, kind: type[T]) -> list[tuple[str | None, str]]:
    """Each field on its own, since the decoder stops at the first."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.ValidationError:  # a number that no type could hold
        return []
    if not isinstance(found, dict):
        return [(None, "body: must be a JSON object")]
    hints = get_type_hints(kind, include_extras=True)
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    problems: list[tuple[str | None, str]] = []
    for name, value in found.items():
        if len(problems) > MAX_PROBLEMS:  # enough to be told; a body has room for millions
            break
        if name not in fields:
            problems.append((name, f"{name[:100]}: is not supported by this endpoint; leave it out"))
            continue
        hint = hints[fields[name].name]
        try:
            msgspec.convert(value, hint, str_keys=True)
        except msgspec.ValidationError as e:
            if hint is type(None):
                problems.append((name, f"{name}: is not supported by this server; leave it out"))
            else:
                problems.append(problem_of(str(e), name))
    problems += [(name, f"{name}: is missing") for name, f in fields.items() if f.required and name not in found]
    return problems


def problem_of(text: str, name: str = "") -> tuple[str | None, str]:
    """A decoder's message as (field, text)."""
    at = _AT.search(text)
    inner = at[1][1:] if at else ""
    field = (name + inner).lstrip(".")
    said = text[: at.start()] if at else text
    said = said[:1].lower() + said[1:]
    return field or None, f"{field}: {said}" if field else said


def openapi(routes: Iterable[Any], version: str) -> dict[str, Any]:
    """An OpenAPI 3.1 document. routes: objects with path, method, summary, body and answer types (`api.Route`)."""
    routes = list(routes)
    bodies = [r.body for r in routes if r.body is not None]
    schemas, components = msgspec.json.schema_components(
        [*bodies, *(r.answer for r in routes if r.answer is not None)], ref_template="#/components/schemas/{name}"
    )
    of_type = dict(zip([*bodies, *(r.answer for r in routes if r.answer is not None)], schemas, strict=True))
    components |= {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for r in routes:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", r.path)
        paths.setdefault(path, {})[r.method.lower()] = _operation(r, of_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Paceline", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(route: Any, of_type: dict[Any, Any]) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "The answer."}
    if route.answer is not None:
        ok["content"] = {"application/json": {"schema": of_type[route.answer]}}
        if route.streams:
            ok["content"]["text/event-stream"] = {"schema": _EVENT}
    elif route.media is not None:
        ok["content"] = {route.media: {"schema": {}}}
    shape = "AnthropicError" if route.path in ANTHROPIC else "Error"
    error = {
        "description": "What is wrong.",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}},
    }
    done: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        "summary": route.summary,
        "responses": {"200": ok, **{str(code): error for code in route.errors}},
    }
    names = re.findall(r"{(\w+)(?::\w+)?}", route.path)
    if names:
        done["parameters"] = [
            {"name": n, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for n in names
        ]
    if route.body is not None:
        done["requestBody"] = {"required": True, "content": {"application/json": {"schema": of_type[route.body]}}}
    return done


_EVENT = {  # of a stream, each on its own
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}
