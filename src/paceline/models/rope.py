"""Rotary position embedding (Su et al., arXiv:2104.09864) and the ways of stretching it, as pure functions.

Component pair i of a head turns by `position * inv_freq[i]`. Variants only choose inv_freq and a factor on cos and sin:

    default   theta^(-2i/dim)
    linear    the same / factor (position interpolation, arXiv:2306.15595)
    ntk       theta' = theta * factor^(dim / (dim - 2))
    dynamic   as ntk with factor' = factor * context / trained - (factor - 1) once context exceeds the trained length
    llama3    long wavelengths / factor, short ones kept, smooth in between (Llama 3.1 model card)
    yarn      ramp between both by rotations over the trained length, plus temperature (arXiv:2309.00071)
    longrope  inv_freq / short_factor[i] or / long_factor[i], chosen by the context (arXiv:2402.13753)

Frequencies are computed in float32 in the order transformers uses, so that far positions agree with it. Variants that
depend on length use the engine's `context`, fixed at start: keys already in the cache cannot be turned again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.models.fields import MAX_CONTEXT, Fields
from paceline.ops import Rope

KINDS = ("default", "linear", "dynamic", "ntk", "llama3", "yarn", "longrope")
_ALIASES = {"su": "longrope"}  # what Phi-3 first called it
_CHUNK = 8192


@dataclass(frozen=True)
class RopeSpec:
    """What one rotary embedding is, whatever the context. `trained` is the length before stretching."""

    kind: str
    dim: int
    theta: float
    trained: int
    factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read(
    f: Fields,
    head_dim: int,
    context: int,
    *,
    layer_type: str | None = None,
    theta: float = 10000.0,
    theta_field: str = "rope_theta",
    scaled: bool = True,
) -> RopeSpec:
    """The rotary embedding a config asks for; problems go to `f`.

    Accepts `rope_parameters` (transformers 5; that of `layer_type` where given per layer type) and the older
    `rope_theta`, `rope_scaling` and `partial_rotary_factor`. `scaled=False`: without the older `rope_scaling` (for
    Gemma 3's local layers).
    """
    p = f.inside("rope_parameters")
    if layer_type and layer_type in p.raw:
        p = p.inside(layer_type)
    elif scaled and not p.raw:
        p = f.inside("rope_scaling")
    elif not scaled:
        p = Fields({}, p.prefix, f.problems)
    theta = f.number(theta_field, theta, low=1.001, high=1e12)
    theta = p.number("rope_theta", theta, low=1.001, high=1e12)
    part = f.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    part = p.number("partial_rotary_factor", part, low=0.0, high=1.0)
    dim = int(head_dim * part)
    if dim < 2 or dim % 2:
        f.problem("head_dim * partial_rotary_factor", head_dim * part, "rotary embedding needs an even number >= 2")
        dim = 2
    return _variant(f, p, dim, theta, context)


def _variant(f: Fields, p: Fields, dim: int, theta: float, context: int) -> RopeSpec:
    kind = p.raw.get("rope_type", p.raw.get("type")) or "default"
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in KINDS:
        p.problem("rope_type", kind, f"unknown; known are {', '.join(KINDS)}")
        kind = "default"
    if kind == "default":
        return RopeSpec("default", dim, theta, context)
    trained = context
    if kind in ("llama3", "yarn", "longrope"):
        # Phi-3 keeps the trained length beside max_position_embeddings; where both are given, that one counts.
        trained = p.integer("original_max_position_embeddings", context, low=2, high=MAX_CONTEXT)
        trained = f.integer("original_max_position_embeddings", trained, low=2, high=MAX_CONTEXT)
    if kind in ("ntk", "dynamic") and dim < 4:
        f.problem("head_dim * partial_rotary_factor", dim, f"rope type {kind} needs a rotary dimension of 4 or more")
        dim = 4
    needed = kind != "longrope"
    factor = p.number("factor", *([] if needed else [context / trained]), low=1e-3, high=1e6)
    spec: dict[str, Any] = {"kind": kind, "dim": dim, "theta": theta, "trained": trained, "factor": factor}
    if kind == "llama3":
        low, high = p.number("low_freq_factor", low=1e-6, high=1e6), p.number("high_freq_factor", low=1e-6, high=1e6)
        if not high > low:
            p.problem("high_freq_factor", high, f"must exceed low_freq_factor = {low:g}")
        spec |= {"low_freq_factor": low, "high_freq_factor": high}
    if kind in ("yarn", "longrope"):
        spec["attention_factor"] = p.optional_number("attention_factor", low=0.0, high=1e3)
    if kind == "yarn":
        spec |= {
            name: p.number(name, default, low=0.0, high=1e4) or default
            for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("mscale", 0.0), ("mscale_all_dim", 0.0))
        }
        spec["truncate"] = p.flag("truncate", True)
    if kind == "longrope":
        spec |= {name: p.numbers(name, dim // 2) for name in ("short_factor", "long_factor")}
    return RopeSpec(**spec)


def reach(spec: RopeSpec, context: int) -> int:
    """The longest context the embedding is stretched to, `context` being max_position_embeddings."""
    stretched = spec.kind in ("linear", "dynamic", "ntk", "yarn")
    return max(context, int(spec.trained * spec.factor)) if stretched else context


def _powers(dim: int, theta: float) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float32(theta), exponents)


def inv_freq(spec: RopeSpec, context: int) -> tuple[np.ndarray, float]:
    """Radians per position, float32 (dim / 2,), and the factor on cos and sin."""
    dim, one = spec.dim, np.float32(1.0)
    if spec.kind == "ntk":
        return one / _powers(dim, spec.theta * spec.factor ** (dim / (dim - 2))), 1.0
    if spec.kind == "dynamic":
        stretch = spec.factor * max(context, spec.trained) / spec.trained - (spec.factor - 1)
        return one / _powers(dim, spec.theta * stretch ** (dim / (dim - 2))), 1.0
    if spec.kind == "yarn":
        return _yarn(spec)
    if spec.kind == "longrope":
        return _longrope(spec, context)
    plain = one / _powers(dim, spec.theta)
    if spec.kind == "linear":
        return plain / np.float32(spec.factor), 1.0
    if spec.kind == "llama3":
        return _llama3(spec, plain), 1.0
    return plain, 1.0


def _llama3(spec: RopeSpec, plain: np.ndarray) -> np.ndarray:
    low, high, factor = spec.low_freq_factor, spec.high_freq_factor, np.float32(spec.factor)
    turns = np.float32(spec.trained) / (np.float32(2 * math.pi) / plain)  # rotations within the trained length
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    mixed = (1 - smooth) * plain / factor + smooth * plain
    return np.where(turns < low, plain / factor, np.where(turns > high, plain, mixed)).astype(np.float32)


def _yarn(spec: RopeSpec) -> tuple[np.ndarray, float]:
    dim = spec.dim

    def index_of(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times within the trained length."""
        return dim * math.log(spec.trained / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = index_of(spec.beta_fast), index_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep, powers = np.float32(1) - ramp, _powers(dim, spec.theta)
    mixed = (1 / (np.float32(spec.factor) * powers)) * (1 - keep) + (1 / powers) * keep

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(spec.factor) + 1.0 if spec.factor > 1 else 1.0

    if spec.attention_factor is not None:
        return mixed, spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return mixed, temperature(spec.mscale) / temperature(spec.mscale_all_dim)
    return mixed, temperature(1.0)


def _longrope(spec: RopeSpec, context: int) -> tuple[np.ndarray, float]:
    stretch = np.array(spec.long_factor if context > spec.trained else spec.short_factor, np.float32)
    factor = spec.attention_factor
    if factor is None:
        factor = math.sqrt(1 + math.log(spec.factor) / math.log(spec.trained)) if spec.factor > 1 else 1.0
    return np.float32(1) / (stretch * _powers(spec.dim, spec.theta)), factor


def tables(spec: RopeSpec, context: int) -> Rope:
    """cos and sin for positions 0 .. context - 1."""
    freq, factor = inv_freq(spec, context)
    cos = np.empty((context, spec.dim // 2), np.float32)
    sin = np.empty_like(cos)
    for start in range(0, context, _CHUNK):
        stop = min(start + _CHUNK, context)
        angle = (np.arange(start, stop, dtype=np.float32)[:, None] * freq).astype(np.float64)
        cos[start:stop] = np.cos(angle) * factor
        sin[start:stop] = np.sin(angle) * factor
    return Rope(spec.dim, cos, sin)
