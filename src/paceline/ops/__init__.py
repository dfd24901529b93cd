"""The small set of operations that models are written in. One protocol, several interpretations:

`reference` (NumPy: the oracle; torch tensors on a GPU), `native` (compiled kernels), `count` (bytes and FLOPs).
Activations are float32 matrices (n_rows, n); a row is one token. Everything an op needs is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paceline.core.batch import Batch
from paceline.core.specs import AttnSpec
from paceline.ops.adapters import Sites
from paceline.ops.packed import Packed

Array = Any  # the backend's activation matrix

RESCORED = 64  # blocks of LANES outputs that `rescored` computes from the fine matrix in each row


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: cos and sin tables (n_positions, dim / 2) float32, attention factor already multiplied in.

    Rotates the first `dim` components of every head. `interleaved` pairs (2i, 2i+1); otherwise (i, i + dim/2).
    """

    dim: int
    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of gated MLPs. gate_up[e]: (2 * d_ff, d) rows [gate | up]; down[e]: (d, d_ff)."""

    gate_up: Sequence[Packed]
    down: Sequence[Packed]
    n_active: int
    kind: str  # activation
    normalise: bool  # softmax over all experts, take top n_active; divide their weights by their sum


class Ops(Protocol):
    """What a model may do. Weight vectors (norms, biases) are float32 NumPy arrays; matrices are `Packed`."""

    name: str

    def why_not(self, w: Packed) -> str | None: ...

    def pack(self, w: np.ndarray, fmt: str, group: int | None = None, mins: bool = False) -> Packed:
        """What `formats.pack` gives, bit for bit, as fast as this backend can."""

    # memory of the KV cache, in this backend's array type
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any: ...
    def move(self, pool: Any, src: np.ndarray, dst: np.ndarray) -> None:
        """Copy cache entries src -> dst (int64 slots), all heads, as if all were read before any is written."""

    def adapter(self, sites: Sites) -> Any:
        """An adapter in this backend's form, for `Batch.adapters`. Site i is what `adapt` calls i."""

    # one step
    def begin(self, batch: Batch) -> Any:
        """Bind a step to this backend; the result is what the ops below take as `batch`."""

    def compile(self, fn: Callable[..., Any], n_in: tuple[int, ...]) -> Callable[..., Any]:
        """`fn(*arrays, batch)` prepared for repeated calls; n_in gives the columns of each array argument."""

    def numpy(self, x: Array) -> np.ndarray: ...

    # activations
    def embed(self, batch: Any, table: Packed, *, by: str = "tokens") -> Array:
        """Rows of `table` (n_out = vocabulary or positions) chosen by batch.tokens or batch.positions."""

    def linear(self, x: Array, w: Packed, bias: np.ndarray | None = None) -> Array: ...
    def rescored(self, x: Array, coarse: Packed, fine: Packed) -> Array:
        """Logits of a head that is kept twice: `linear(x, coarse)`, of which in each row the RESCORED blocks of LANES outputs with
        the largest coarse logit (ties: the lower block; NaN counts as infinite) are those of `linear(x, fine)` instead."""

    def adapt(self, y: Array, x: Array, batch: Any, site: int) -> Array:
        """y = linear(x) of all rows with what each row's adapter adds to it at this site: scale * (x A^T) B^T, in float32.
        Rows without an adapter keep their bits. Takes y over: it is not to be used afterwards."""

    def rms_norm(self, x: Array, weight: np.ndarray, eps: float, *, offset: float = 0.0) -> Array:
        """x / sqrt(mean(x^2) + eps) * (offset + weight) over consecutive runs of len(weight) columns (heads)."""

    def layer_norm(self, x: Array, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Array: ...
    def rope(self, x: Array, batch: Any, rope: Rope, head_dim: int) -> Array: ...
    def attention(self, q: Array, k: Array, v: Array, batch: Any, layer: int, spec: AttnSpec) -> Array:
        """Write k, v (rows, n_kv_heads * dim) to their slots, attend, return (rows, n_heads * dim)."""

    def act(self, x: Array, kind: str) -> Array:
        """kind: silu, gelu (erf), gelu_tanh, relu."""

    def gated(self, x: Array, kind: str) -> Array:
        """[gate | up] (rows, 2n) -> act(gate) * up (rows, n)."""

    def add(self, x: Array, y: Array) -> Array: ...
    def scale(self, x: Array, s: float) -> Array: ...
    def softcap(self, x: Array, cap: float) -> Array: ...
    def split(self, x: Array, sizes: Sequence[int]) -> Sequence[Array]: ...
    def moe(self, x: Array, router: Array, experts: Experts) -> Array:
        """router (rows, n_experts) logits; each row's experts are summed in descending order of their weight (ties: lower id)."""

    def wanted(self, x: Array, batch: Any) -> Array:
        """The rows batch.want of x."""

    # choosing tokens (NumPy in, NumPy out)
    def sample(
        self,
        logits: np.ndarray,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        min_p: np.ndarray,
        u: np.ndarray,
    ) -> np.ndarray:
        """Row-wise token ids int64. temperature 0 (or below 1e-5): argmax, lowest id on ties. Otherwise softmax(logits / temperature)
        restricted to: the top_k largest (0: all; ties by lower id), then the smallest set in descending order whose mass reaches top_p
        of that, then probabilities >= min_p * largest; renormalised; the inverse CDF in descending order (ties: lower id) at u in [0,1)."""

    def logprobs(self, logits: np.ndarray, ids: np.ndarray, n_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-softmax of ids (n,), and the n_top largest: (n,) float32, (n, n_top) int64, (n, n_top) float32."""
