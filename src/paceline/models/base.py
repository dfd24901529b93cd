"""What every model file provides. The file name is the registry key (`model_type` in config.json).

A model file defines `config(raw) -> ModelConfig` and a `Net(Model)` with `params` and `layer`, and `embed`, `norm` or
`head` where they differ from the usual; nothing else in the project names it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from paceline.core.specs import AttnSpec, StateSpec
from paceline.models import rope
from paceline.ops import Array, Ops, Rope
from paceline.ops.packed import Packed


@dataclass(frozen=True)
class ModelConfig:
    """The hyper-parameters all families share; `extra` holds what only one family knows.

    `context` is what the model was made for (max_position_embeddings); `max_context` is as far as its positions can be
    stretched.
    """

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    n_vocab: int
    context: int
    eps: float
    tied: bool
    max_context: int = 0
    act: str = "silu"
    eos: tuple[int, ...] = ()
    bos: int | None = None
    attn: tuple[AttnSpec, ...] = ()  # one per layer
    states: tuple[StateSpec, ...] = ()  # one per layer
    rope: Mapping[str, rope.RopeSpec] = field(default_factory=dict)  # by the names that layers use ("full")
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """The parameter whose rows are the outputs of the head."""
        return "embed" if self.tied else "head"


def coarse(name: str) -> str:
    """What the coarse copy of a head is called."""
    return f"{name}.coarse"


@dataclass(frozen=True)
class Param:
    """One parameter of the program and where a Hugging Face checkpoint keeps it.

    `sources` are concatenated along axis 0 (fused QKV, gate|up). kind: "linear" (a matrix in the plan's format),
    "embed" (a matrix gathered by rows, and the head when tied), "head" (the untied head), "coarse" (the loader's: a
    head's coarse copy), "router" and "position" (matrices kept in floating point), "vector" (float32).
    `transpose`: the checkpoint stores (n_in, n_out).
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str = "linear"
    transpose: bool = False
    rows: tuple[int, ...] = ()  # of each source; by default equal shares

    def rows_of(self) -> tuple[int, ...]:
        n = len(self.sources)
        return self.rows or (self.shape[0] // n,) * n


Weights = Mapping[str, Packed | np.ndarray]


@dataclass(frozen=True)
class Program:
    """A model's parts, prepared by the backend: each takes its activations and, last, what `ops.begin` returned.

    embed(batch) and layers[i](x, batch) take all rows of the batch, norm(x, batch) and head(x, batch) any rows.
    forward(batch) is all of it, the logits (n_want, n_vocab); hidden(batch) gives (normed rows (n_rows, d_model), logits).
    """

    embed: Callable[..., Array]
    layers: tuple[Callable[..., Array], ...]
    norm: Callable[..., Array]
    head: Callable[..., Array]
    forward: Callable[..., Array]
    hidden: Callable[..., tuple[Array, Array]]


def _of_any_rows(part: Callable[..., Array]) -> Callable[..., Array]:
    """A part that does not look at the batch gets none, so that its rows may be fewer than the batch's."""
    return lambda x, batch: part(x, None)


class Model:
    """A program over `Ops` with its weights. Subclasses are one level deep and hold no state between steps.

    `embed`, `layer`, `norm` and `head` say what is computed; `program` holds the same parts compiled.
    """

    ignored: Sequence[str] = ()  # regular expressions of checkpoint tensors that the program does not use (masks)
    norm_offset: float = 0.0  # norms multiply by norm_offset + weight

    def __init__(self, config: ModelConfig, ops: Ops, weights: Weights, context: int):
        self.config, self.ops, self.w, self.context = config, ops, weights, context
        self.notes: tuple[str, ...] = ()  # what the loader did that the user did not ask for
        self.ropes: dict[str, Rope] = {name: rope.tables(spec, context) for name, spec in config.rope.items()}
        self.sites: dict[str, int] = {}  # linears that take adapters, by parameter; none in the plain program
        self.program = self._compile()

    def adapted(self, names: Collection[str]) -> Program:
        """The program with room for adapters at these parameters of `sites_of(config)`; weights are shared with the plain one."""
        other = copy.copy(self)
        other.sites = {name: i for i, name in enumerate(self.sites_of(self.config)) if name in names}
        return other._compile()

    def _compile(self) -> Program:
        config, ops, d = self.config, self.ops, (self.config.d_model,)
        self._run_embed = ops.compile(self.embed, ())
        self._run_layers = tuple(ops.compile(self._bind(i), d) for i in range(config.n_layers))
        self._run_norm = _of_any_rows(ops.compile(lambda x, batch: self.norm(x), d))
        self._run_head = _of_any_rows(ops.compile(lambda x, batch: self.head(x), d))
        forward, hidden = ops.compile(self.forward, ()), ops.compile(self._run_both, ())
        return Program(self._run_embed, self._run_layers, self._run_norm, self._run_head, forward, hidden)

    def digest(self) -> bytes:
        """SHA-256 of everything here that decides what is computed: hyper-parameters, weights as they are kept, rotary tables.

        Reads all weights, about a second per gigabyte.
        """
        h = hashlib.sha256(repr(self.config).encode())
        for name in sorted(self.w):
            w = self.w[name]
            named = vars(w).items() if isinstance(w, Packed) else [("", w)]
            for part, value in named:
                if isinstance(value, np.ndarray):
                    h.update(repr((name, part, value.shape, str(value.dtype))).encode())
                    h.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
                else:
                    h.update(repr((name, part, value)).encode())
        for name, table in sorted(self.ropes.items()):
            h.update(repr((name, table.dim, table.interleaved)).encode())
            h.update(
                table.cos[:2].tobytes() + table.sin[:2].tobytes()
            )  # row 1 holds the frequencies: more rows, same bits
        return h.digest()

    def _bind(self, i: int) -> Callable[..., Array]:
        return lambda x, batch: self.layer(i, x, batch)

    def forward(self, batch: Any) -> Array:
        """Logits (n_want, n_vocab) of one step; `batch` is what `ops.begin` returned."""
        return self._run_head(self.ops.wanted(self._run_trunk(batch), batch), batch)

    def hidden(self, batch: Any) -> Array:
        """Hidden states (n_rows, d_model) of every row after the final norm."""
        return self._run_norm(self._run_trunk(batch), batch)

    def _run_both(self, batch: Any) -> tuple[Array, Array]:
        x = self._run_trunk(batch)
        return self._run_norm(x, batch), self._run_head(self.ops.wanted(x, batch), batch)

    def _run_trunk(self, batch: Any) -> Array:
        x = self._run_embed(batch)
        for layer in self._run_layers:
            x = layer(x, batch)
        return x

    # what a file provides
    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        raise NotImplementedError

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        raise NotImplementedError

    @classmethod
    def sites_of(cls, config: ModelConfig) -> tuple[str, ...]:
        """Parameters whose linear takes adapters, in the order of an adapter's sites: all of the layers but experts."""
        return tuple(name for name, p in cls.params(config).items() if p.kind == "linear" and ".moe." not in name)

    # what a file may provide
    def embed(self, batch: Any) -> Array:
        return self.ops.embed(batch, self.matrix("embed"))

    def norm(self, x: Array) -> Array:
        return self.rms("norm", x)

    def head(self, x: Array) -> Array:
        """Logits of the rows x, the final norm included."""
        return self.logits(self.norm(x))

    def logits(self, x: Array) -> Array:
        """x W^T of the output matrix; in two passes where the loader keeps a coarse copy of it."""
        name = self.config.output
        if coarse(name) in self.w:
            return self.ops.rescored(x, self.matrix(coarse(name)), self.matrix(name))
        return self.ops.linear(x, self.matrix(name))

    # weights by name
    def matrix(self, name: str) -> Packed:
        return cast(Packed, self.w[name])

    def vector(self, name: str) -> np.ndarray:
        return cast(np.ndarray, self.w[name])

    def linear(self, name: str, x: Array, batch: Any = None) -> Array:
        """x W^T, plus the bias `name.bias` where the model has one; with the batch, plus what the rows' adapters add."""
        bias = self.vector(f"{name}.bias") if f"{name}.bias" in self.w else None
        y = self.ops.linear(x, self.matrix(name), bias)
        return self.ops.adapt(y, x, batch, self.sites[name]) if batch is not None and name in self.sites else y

    def rms(self, name: str, x: Array) -> Array:
        return self.ops.rms_norm(x, self.vector(name), self.config.eps, offset=self.norm_offset)
