"""Jinja2 in bounds: templates come with models from strangers and must neither hang nor fill the memory.

A thread cannot be stopped from outside, so the bounds are counted from inside. The template's syntax tree is rewritten
so that everything it does passes a meter: loop iterations, comparisons, concatenations and output go through filters of
ours; operators, attributes, items and calls go through the sandbox's hooks. What may be called and which filters exist
is a closed list, and each entry pays for its result before computing it. So one primitive step is always small and the
clock is looked at often.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
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

from paceline.checkpoints.template_guards import (
    DEEP_TESTS,
    GUARDS,
    METHODS,
    Guard,
    check_binop,
    check_text_method,
    free,
    to_json_filter,
)
from paceline.checkpoints.template_meter import NUMBER, Limits, Meter, small, widths_in
from paceline.core.errors import TemplateError


class _Format:
    """`str.format` of one text."""

    def __init__(self, environment: BoundedEnvironment, text: str, is_map: bool):
        self.environment, self.text, self.is_map = environment, text, is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self.environment.meter.read(len(self.text))
        values: Mapping[str, Any] = args[0] if self.is_map and len(args) == 1 else kwargs
        return _Formatter(self.environment).vformat(self.text, () if self.is_map else args, values)


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: BoundedEnvironment):
        super().__init__(environment)
        self._meter = environment.meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.step()
        self._meter.write(self._meter.text(value) + widths_in(format_spec, "a format"))
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
        raise TemplateError(
            f"chat template: a namespace may not hold {name[:40]!r}; names must not begin with an underscore"
        )


def _raise_exception(message: Any) -> None:
    raise TemplateError(f"chat template: {str(message)[:2000]}")


def _strftime(clock: Callable[[], datetime]) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        if len(form) > 256 or NUMBER.search(form):
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
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension], optimized=False
        )
        self.meter = Meter(limits)
        self.finalize = self._output()
        self.filters = {name: self._filter(name, FILTERS[name], guard) for name, guard in GUARDS.items()}
        self.filters["tojson"] = self._filter("tojson", to_json_filter(self.meter), free)
        for name, function in (("_weigh", self._weigh), ("_elements", self.meter.elements), ("_concat", self._concat)):
            self.filters[name] = self._filter(name, function, free)
        self.tests = {name: self._test(test) if name in DEEP_TESTS else test for name, test in TESTS.items()}
        self.globals = {
            "range": self.globals["range"], "dict": _Dict(self.meter), "namespace": _Namespace, "cycler": Cycler,
            "joiner": Joiner, "raise_exception": _raise_exception, "strftime_now": _strftime(clock),
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
            lead = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (self,)}.get(
                wants or "", ()
            )
            return function(*lead, value, *args, **kwargs)

        return call

    def _test(self, function: Any) -> Callable[..., Any]:
        @pass_context
        def call(context: Context, value: Any, *args: Any) -> Any:
            return function(self._weigh(value), *map(self._weigh, args))

        return call

    # The sandbox's hooks.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_binop(self.meter, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return small(result) if isinstance(result, int) else result

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
            checked = check_text_method(self.meter, owner, name, args, kwargs)
            if checked is not None:
                return checked
        elif name in METHODS.get(type(owner), ()):
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
        if isinstance(node.arg, nodes.Slice) and isinstance(node.node, nodes.Expr):
            node.node = _through("_elements", node.node)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _through("_weigh", pair.key)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise TemplateError("chat template: {% autoescape %} is not supported; prompts are not HTML")


def _through(name: str, node: Any) -> nodes.Expr:
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
