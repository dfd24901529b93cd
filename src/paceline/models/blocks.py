"""What decoder families share: reading their common configuration, naming their parameters, and the blocks of a layer.

The forward blocks follow the parameters: a projection has a bias, queries and keys are normalised, where `params` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from paceline.core.specs import KV, AttnSpec, StateSpec, Window
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import MAX_CONTEXT, REQUIRED, Fields
from paceline.models.rope import RopeSpec, reach
from paceline.ops import Array, Experts

# ---------------------------------------------------------------- configuration


def read_decoder(
    f: Fields,
    model_type: str,
    *,
    defaults: Mapping[str, int] | None = None,
    context: int = 2048,
    eps: float = 1e-6,
    tied: bool = False,
    act: str | Sequence[str] = "hidden_act",
    act_default: str = "silu",
) -> ModelConfig:
    """What Hugging Face decoders have in common. `defaults` are sizes that the family's configs may leave out."""
    sizes = dict(defaults or {})
    d = f.integer("hidden_size", sizes.get("hidden_size", REQUIRED), high=1 << 17)
    n_heads = f.integer("num_attention_heads", sizes.get("num_attention_heads", REQUIRED), high=1 << 12)
    n_vocab = f.integer("vocab_size", sizes.get("vocab_size", REQUIRED), high=1 << 22)
    if "head_dim" not in sizes and not f.has("head_dim") and d % n_heads:
        f.problem("hidden_size", d, f"must be divisible by num_attention_heads = {n_heads} where head_dim is not given")
    bos = f.ids("bos_token_id", n_vocab)
    return ModelConfig(
        model_type=model_type,
        n_layers=f.integer("num_hidden_layers", sizes.get("num_hidden_layers", REQUIRED), high=1 << 10),
        d_model=d,
        n_heads=n_heads,
        n_kv_heads=f.integer("num_key_value_heads", sizes.get("num_key_value_heads", n_heads), high=1 << 12),
        head_dim=f.integer("head_dim", sizes.get("head_dim", max(1, d // n_heads)), high=1 << 12),
        d_ff=f.integer("intermediate_size", sizes.get("intermediate_size", REQUIRED), high=1 << 20),
        n_vocab=n_vocab,
        context=f.integer("max_position_embeddings", context, high=MAX_CONTEXT),
        eps=f.number("rms_norm_eps", eps, low=0.0, high=1.0),
        tied=f.flag("tie_word_embeddings", tied),
        act=f.activation(act, act_default),
        eos=f.ids("eos_token_id", n_vocab),
        bos=bos[0] if bos else None,
    )


def windows_of(
    f: Fields, n_layers: int, default: Sequence[bool] | None = None, *, size: int | None = None
) -> list[int | None]:
    """Each layer's window: `layer_types` where given, else `default` (by default every layer is windowed).

    `size` is the window where the config names none.
    """
    if "sliding_window" in f.raw:
        size = f.optional_integer("sliding_window", high=MAX_CONTEXT)
    types = f.layer_types(n_layers)
    windowed = [t == "sliding_attention" for t in types] if types else list(default or [True] * n_layers)
    if types and any(windowed) and size is None:
        f.problem("layer_types", "sliding_attention", "needs sliding_window, the size of the window")
    return [size if w else None for w in windowed]


def qwen_windows(f: Fields, n_layers: int) -> list[int | None]:
    """Qwen's rule: windows only with use_sliding_window, and then from layer max_window_layers on."""
    if not f.flag("use_sliding_window", False):
        return [None] * n_layers
    first = f.integer("max_window_layers", 28, low=0, high=1 << 10)
    return windows_of(f, n_layers, [i >= first for i in range(n_layers)], size=4096)


def finish(
    f: Fields,
    c: ModelConfig,
    *,
    windows: Sequence[int | None] = (),
    scales: Sequence[float] = (),
    softcap: float | None = None,
    rope: Mapping[str, RopeSpec],
    **extra: Any,
) -> ModelConfig:
    """`c` checked and completed: how each layer attends and what it keeps. Raises CheckpointError with all problems."""
    if c.n_heads % c.n_kv_heads:
        f.problem("num_attention_heads", c.n_heads, f"must be a multiple of num_key_value_heads = {c.n_kv_heads}")
    f.check()
    windows = list(windows) or [None] * c.n_layers
    scales = list(scales) or [c.head_dim**-0.5] * c.n_layers
    attn = tuple(
        AttnSpec(c.n_heads, c.n_kv_heads, c.head_dim, scale, window, softcap)
        for scale, window in zip(scales, windows, strict=True)
    )
    states: tuple[StateSpec, ...] = tuple(
        Window(c.n_kv_heads, c.head_dim, w) if w else KV(c.n_kv_heads, c.head_dim) for w in windows
    )
    longest = max([c.context, *(reach(spec, c.context) for spec in rope.values())])
    return replace(c, attn=attn, states=states, rope=dict(rope), max_context=longest, extra=extra)


# ---------------------------------------------------------------- parameters

Params = dict[str, Param]


def vector(source: str, n: int) -> Param:
    return Param((source,), (n,), "vector")


def decoder_params(c: ModelConfig, layer: Callable[[int], Params]) -> Params:
    """Embedding, layers, final norm and the untied head, under the names most families use."""
    params = {"embed": Param(("model.embed_tokens.weight",), (c.n_vocab, c.d_model), "embed")}
    for i in range(c.n_layers):
        params |= layer(i)
    params["norm"] = vector("model.norm.weight", c.d_model)
    if not c.tied:
        params["head"] = Param(("lm_head.weight",), (c.n_vocab, c.d_model), "head")
    return params


def attention_params(
    c: ModelConfig,
    i: int,
    *,
    qkv: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    bias: bool = False,
    out_bias: bool = False,
    norms: tuple[int, int] | None = None,
) -> Params:
    """Fused QKV and output projection of layer i; `norms` are the lengths of the query and key norms."""
    name, source = f"layers.{i}.attn", f"model.layers.{i}.self_attn"
    n_q, n_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    rows = (n_q, n_kv, n_kv) if len(qkv) == 3 else ()
    params = {
        f"{name}.qkv": Param(tuple(f"{source}.{s}.weight" for s in qkv), (n_q + 2 * n_kv, c.d_model), rows=rows),
        f"{name}.out": Param((f"{source}.o_proj.weight",), (c.d_model, n_q)),
    }
    if bias:
        sources = tuple(f"{source}.{s}.bias" for s in qkv)
        params[f"{name}.qkv.bias"] = Param(sources, (n_q + 2 * n_kv,), "vector", rows=rows)
    if out_bias:
        params[f"{name}.out.bias"] = vector(f"{source}.o_proj.bias", c.d_model)
    if norms:
        params[f"{name}.q_norm"] = vector(f"{source}.q_norm.weight", norms[0])
        params[f"{name}.k_norm"] = vector(f"{source}.k_norm.weight", norms[1])
    return params


def mlp_params(
    c: ModelConfig, i: int, *, gate_up: Sequence[str] = ("gate_proj", "up_proj"), bias: bool = False
) -> Params:
    """The gated MLP of layer i, gate and up fused."""
    name, source = f"layers.{i}.mlp", f"model.layers.{i}.mlp"
    params = {
        f"{name}.gate_up": Param(tuple(f"{source}.{s}.weight" for s in gate_up), (2 * c.d_ff, c.d_model)),
        f"{name}.down": Param((f"{source}.down_proj.weight",), (c.d_model, c.d_ff)),
    }
    if bias:
        sources = tuple(f"{source}.{s}.bias" for s in gate_up)
        params[f"{name}.gate_up.bias"] = Param(sources, (2 * c.d_ff,), "vector")
        params[f"{name}.down.bias"] = vector(f"{source}.down_proj.bias", c.d_model)
    return params


def sandwich_norm_params(c: ModelConfig, i: int) -> Params:
    return norm_params(
        c,
        i,
        attn_norm="input_layernorm",
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )


def norm_params(c: ModelConfig, i: int, **sources: str) -> Params:
    """RMS norms of layer i by our name = the checkpoint's."""
    return {
        f"layers.{i}.{name}": vector(f"model.layers.{i}.{source}.weight", c.d_model) for name, source in sources.items()
    }


def moe_params(c: ModelConfig, i: int, *, block: str, gate_up: Sequence[str], down: str, d_ff: int) -> Params:
    """Router and resident experts of layer i; `block` is the checkpoint's name of the mixture."""
    name, source = f"layers.{i}.moe", f"model.layers.{i}.{block}"
    n = c.extra["n_experts"]
    params = {f"{name}.router": Param((f"{source}.gate.weight",), (n, c.d_model), "router")}
    for e in range(n):
        expert = f"{source}.experts.{e}"
        fused = tuple(f"{expert}.{s}.weight" for s in gate_up)
        params[f"{name}.{e}.gate_up"] = Param(fused, (2 * d_ff, c.d_model))
        params[f"{name}.{e}.down"] = Param((f"{expert}.{down}.weight",), (c.d_model, d_ff))
    return params


# ---------------------------------------------------------------- forward


def attention(m: Model, i: int, x: Array, batch: Any, rope: str | None = "full") -> Array:
    """Projections, optional query/key norms, rotary embedding, attention, output projection."""
    c, ops, name = m.config, m.ops, f"layers.{i}.attn"
    n_q, n_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    q, k, v = ops.split(m.linear(f"{name}.qkv", x, batch), (n_q, n_kv, n_kv))
    if f"{name}.q_norm" in m.w:
        q, k = m.rms(f"{name}.q_norm", q), m.rms(f"{name}.k_norm", k)
    if rope:
        q, k = (ops.rope(y, batch, m.ropes[rope], c.head_dim) for y in (q, k))
    return m.linear(f"{name}.out", ops.attention(q, k, v, batch, i, c.attn[i]), batch)


def mlp(m: Model, i: int, x: Array, batch: Any) -> Array:
    """down(act(gate x) * up x)"""
    name = f"layers.{i}.mlp"
    return m.linear(f"{name}.down", m.ops.gated(m.linear(f"{name}.gate_up", x, batch), m.config.act), batch)


def moe(m: Model, i: int, x: Array, batch: Any) -> Array:
    """Each row's best experts, weighted by the router. No adapters: `batch` is there as in `mlp`."""
    name, extra = f"layers.{i}.moe", m.config.extra
    experts = Experts(
        gate_up=[m.matrix(f"{name}.{e}.gate_up") for e in range(extra["n_experts"])],
        down=[m.matrix(f"{name}.{e}.down") for e in range(extra["n_experts"])],
        n_active=extra["n_active"],
        kind=m.config.act,
        normalise=extra["normalise"],
    )
    return m.ops.moe(x, m.linear(f"{name}.router", x), experts)


def pre_norm_layer(m: Model, i: int, x: Array, batch: Any, feed: Callable[..., Array] = mlp) -> Array:
    """x + attention(norm x), then x + feed(norm x): Llama and most of its descendants."""
    x = m.ops.add(x, attention(m, i, m.rms(f"layers.{i}.attn_norm", x), batch))
    return m.ops.add(x, feed(m, i, m.rms(f"layers.{i}.mlp_norm", x), batch))


def scaled_embed(m: Model, batch: Any) -> Array:
    """The embedding times sqrt(d_model)."""
    return m.ops.scale(m.ops.embed(batch, m.matrix("embed")), m.config.d_model**0.5)


def capped_head(m: Model, x: Array) -> Array:
    """Logits, soft-capped where the config says so."""
    logits = m.logits(m.norm(x))
    cap = m.config.extra["logit_softcap"]
    return m.ops.softcap(logits, cap) if cap else logits


def sandwich_layer(m: Model, i: int, x: Array, batch: Any, rope: str = "full") -> Array:
    """x + norm(attention(norm x)), then x + norm(mlp(norm x)): Gemma 2 and 3."""
    name = f"layers.{i}"
    y = attention(m, i, m.rms(f"{name}.attn_norm", x), batch, rope)
    x = m.ops.add(x, m.rms(f"{name}.attn_post_norm", y))
    y = mlp(m, i, m.rms(f"{name}.mlp_norm", x), batch)
    return m.ops.add(x, m.rms(f"{name}.mlp_post_norm", y))
