"""What a technique is: options, a manifest of facts, and the parts it plugs into seams.

A technique declares invariants, never partners; which combinations work is set arithmetic over `Fact`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from paceline.core.errors import ConfigError


class Fact(str, Enum):
    """An invariant that holds unless the model, the ops or a technique breaks it."""

    EXACT = "EXACT"  # same distribution as the plain model
    PREFIX_PURE = "PREFIX_PURE"  # the state of a prefix depends on its tokens alone
    ROLLBACK = "ROLLBACK"  # the tail can be undone
    FORKABLE = "FORKABLE"
    HEADS_ALIKE = "HEADS_ALIKE"
    LAYERS_ALIKE = "LAYERS_ALIKE"
    INDEX_IS_POSITION = "INDEX_IS_POSITION"
    PLAIN_KV = "PLAIN_KV"  # entries readable as floats
    EVERY_LAYER = "EVERY_LAYER"  # each token passes each layer
    CAUSAL = "CAUSAL"
    FULL_LOGITS = "FULL_LOGITS"
    RESIDENT = "RESIDENT"  # weights in memory
    BATCH_INVARIANT = "BATCH_INVARIANT"


SINGLE_SEAMS = frozenset(
    {"prefix", "drafter", "acceptor", "controller", "schedule", "budget", "kv_format", "moe", "parallel"}
)
CHAIN_SEAMS = frozenset(
    {"kv_policy", "logits", "depth", "weights", "attention", "selector", "kv_tier", "format", "program"}
)


@dataclass(frozen=True)
class Manifest:
    """What a technique builds, needs and breaks. `paper` is an arXiv id, DOI or URL, or "" for common practice."""

    seams: frozenset[str]
    needs: frozenset[Fact] = frozenset()
    breaks: frozenset[Fact] = frozenset()
    gives: frozenset[Fact] = frozenset()
    paper: str = ""


def tune(
    default: Any,
    low: Any = None,
    high: Any = None,
    *,
    log: bool = False,
    help: str = "",
    choices: tuple[Any, ...] = (),
    secret: bool = False,
) -> Any:
    """A technique's option: its default, its range (for checks and for the tuner) and one line of help.

    secret: its value is shown nowhere (addresses with passwords).
    """
    metadata = {"low": low, "high": high, "log": log, "help": help, "choices": choices, "secret": secret}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True)
class Technique:
    """Base of every technique. Subclasses are frozen dataclasses whose fields are options made by `tune`."""

    name: ClassVar[str] = ""  # "area/file", set by the registry
    tiny: ClassVar[Mapping[str, Any]] = {}  # options small enough for the generic tests on tiny models

    def manifest(self) -> Manifest:
        raise NotImplementedError

    def why_not(self, context: Any) -> str | None:
        """Why this technique cannot serve the model and machine of `context` (a `core.config.Plan` in the making); None if it can."""
        return None

    def build(self, context: Any) -> Any:
        """The part for each of its seams: the part itself for one seam, else a mapping from seam to part."""
        raise NotImplementedError


def option_fields(technique: type[Technique]) -> list[Field[Any]]:
    return [f for f in fields(technique) if f.default is not MISSING]


def check_option(owner: str, f: Field[Any], value: Any) -> str | None:
    """The problem with `value` for this option, or None."""
    low, high, choices = (f.metadata.get(k) for k in ("low", "high", "choices"))
    kind = type(f.default)
    if kind is float and type(value) is int:
        value = float(value)
    if f.default is not None and type(value) is not kind:
        return f"{owner}: {f.name} = {value!r} must be {kind.__name__}"
    if choices and value not in choices:
        return f"{owner}: {f.name} = {value!r} must be one of {', '.join(map(str, choices))}"
    if (low is not None and value < low) or (high is not None and value > high):
        return f"{owner}: {f.name} = {value!r} must be from {low} to {high}"
    return None


def parse_value(text: str) -> Any:
    """An option's text as int, float, bool or string, whichever reads first."""
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(lowered)
        except ValueError:
            pass
    return text.strip()


def parse_use(text: str) -> tuple[str, dict[str, Any]]:
    """`area/name:key=value,key=value` into its name and options. Raises ConfigError."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, eq, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if not eq or not key.isidentifier():
            raise ConfigError(f"use = {text!r}: {item!r} is not key=value")
        options[key] = parse_value(value)
    return name.strip(), options


def make(name: str, options: Mapping[str, Any], lookup: Callable[[str], type[Technique]]) -> Technique:
    """A technique with its options, all checked. Raises ConfigError with every problem."""
    cls = lookup(name)
    known = {f.name: f for f in option_fields(cls)}
    problems = [
        f"{name}: unknown option {key!r}; it has {', '.join(known) or 'none'}" for key in options if key not in known
    ]
    problems += [p for key, value in options.items() if key in known and (p := check_option(name, known[key], value))]
    if problems:
        raise ConfigError(problems)
    coerced = {k: float(v) if type(known[k].default) is float else v for k, v in options.items()}
    return cls(**coerced)


def conflicts(techniques: list[Technique], broken_by_base: Mapping[Fact, str] | None = None) -> list[str]:
    """Every reason why these cannot run together: a seam filled twice, a needed fact that another breaks."""
    problems: list[str] = []
    owner: dict[str, str] = {}
    broken: dict[Fact, str] = dict(broken_by_base or {})
    manifests = [(t, t.manifest()) for t in techniques]
    for t, m in manifests:
        for seam in sorted(m.seams & SINGLE_SEAMS):
            if seam in owner:
                problems.append(f"`{t.name}` and `{owner[seam]}` both fill the seam {seam}: choose one")
            owner[seam] = t.name
        for fact in m.breaks:
            broken.setdefault(fact, t.name)
    for t, m in manifests:
        for fact in sorted(m.needs):
            if fact in broken and broken[fact] != t.name:
                problems.append(f"`{t.name}` needs {fact.value}, which `{broken[fact]}` breaks")
    return problems
