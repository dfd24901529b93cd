"""The fields by which clients say how tokens are chosen: OpenAI's, and those that vLLM added and its clients send."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from paceline.core.errors import RequestError
from paceline.core.types import Constraint, ConstraintKind, SamplingParams
from paceline.server.answer import one_field
from paceline.server.errors import ApiError
from paceline.server.models import Model
from paceline.server.schema import Body, bad_fields
from paceline.server.settings import Bounds

Stop = str | list[str] | None
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_usage: one more chunk with the usage. continuous_usage_stats: usage so far in every chunk (vLLM)."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None  # OpenAI's padding against traffic analysis: only its absence is supported


class Structured(msgspec.Struct, forbid_unknown_fields=True, rename={"schema": "json"}):
    """vLLM's structured_outputs: exactly one of these."""

    schema: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: str = "answer"
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class Format(msgspec.Struct, forbid_unknown_fields=True):
    """response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body, kw_only=True):
    """Common to completions and chat."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    n: int | None = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_token_ids: bool = False
    structured_outputs: Structured | None = None
    response_format: Format | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Count = 0
    cache_salt: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    user: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    use_beam_search: Literal[False] | None = None
    best_of: Literal[1] | None = None


_PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "seed",
          "logit_bias", "stop_token_ids", "min_tokens", "ignore_eos", "skip_special_tokens", "prompt_logprobs")  # fmt: skip


def params(body: Sampling, model: Model, bounds: Bounds, **more: Any) -> SamplingParams:
    """How to sample for a request: what it says, else what the model recommends. more: fields that the API spells its own way.

    Raises ApiError 400 naming everything that is wrong.
    """
    given = {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
    if given.get("top_k") == -1:  # vLLM's word for all
        given["top_k"] = 0
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.include_stop_str_in_output is not None:
        given["include_stop"] = body.include_stop_str_in_output
    if (constraint := constrained(body)) is not None:
        given["constraint"] = constraint
    given |= {name: value for name, value in more.items() if value is not None}
    problems: list[tuple[str | None, str]] = []
    for name, most in (
        ("n", bounds.max_n),
        ("logprobs", bounds.max_top_logprobs),
        ("prompt_logprobs", bounds.max_top_logprobs),
    ):
        if isinstance(given.get(name), int) and given[name] > most:
            problems.append((name, f"{name} = {given[name]}: at most {most} on this server"))
    if bounds.max_output_tokens is not None:
        asked = given.get("max_tokens")
        if asked is not None and asked > bounds.max_output_tokens:
            problems.append(("max_tokens", f"max_tokens = {asked}: at most {bounds.max_output_tokens} on this server"))
        given.setdefault("max_tokens", bounds.max_output_tokens)
    try:
        made = model.front.defaults.with_(**given)
    except RequestError as e:
        problems.append((one_field(e).param, str(e)))
    if problems:
        raise bad_fields(problems)
    return made


def constrained(body: Sampling) -> Constraint | None:
    """What the answer must be of, by response_format or structured_outputs. Raises ApiError when they contradict each other."""
    found = [c for c in (_of_format(body.response_format), _of_structured(body.structured_outputs)) if c is not None]
    if len(found) > 1:
        raise ApiError(
            400,
            "structured_outputs: response_format constrains the answer already; give one",
            param="structured_outputs",
        )
    return found[0] if found else None


def _of_format(form: Format | None) -> Constraint | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return _made("response_format", "json_object", "")
    if form.json_schema is None or form.json_schema.schema is None:
        raise ApiError(400, "response_format.json_schema.schema: is missing", param="response_format")
    return _made("response_format", "json_schema", msgspec.json.encode(form.json_schema.schema).decode())


def _of_structured(s: Structured | None) -> Constraint | None:
    if s is None:
        return None
    given = [k for k in ("schema", "regex", "choice", "grammar", "json_object") if getattr(s, k) not in (None, False)]
    if len(given) != 1:
        raise ApiError(
            400,
            "structured_outputs: give exactly one of json, regex, choice, grammar, json_object",
            param="structured_outputs",
        )
    kind = given[0]
    value = getattr(s, kind)
    if kind == "schema":
        return _made(
            "structured_outputs",
            "json_schema",
            value if isinstance(value, str) else msgspec.json.encode(value).decode(),
        )
    if kind == "choice":
        return _made("structured_outputs", "choice", msgspec.json.encode(value).decode())
    if kind == "json_object":
        return _made("structured_outputs", "json_object", "")
    return _made("structured_outputs", "regex" if kind == "regex" else "grammar", value)


def _made(field: str, kind: ConstraintKind, text: str) -> Constraint:
    try:
        return Constraint(kind, text)
    except RequestError as e:
        raise ApiError(400, f"{field}: {str(e).removeprefix('constraint: ')}", param=field) from None
