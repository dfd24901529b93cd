"""From GGUF metadata to the fields of config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paceline.checkpoints.gguf_names import ARCHITECTURES, MAX_EXPERTS
from paceline.core.errors import CheckpointError

MAX_LAYERS = 4096


class Keys:
    """Typed access to the keys `<arch>.*`; a wrong type or an absurd value is a CheckpointError naming file and key."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, where: str):
        self.metadata, self.arch, self.where = metadata, arch, where

    def fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: metadata {self.arch}.{key} {problem}")

    def integer(self, key: str, default: int | None = None, *, high: int = 1 << 31) -> int:
        """An integer from 1 to high. A list of one per layer must agree in all layers."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if value is None:
            raise self.fail(key, "is missing; the file is incomplete, convert the model again")
        if type(value) is not int or not 1 <= value <= high:
            raise self.fail(key, f"= {str(value)[:60]}: must be one integer from 1 to {high}")
        return value

    def optional(self, key: str) -> int | None:
        return self.integer(key) if f"{self.arch}.{key}" in self.metadata else None

    def number(self, key: str, default: float | None = None) -> float | None:
        """A finite number; single precision values are given by their shortest decimal, as config.json would."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            return None
        if type(value) not in (int, float) or not np.isfinite(value) or abs(value) > 1e30:
            raise self.fail(key, f"= {str(value)[:60]}: must be a finite number")
        return float(str(np.float32(value)))

    def text(self, key: str) -> str | None:
        value = self.metadata.get(f"{self.arch}.{key}")
        if value is not None and not isinstance(value, str):
            raise self.fail(key, f"= {str(value)[:60]}: must be a string")
        return value


def architecture(metadata: Mapping[str, Any], where: str) -> str:
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(f"{where}: general.architecture = {str(arch)[:60]!r} is not supported; known are {known}")
    return arch


