"""Jinja2 in bounds: templates come with models from strangers and must neither hang nor fill the memory.

A thread cannot be stopped from outside, so the bounds are counted from inside. The template's syntax tree is rewritten so that
everything it does passes a meter: loop iterations, comparisons, concatenations and output go through filters of ours; operators,
attributes, items and calls go through the sandbox's hooks. What may be called and which filters exist is a closed list, and
each entry pays for its result before computing it. So one primitive step is always small and the clock is looked at often.
"""

from __future__ import annotations

import json
import re
import time
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sized, ValuesView
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from paceline.core.errors import TemplateError

MAX_INT_BITS = 4096
MAX_WIDTH = 10_000  # of padding, indentation and number formats


@dataclass(frozen=True)
class Limits:
    """What one rendering may use. Lengths are characters; a step is one iteration, call, comparison or element looked at."""

    seconds: float = 5.0
    source: int = 256 << 10
    output: int = 8 << 20  # of the result, and of any one string on the way
    steps: int = 4_000_000
    characters: int = 256 << 20  # read and written in all


class Meter:
    """Counts down; raises TemplateError at zero and when the time is over."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._steps = limits.steps
        self._characters = limits.characters
        self._end = time.monotonic() + limits.seconds
        self._unseen = 0  # work since the clock was looked at

    def step(self, n: int = 1) -> None:
        self._steps -= n
        if self._steps < 0:
            raise TemplateError(f"chat template: takes more than {self.limits.steps:,} steps; it probably loops without end")
        self._work(n)

    def read(self, n: int) -> None:
        """Pay for looking at or writing n characters."""
        self._characters -= n
        if self._characters < 0:
            raise TemplateError(f"chat template: handles more than {self.limits.characters:,} characters; it multiplies its text")
        self._work(1 + (n >> 6))

    def write(self, n: int) -> None:
        """Pay for a string of n characters."""
        if n > self.limits.output:
            raise TemplateError(f"chat template: makes a text of {n:,} characters, more than the {self.limits.output:,} allowed")
        self.read(n)

    def _work(self, n: int) -> None:
        self._unseen += n
        if self._unseen > 500:
            self._unseen = 0
            if time.monotonic() > self._end:
                raise TemplateError(f"chat template: takes longer than {self.limits.seconds:g} s")

    def elements(self, value: Any) -> Any:
        """Pay for the elements of `value`, at once if it has a length, else one by one."""
        if isinstance(value, Undefined):
            return value
        if isinstance(value, Sized):
            self.step(len(value))
            return value
        return self._each(value) if isinstance(value, Iterator) else value

    def _each(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def drain(self, value: Any) -> Any:
        """A list in place of an iterator, so that it can be weighed."""
        return list(self._each(value)) if isinstance(value, Iterator) else value

    def weigh(self, value: Any) -> tuple[int, int]:
        """Pay for all that `value` holds, as often as it is reached: (elements, characters). A list that holds another twice,
        and so on forty times, ends here and not in its printout."""
        n_elements = n_characters = 0
        stack = [value]
        while stack:
            v = stack.pop()
            n_elements += 1
            if isinstance(v, str):
                n_characters += len(v)
                self.read(len(v))
                continue
            inner = _contents(v)
            if inner is not None:
                self.step(len(inner))
                stack.extend(inner)
            elif isinstance(v, int):
                n_characters += _small(v).bit_length() // 3
        return n_elements, n_characters

    def text(self, value: Any) -> int:
        """Pay for `str(value)`: an upper bound of its length."""
        if type(value) is str:
            self.read(len(value))
            return len(value)
        n_elements, n_characters = self.weigh(value)
        # Inside a container text is printed escaped, and elements have brackets, commas and names around them.
        bound = n_characters if isinstance(value, str) else 10 * n_characters + 32 * n_elements
        self.write(bound)
        return bound


def _contents(v: Any) -> list[Any] | None:
    """The elements of a container, None for anything else."""
    if isinstance(v, dict):
        return [*v.keys(), *v.values()]
    if isinstance(v, (list, tuple, KeysView, ValuesView, ItemsView)):
        return list(v)
    if isinstance(v, Namespace):
        inner: dict[str, Any] = object.__getattribute__(v, "_Namespace__attrs")
        return [*inner.keys(), *inner.values()]
    if isinstance(v, range):
        return [0] * min(len(v), 1 << 17)
    return None


def _small(value: int) -> int:
    if value.bit_length() > MAX_INT_BITS:
        raise TemplateError(f"chat template: computes with an integer of {value.bit_length()} bits, more than {MAX_INT_BITS}")
    return value


def _width(value: Any, what: str) -> int:
    if isinstance(value, int) and abs(value) > MAX_WIDTH:
        raise TemplateError(f"chat template: {what} {value} is beyond {MAX_WIDTH}")
    return abs(value) if isinstance(value, int) else 0


_NUMBER = re.compile(r"[0-9]+")


def _widths(spec: str, what: str) -> int:
    """The sum of the numbers in a format; a width taken from an argument is refused."""
    found = [n for n in _NUMBER.findall(spec) if len(n) > 5 or int(n) > MAX_WIDTH]
    if found:
        raise TemplateError(f"chat template: {what} asks for a width of {found[0][:20]}, beyond {MAX_WIDTH}")
    return sum(int(n) for n in _NUMBER.findall(spec))


# --- operators -----------------------------------------------------------------------------------


def _check_percent(meter: Meter, form: str, values: Any) -> None:
    if re.search(r"%[^a-zA-Z%]*\*", form):
        raise TemplateError("chat template: a % format may not take its width from an argument")
    pad = _widths(form, "a % format")
    n = meter.text(values)
    meter.write(len(form) + pad + max(1, form.count("%")) * n)


def _check_binop(meter: Meter, op: str, a: Any, b: Any) -> None:
    meter.step()
    for x in (a, b):
        if isinstance(x, int):
            _small(x)
    if isinstance(a, str) and op == "%":
        _check_percent(meter, str(a), b)
    elif op == "*":
        for seq, n in ((a, b), (b, a)):
            if isinstance(seq, (str, list, tuple)) and isinstance(n, int):
                total = len(seq) * max(0, n)
                (meter.write if isinstance(seq, str) else meter.step)(total)
    elif op == "+" and isinstance(a, str) and isinstance(b, str):
        meter.write(len(a) + (6 * len(b) if isinstance(a, Markup) else len(b)) + (5 * len(a) if isinstance(b, Markup) else 0))
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


def _free(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
    meter.write(meter.text(value) + _width(_arg(args, kwargs, 0, "width", 80), "center's width"))
    return value


def _indenting(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    width = _arg(args, kwargs, 0, "width", 4)
    n = len(width) if isinstance(width, str) else _width(width, "indent's width")
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
        inner = _contents(v)
        if isinstance(v, int):
            total += _small(v).bit_length() // 3
        if inner is not None:
            meter.step(len(inner))
            stack.extend((x, depth + 1) for x in inner)
        if total > meter.limits.output:
            break
    meter.write(total)


def _to_json(meter: Meter) -> Callable[..., str]:
    """Hugging Face's tojson: nothing escaped for HTML, the layout of `json.dumps`."""

    def to_json(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        width = len(indent) if isinstance(indent, str) else _width(indent, "tojson's indent")
        for s in separators or ():
            width += len(s)
        _json_size(meter, x, width)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    return to_json


_GUARDS: dict[str, Guard] = {
    **dict.fromkeys(("attr", "count", "length", "d", "default", "first", "last", "abs", "filesizeformat"), _free),
    **dict.fromkeys(("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"), _shallow),
    **dict.fromkeys(("min", "max", "unique"), _deep),
    **dict.fromkeys(("sort", "dictsort", "groupby"), _sorting),
    **dict.fromkeys(("capitalize", "lower", "upper", "title", "trim", "string", "wordcount", "truncate", "safe"), _printed(3)),
    **dict.fromkeys(("e", "escape", "forceescape"), _printed(6)),
    **dict.fromkeys(("batch", "slice"), _batching),
    **dict.fromkeys(("int", "float"), _number),
    "center": _padding, "format": _formatting, "indent": _indenting, "join": _joining, "replace": _replacing,
    "round": _rounding, "sum": _summing, "urlencode": _printed(12),
}  # fmt: skip
_DEEP_TESTS = frozenset("in lower upper == eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le".split())

# --- methods -------------------------------------------------------------------------------------

_LINEAR = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric "
    "isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip "
    "split splitlines startswith strip swapcase title upper".split()
)
_PADDED = frozenset(("center", "ljust", "rjust", "zfill"))
_OTHERS: dict[type, frozenset[str]] = {
    dict: frozenset(("keys", "values", "items", "get", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    float: frozenset(("is_integer",)),
}


def _text_method(meter: Meter, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Pay for `text.name(*args)` and give back its arguments; None for a method that is not offered."""
    if name in _LINEAR:
        meter.weigh(args)
        meter.write(3 * len(text))
        if "split" in name:
            meter.step(1 + len(text) // 8)
    elif name in _PADDED:
        meter.write(len(text) + _width(_arg(args, kwargs, 0, "width", 0), f"{name}'s width"))
    elif name == "expandtabs":
        meter.write(len(text) + (1 + text.count("\t")) * _width(_arg(args, kwargs, 0, "tabsize", 8), "expandtabs' size"))
    elif name == "replace" and len(args) >= 2:
        _grown(meter, text, args[0], args[1], _arg(args, kwargs, 2, "count", None))
    elif name == "join" and len(args) == 1:
        args = (meter.drain(args[0]),)
        n_elements, n_characters = meter.weigh(args[0])
        meter.write((6 if isinstance(text, Markup) else 1) * n_characters + n_elements * len(text))
    else:
        return None
    return args


class _Format:
    """`str.format` of one text."""

    def __init__(self, environment: BoundedEnvironment, text: str, is_map: bool):
        self.environment, self.text, self.is_map = environment, text, is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self.is_map:
            args, kwargs = (), args[0]
        self.environment.meter.read(len(self.text))
        return _Formatter(self.environment).vformat(self.text, args, kwargs)


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: BoundedEnvironment):
        super().__init__(environment)
        self._meter = environment.meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.step()
        self._meter.write(self._meter.text(value) + _widths(format_spec, "a format"))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            self._meter.write(10 * self._meter.text(value))
        return super().convert_field(value, conversion)


# --- globals -------------------------------------------------------------------------------------


class _Dict:
    """`dict` for templates: makes dictionaries and nothing else, so that the class itself stays out of reach."""

    def __init__(self, meter: Meter):
        self._meter = meter

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*map(self._meter.drain, args), **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(self._meter.elements(keys), value)


class _Namespace(Namespace):
    """As Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"chat template: a namespace may not hold {name[:40]!r}; names must not begin with an underscore")


def _raise_exception(message: Any) -> None:
    raise TemplateError(f"chat template: {str(message)[:2000]}")


def _strftime(clock: Callable[[], datetime]) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        if len(form) > 256 or _NUMBER.search(form):
            raise TemplateError(f"chat template: strftime_now of {form[:80]!r}: at most 256 characters and no widths")
        return clock().strftime(form)

    return strftime_now


class Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; in rendering it is a scope of its own."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# --- environment ---------------------------------------------------------------------------------


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one rendering: Hugging Face's settings, every operation on the meter."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, limits: Limits, clock: Callable[[], datetime] = datetime.now):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension], optimized=False)
        self.meter = Meter(limits)
        self.finalize = self._output()
        self.filters = {name: self._filter(name, FILTERS[name], guard) for name, guard in _GUARDS.items()}
        self.filters["tojson"] = self._filter("tojson", _to_json(self.meter), _free)
        for name, function in (("_weigh", self._weigh), ("_elements", self.meter.elements), ("_concat", self._concat)):
            self.filters[name] = self._filter(name, function, _free)
        self.tests = {name: self._test(test) if name in _DEEP_TESTS else test for name, test in TESTS.items()}
        self.globals = {
            "range": self.globals["range"], "dict": _Dict(self.meter), "namespace": _Namespace, "cycler": Cycler, "joiner": Joiner,
            "raise_exception": _raise_exception, "strftime_now": _strftime(clock),
        }  # fmt: skip

    # What the rewritten tree calls.

    def _output(self) -> Callable[[Context, Any], str]:
        @pass_context
        def output(context: Context, value: Any) -> str:
            self.meter.step()
            self.meter.text(value)
            return str(value)

        return output

    def _weigh(self, value: Any) -> Any:
        if type(value) is str:
            self.meter.read(len(value))
        else:
            self.meter.weigh(value)
        return value

    def _concat(self, values: list[Any]) -> str:
        self.meter.write(sum(self.meter.text(v) for v in values))
        return "".join(map(str, values))

    def _filter(self, name: str, function: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
        wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

        @pass_context  # which also keeps the compiler from computing constants, unmetered, at compile time
        def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            self.meter.step()
            value = guard(self.meter, value, args, kwargs)
            lead = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (self,)}.get(wants or "", ())
            return function(*lead, value, *args, **kwargs)

        return call

    def _test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @pass_context
        def call(context: Context, value: Any, *args: Any) -> Any:
            return function(self._weigh(value), *map(self._weigh, args))

        return call

    # The sandbox's hooks.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_binop(self.meter, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return _small(result) if isinstance(result, int) else result

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.meter.step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.meter.step()
        if isinstance(argument, tuple):
            self.meter.weigh(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        text = getattr(value, "__self__", None)
        if not isinstance(text, str) or getattr(value, "__name__", "") not in ("format", "format_map"):
            return None
        return _Format(self, str(text), value.__name__ == "format_map")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.meter.step(4)
        if isinstance(obj, (types.BuiltinMethodType, types.MethodType)):
            args = self._method(obj, args, kwargs)
        elif not self._callable(obj):
            raise TemplateError(f"chat template: {type(obj).__name__!r} objects cannot be called")
        elif not isinstance(obj, Macro):
            for value in (*args, *kwargs.values()):
                self._weigh(value)
        return super().call(context, obj, *args, **kwargs)

    def _callable(self, obj: Any) -> bool:
        if isinstance(obj, (Macro, LoopContext, BlockReference, _Format, Joiner, Undefined)):
            return True
        return any(obj is f for f in self.globals.values())

    def _method(self, obj: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Pay for calling a bound method; TemplateError unless it is one of those offered."""
        owner, name = obj.__self__, obj.__name__
        if isinstance(owner, str):
            checked = _text_method(self.meter, owner, name, args, kwargs)
            if checked is not None:
                return checked
        elif name in _OTHERS.get(type(owner), ()):
            self.meter.weigh(args)
            if name in ("index", "count"):
                self.meter.weigh(owner)
            elif name == "copy":
                self.meter.step(len(owner))
            return args
        elif isinstance(owner, (LoopContext, Cycler, _Dict)):
            self.meter.weigh(args)
            return args
        raise TemplateError(f"chat template: {type(owner).__name__}.{name} is not available to templates")


class _Metered(NodeTransformer):
    """Sends what the generated code would do by itself through filters of ours."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # a constant is output through `finalize`, data is not

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(_through("_weigh", nodes.Const(None)), lineno=node.lineno)
        node.iter = _through("_elements", node.iter)
        node.body = [tick, *node.body]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _through("_weigh", node.expr)
        for operand in node.ops:
            operand.expr = _through("_weigh", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("_elements", node.node)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _through("_weigh", pair.key)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise TemplateError("chat template: {% autoescape %} is not supported; prompts are not HTML")


def _through(name: str, node: nodes.Expr) -> nodes.Expr:
    if name == "_weigh" and isinstance(node, nodes.Const) and node.value is not None:
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def compile_template(source: str, limits: Limits) -> types.CodeType:
    """Source to code for `render_code`. Raises TemplateError with the line of a mistake."""
    if len(source) > limits.source:
        raise TemplateError(f"chat template: {len(source):,} characters, more than the {limits.source:,} allowed")
    environment = BoundedEnvironment(limits)
    try:
        return environment.compile(_Metered().visit(environment.parse(source)))
    except jinja2.TemplateSyntaxError as e:
        raise TemplateError(f"chat template: line {e.lineno}: {e.message}") from e
    except (RecursionError, MemoryError, SyntaxError, ValueError, TypeError, OverflowError, AttributeError) as e:
        raise TemplateError(f"chat template: cannot be compiled ({type(e).__name__}: {str(e)[:300]})") from e
    except (jinja2.TemplateError, AssertionError) as e:
        raise TemplateError(f"chat template: {str(e)[:300]}") from e


def render_code(
    code: types.CodeType, variables: Mapping[str, Any], limits: Limits, clock: Callable[[], datetime] = datetime.now
) -> str:
    """Render compiled code. Raises TemplateError for whatever goes wrong, the bounds included."""
    environment = BoundedEnvironment(limits, clock)
    out: list[str] = []
    n = 0
    try:
        template = jinja2.Template.from_code(environment, code, environment.globals)
        for part in template.generate(dict(variables)):
            n += len(part)
            if n > limits.output:
                raise TemplateError(f"chat template: writes more than the {limits.output:,} characters allowed")
            out.append(part)
    except TemplateError:
        raise
    except Exception as e:  # a template can provoke any exception that Python's types raise
        raise TemplateError(f"chat template: {type(e).__name__}: {str(e)[:500]}") from e
    return "".join(out)
