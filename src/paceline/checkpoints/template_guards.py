"""The operators, filters and methods that chat templates have, each with what it costs.

A guard pays for an upper bound of its operation's work and result, so that the operation itself needs no supervision;
what has no guard is not available.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sized
from typing import Any

from jinja2.runtime import Undefined
from markupsafe import Markup

from paceline.checkpoints.template_meter import MAX_INT_BITS, Meter, contents, small, width_of, widths_in
from paceline.core.errors import TemplateError

# --- operators -----------------------------------------------------------------------------------


def _check_percent(meter: Meter, form: str, values: Any) -> None:
    if re.search(r"%[^a-zA-Z%]*\*", form):
        raise TemplateError("chat template: a % format may not take its width from an argument")
    pad = widths_in(form, "a % format")
    n = meter.text(values)
    meter.write(len(form) + pad + max(1, form.count("%")) * n)


def check_binop(meter: Meter, op: str, a: Any, b: Any) -> None:
    meter.step()
    for x in (a, b):
        if isinstance(x, int):
            small(x)
    if isinstance(a, str) and op == "%":
        _check_percent(meter, str(a), b)
    elif op == "*":
        for seq, n in ((a, b), (b, a)):
            if isinstance(seq, (str, list, tuple)) and isinstance(n, int):
                total = len(seq) * max(0, n)
                (meter.write if isinstance(seq, str) else meter.step)(total)
    elif op == "+" and isinstance(a, str) and isinstance(b, str):
        meter.write(
            len(a) + (6 * len(b) if isinstance(a, Markup) else len(b)) + (5 * len(a) if isinstance(b, Markup) else 0)
        )
    elif op == "**":
        bits = abs(a).bit_length() if isinstance(a, int) else 0
        if bits and isinstance(b, int) and bits * b > MAX_INT_BITS:
            raise TemplateError(f"chat template: {bits}-bit integer to the power of {b} is too large")
    elif isinstance(a, Sized) and not isinstance(a, (str, Undefined)):
        meter.weigh(a)
        meter.weigh(b)


# --- filters -------------------------------------------------------------------------------------

Guard = Callable[[Meter, Any, tuple[Any, ...], dict[str, Any]], Any]


def _arg(args: tuple[Any, ...], kwargs: Mapping[str, Any], i: int, name: str, default: Any) -> Any:
    return args[i] if len(args) > i else kwargs.get(name, default)


def free(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return value


def _shallow(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return meter.elements(value)


def _deep(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = meter.drain(value)
    meter.weigh(args)
    meter.weigh(kwargs)
    meter.weigh(value)
    return value


def _printed(factor: int) -> Guard:
    """For filters that take `str(value)` and answer with at most `factor` times its length."""

    def guard(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        meter.weigh(args)
        meter.weigh(kwargs)
        meter.write(factor * meter.text(value))
        return value

    return guard


def _sorting(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = _deep(meter, value, args, kwargs)
    n = len(value) if isinstance(value, Sized) and not isinstance(value, Undefined) else 0
    for _ in range(n.bit_length()):
        meter.weigh(value)
    return value


def _summing(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(_arg(args, kwargs, 1, "start", 0), (int, float)):
        raise TemplateError("chat template: sum() of anything but numbers is not supported")
    return _deep(meter, value, args, kwargs)


def _joining(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = _deep(meter, value, args, kwargs)
    between = _arg(args, kwargs, 0, "d", "")
    n = len(value) if isinstance(value, Sized) and not isinstance(value, Undefined) else 0
    meter.write(meter.text(value) + n * (len(between) if isinstance(between, str) else meter.text(between)))
    return value


def _padding(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    meter.write(meter.text(value) + width_of(_arg(args, kwargs, 0, "width", 80), "center's width"))
    return value


def _indenting(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    width = _arg(args, kwargs, 0, "width", 4)
    n = len(width) if isinstance(width, str) else width_of(width, "indent's width")
    lines = 2 + (len(value.splitlines()) if isinstance(value, str) else 0)
    meter.write(meter.text(value) + n * lines)
    return value


def _grown(meter: Meter, text: str, old: Any, new: Any, count: Any) -> None:
    """Pay for replacing `old` by `new` in `text`."""
    if not isinstance(old, str) or not isinstance(new, str):
        old, new = str(old) if meter.text(old) >= 0 else "", str(new) if meter.text(new) >= 0 else ""
    meter.read(len(text))
    n = text.count(old) if old else len(text) + 1
    if isinstance(count, int) and count >= 0:
        n = min(n, count)
    meter.write(len(text) + n * max(0, 6 * len(new) - len(old)))


def _replacing(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    meter.text(value)
    old, new = _arg(args, kwargs, 0, "old", ""), _arg(args, kwargs, 1, "new", "")
    _grown(meter, str(value), old, new, _arg(args, kwargs, 2, "count", None))
    return value


def _batching(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    n = next(iter(args), kwargs.get("linecount", kwargs.get("slices", 0)))
    if isinstance(n, int):
        meter.step(abs(n))
    return meter.elements(value)


def _formatting(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    meter.text(value)
    _check_percent(meter, str(value), (args, kwargs))
    return value


def _rounding(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    precision = _arg(args, kwargs, 0, "precision", 0)
    if isinstance(precision, int) and abs(precision) > 300:
        raise TemplateError(f"chat template: round's precision {precision} is beyond 300")
    meter.weigh(value)
    return value


def _number(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    meter.weigh(value)
    return str(value)[:2000] if isinstance(value, str) and len(value) > 2000 else value


def _json_size(meter: Meter, value: Any, indent: int) -> None:
    """Pay for the JSON of `value`, whose indentation grows with the depth."""
    stack = [(value, 1)]
    total = 0
    while stack:
        v, depth = stack.pop()
        total += indent * depth + (6 * len(v) + 4 if isinstance(v, str) else 32)
        inner = contents(v)
        if isinstance(v, int):
            total += small(v).bit_length() // 3
        if inner is not None:
            meter.step(len(inner))
            stack.extend((x, depth + 1) for x in inner)
        if total > meter.limits.output:
            break
    meter.write(total)


def to_json_filter(meter: Meter) -> Callable[..., str]:
    """Hugging Face's tojson: nothing escaped for HTML, the layout of `json.dumps`."""

    def to_json(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        width = len(indent) if isinstance(indent, str) else width_of(indent, "tojson's indent")
        for s in separators or ():
            width += len(s)
        _json_size(meter, x, width)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    return to_json


GUARDS: dict[str, Guard] = {
    **dict.fromkeys(("attr", "count", "length", "d", "default", "first", "last", "abs", "filesizeformat"), free),
    **dict.fromkeys(("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"), _shallow),
    **dict.fromkeys(("min", "max", "unique"), _deep),
    **dict.fromkeys(("sort", "dictsort", "groupby"), _sorting),
    **dict.fromkeys(("capitalize", "lower", "upper", "title", "trim", "string"), _printed(3)),
    **dict.fromkeys(("wordcount", "truncate", "safe"), _printed(3)),
    **dict.fromkeys(("e", "escape", "forceescape"), _printed(6)),
    **dict.fromkeys(("batch", "slice"), _batching),
    **dict.fromkeys(("int", "float"), _number),
    "center": _padding, "format": _formatting, "indent": _indenting, "join": _joining, "replace": _replacing,
    "round": _rounding, "sum": _summing, "urlencode": _printed(12),
}  # fmt: skip
DEEP_TESTS = frozenset("in lower upper == eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le".split())  # noqa: SIM905

# --- methods -------------------------------------------------------------------------------------

_LINEAR = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "  # noqa: SIM905
    "isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex "
    "rpartition rsplit rstrip "
    "split splitlines startswith strip swapcase title upper".split()
)
_PADDED = frozenset(("center", "ljust", "rjust", "zfill"))
METHODS: dict[type, frozenset[str]] = {
    dict: frozenset(("keys", "values", "items", "get", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    float: frozenset(("is_integer",)),
}


def check_text_method(
    meter: Meter, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Pay for `text.name(*args)` and give back its arguments; None for a method that is not offered."""
    if name in _LINEAR:
        meter.weigh(args)
        meter.write(3 * len(text))
        if "split" in name:
            meter.step(1 + len(text) // 8)
    elif name in _PADDED:
        meter.write(len(text) + width_of(_arg(args, kwargs, 0, "width", 0), f"{name}'s width"))
    elif name == "expandtabs":
        meter.write(
            len(text) + (1 + text.count("\t")) * width_of(_arg(args, kwargs, 0, "tabsize", 8), "expandtabs' size")
        )
    elif name == "replace" and len(args) >= 2:
        _grown(meter, text, args[0], args[1], _arg(args, kwargs, 2, "count", None))
    elif name == "join" and len(args) == 1:
        args = (meter.drain(args[0]),)
        n_elements, n_characters = meter.weigh(args[0])
        meter.write((6 if isinstance(text, Markup) else 1) * n_characters + n_elements * len(text))
    else:
        return None
    return args
