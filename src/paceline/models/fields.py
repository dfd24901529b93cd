"""config.json, read field by field: every problem is collected, and `check` raises them all at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.core.errors import CheckpointError

REQUIRED: Any = object()

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_CONTEXT = 1 << 26


class Fields:
    """One JSON object of a checkpoint's configuration. A null counts as absent, as in transformers.

    Every reader returns a usable value even after a problem, so that reading goes on and finds the next one.
    A field may have several names (`("n_embd", "hidden_size")`); the first that is present is used.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = "", problems: list[str] | None = None):
        self.raw, self.prefix = raw, prefix
        self.problems: list[str] = [] if problems is None else problems

    def problem(self, name: str, value: object, remedy: str) -> None:
        shown = repr(value)
        self.problems.append(f"{self.prefix}{name} = {shown[:80]}{'...' if len(shown) > 80 else ''}: {remedy}")

    def check(self) -> None:
        """Raise CheckpointError with everything found so far."""
        if self.problems:
            n = len(self.problems)
            head = f"config.json: {n} problem{'s' if n > 1 else ''} (the file is damaged or of another architecture):"
            raise CheckpointError("\n".join([head, *(f"- {p}" for p in self.problems)]))

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def _find(self, names: str | Sequence[str], default: Any) -> tuple[str, Any]:
        names = (names,) if isinstance(names, str) else names
        for name in names:
            if self.has(name):
                return name, self.raw[name]
        if default is REQUIRED:
            self.problems.append(f"{self.prefix}{names[0]} is missing: add it, or fetch the complete config.json")
        return names[0], None

    def integer(self, name: str | Sequence[str], default: Any = REQUIRED, *, low: int = 1, high: int) -> int:
        name, value = self._find(name, default)
        fallback = low if default is REQUIRED or default is None else default
        if value is None:
            return fallback
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problem(name, value, f"must be an integer from {low} to {high}")
            return fallback
        return value

    def optional_integer(self, name: str, *, low: int = 1, high: int) -> int | None:
        return self.integer(name, low=low, high=high) if self.has(name) else None

    def number(self, name: str, default: Any = REQUIRED, *, low: float, high: float) -> float:
        name, value = self._find(name, default)
        fallback = low if default is REQUIRED or default is None else default
        if value is None:
            return float(fallback)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high:
            self.problem(name, value, f"must be a number from {low:g} to {high:g}")
            return float(fallback)
        return float(value)

    def optional_number(self, name: str, default: float | None = None, *, low: float, high: float) -> float | None:
        """None when the field is null, `default` when it is absent."""
        if name not in self.raw:
            return default
        return self.number(name, low=low, high=high) if self.has(name) else None

    def numbers(self, name: str, n: int) -> tuple[float, ...]:
        """A list of n positive numbers."""
        name, value = self._find(name, REQUIRED)
        if value is None:
            return (1.0,) * n
        good = isinstance(value, list) and all(isinstance(v, (int, float)) and 0 < v < math.inf for v in value)
        if not good or len(value) != n:
            self.problem(name, value, f"must be a list of {n} positive numbers (half the rotary dimension)")
            return (1.0,) * n
        return tuple(float(v) for v in value)

    def flag(self, name: str, default: bool) -> bool:
        name, value = self._find(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(name, value, "must be true or false")
            return default
        return value

    def activation(self, names: str | Sequence[str], default: str) -> str:
        """One of the kinds of `Ops.act`."""
        name, value = self._find(names, default)
        value = default if value is None else value
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.problem(name, value, f"unknown activation; known are {', '.join(sorted(ACTIVATIONS))}")
            return "silu"
        return ACTIVATIONS[value]

    def ids(self, name: str, n_vocab: int) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.raw.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if len(listed) > 1024 or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in listed):
            self.problem(name, value, f"must be a token id below vocab_size = {n_vocab}, or a list of such")
            return ()
        # Some checkpoints name added tokens that were never embedded: harmless, as they are never drawn.
        return tuple(v for v in listed if v < n_vocab)

    def layers(self, name: str, n_layers: int) -> tuple[int, ...]:
        """A list of layer numbers."""
        value = self.raw.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or any(not isinstance(v, int) or not 0 <= v < n_layers for v in value):
            self.problem(name, value, f"must be a list of layer numbers below {n_layers}")
            return ()
        return tuple(value)

    def layer_types(self, n_layers: int) -> tuple[str, ...] | None:
        value = self.raw.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != n_layers or any(v not in LAYER_TYPES for v in value):
            remedy = f"must list one of {' / '.join(LAYER_TYPES)} for each of the {n_layers} layers"
            self.problem("layer_types", value, remedy)
            return None
        return tuple(value)

    def inside(self, name: str) -> Fields:
        """The object stored under `name` (empty when absent); its problems are collected here."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.problem(name, value, "must be a JSON object")
            value = None
        return Fields(value or {}, f"{self.prefix}{name}.", self.problems)