def config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, np.ndarray],
           where: str) -> dict[str, Any]:  # fmt: skip
    """config.json of the model. `shapes`: the file's tensors; `factors`: its rope_freqs and rope_factors tensors."""
    arch = architecture(metadata, where)
    keys = Keys(metadata, arch, where)
    table = shapes.get("token_embd.weight", ())
    if len(table) != 2:
        raise CheckpointError(f"{where}: has no matrix token_embd.weight; the file is incomplete")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > table[0]:
        raise CheckpointError(
            f"{where}: has {len(tokens)} tokens but embeddings for {table[0]}; the file contradicts itself"
        )
    common = {
        "model_type": ARCHITECTURES[arch],
        "vocab_size": table[0],
        "tie_word_embeddings": "output.weight" not in shapes,
        **_token_ids(metadata),
    }
    n_layers = keys.integer("block_count", high=MAX_LAYERS)
    if arch == "gpt2":
        return {**common, **_gpt2(keys, n_layers)}
    d_model, n_heads = keys.integer("embedding_length"), keys.integer("attention.head_count", high=1 << 16)
    head_dim = keys.integer("attention.key_length", d_model // n_heads or 1)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.fail("attention.value_length", f"differs from the key length {head_dim}, which is not supported")
    out = {
        **common,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", n_heads, high=1 << 16),
        "head_dim": head_dim,
        "intermediate_size": keys.integer("feed_forward_length", 1 if arch == "qwen3moe" else None),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    _rope(out, keys, head_dim, factors)
    family = {"llama": _llama, "qwen3moe": _qwen3_moe, "gemma2": _gemma, "gemma3": _gemma, "phi3": _phi3}.get(arch)
    if family:
        family(out, keys)
    return out


def generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: what the file says of the ends of text."""
    return _token_ids(metadata)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    def token(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int and 0 <= value < 1 << 31 else None

    ends = [t for t in dict.fromkeys(token(k) for k in ("eos", "eot", "eom")) if t is not None]
    out: dict[str, Any] = {"bos_token_id": token("bos"), "pad_token_id": token("padding")}
    out["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return out


def _gpt2(keys: Keys, n_layers: int) -> dict[str, Any]:
    d_model = keys.integer("embedding_length")
    return {
        "n_embd": d_model,
        "n_layer": n_layers,
        "n_head": keys.integer("attention.head_count", high=1 << 16),
        "n_positions": keys.integer("context_length"),
        "n_inner": keys.integer("feed_forward_length", 4 * d_model),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon", 1e-5),
        "activation_function": "gelu_new",
    }


def _llama(out: dict[str, Any], keys: Keys) -> None:
    experts, window = keys.optional("expert_count"), keys.optional("attention.sliding_window")
    if experts:
        out["model_type"] = "mixtral"
        out["num_local_experts"] = keys.integer("expert_count", high=MAX_EXPERTS)
        out["num_experts_per_tok"] = keys.integer("expert_used_count", high=experts)
        out["sliding_window"] = window
    elif window:
        out["model_type"], out["sliding_window"] = "mistral", window


def _qwen3_moe(out: dict[str, Any], keys: Keys) -> None:
    experts = keys.integer("expert_count", high=MAX_EXPERTS)
    out |= {
        "num_experts": experts,
        "num_experts_per_tok": keys.integer("expert_used_count", high=experts),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(out: dict[str, Any], keys: Keys) -> None:
    """Gemma 2 and 3. GGUF stores no query_pre_attn_scalar: it is the head size, but d_model / n_heads in the 27B
    models.
    """
    n_layers = out["num_hidden_layers"]
    largest = {"gemma2": 46, "gemma3": 62}[keys.arch]
    scalar = out["hidden_size"] // out["num_attention_heads"] if n_layers == largest else out["head_dim"]
    out |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.integer("attention.sliding_window", 4096 if keys.arch == "gemma2" else 1024),
        "layer_types": _layer_types(keys, n_layers),
    }
    if keys.arch == "gemma2":
        out["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
        out["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0)
    else:
        out["rope_local_base_freq"] = keys.number("rope.freq_base_swa", 10000.0)
        out["final_logit_softcapping"] = keys.number("final_logit_softcapping")


def _layer_types(keys: Keys, n_layers: int) -> list[str]:
    """Which layers slide: by the file's pattern, or every second (Gemma 2) or sixth (Gemma 3) sees everything."""
    pattern = keys.metadata.get(f"{keys.arch}.attention.sliding_window_pattern", 2 if keys.arch == "gemma2" else 6)
    if type(pattern) is int and 0 < pattern <= MAX_LAYERS:
        slides = [(i + 1) % pattern != 0 for i in range(n_layers)]
    elif isinstance(pattern, list) and len(pattern) == n_layers:
        slides = [bool(p) for p in pattern]
    else:
        raise keys.fail(
            "attention.sliding_window_pattern", f"= {str(pattern)[:60]}: must be a period or one flag per layer"
        )
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _phi3(out: dict[str, Any], keys: Keys) -> None:
    out["sliding_window"] = keys.optional("attention.sliding_window")
    trained = keys.optional("rope.scaling.original_context_length")
    if trained:
        out["original_max_position_embeddings"] = trained


def _rope(out: dict[str, Any], keys: Keys, head_dim: int, factors: Mapping[str, np.ndarray]) -> None:
    default = 1e6 if keys.arch == "gemma3" else 10000.0
    out["rope_theta"] = keys.number("rope.freq_base", default)
    dim = keys.integer("rope.dimension_count", head_dim)
    if dim != head_dim:
        out["partial_rotary_factor"] = dim / head_dim
    scaling = _scaling(out, keys, dim, factors)
    if scaling:
        out["rope_scaling"] = scaling


def _scaling(out: dict[str, Any], keys: Keys, dim: int, factors: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    short, long = factors.get("rope_factors_short.weight"), factors.get("rope_factors_long.weight")
    if short is not None and long is not None:
        _check_factors(keys, dim, short, long)
        scaling = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
        attention = keys.number("rope.scaling.attn_factor")
        return scaling if attention is None else {**scaling, "attention_factor": attention}
    freqs = factors.get("rope_freqs.weight")
    if freqs is not None:
        _check_factors(keys, dim, freqs)
        return llama3_scaling(freqs, out["rope_theta"], dim)
    kind, factor = keys.text("rope.scaling.type"), keys.number("rope.scaling.factor")
    if kind in (None, "none") or not factor:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(out, keys, factor)
    raise keys.fail("rope.scaling.type", f"= {kind[:40]!r}: is not supported here; known are none, linear and yarn")


def _yarn(out: dict[str, Any], keys: Keys, factor: float) -> dict[str, Any]:
    trained = keys.integer("rope.scaling.original_context_length", out["max_position_embeddings"])
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    for name in ("beta_fast", "beta_slow"):
        value = keys.number(f"rope.scaling.yarn_{name}")
        if value is not None:
            scaling[name] = value
    return scaling


def _check_factors(keys: Keys, dim: int, *factors: np.ndarray) -> None:
    for f in factors:
        if f.shape != (dim // 2,) or not np.isfinite(f).all() or (f <= 0).any():
            raise CheckpointError(
                f"{keys.where}: the tensor of rotary factors must hold {dim // 2} positive numbers, has shape {f.shape}"
            )


def llama3_scaling(factors: np.ndarray, theta: float, dim: int) -> dict[str, Any]:
    """rope_scaling of config.json for per-frequency divisors (dim / 2,) as GGUF stores them.

    They come from Llama 3's smooth interpolation, whose parameters all published models share but for `factor`, the
    largest divisor; when that reproduces the divisors it is given by name, otherwise the divisors themselves as
    "longrope", which says the same.
    """
    factor, low, high, trained = float(factors.max()), 1.0, 4.0, 8192
    turns = trained * theta ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
    smooth = (turns - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(turns < low, factor, np.where(turns > high, 1.0, between))
    if np.allclose(factors, expected, rtol=1e-4):
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": trained}  # fmt: skip
    numbers = factors.astype(float).tolist()
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "short_factor": numbers,
        "long_factor": numbers,
        "attention_factor": 1.0,
    }
