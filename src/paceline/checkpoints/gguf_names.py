"""From GGUF's tensor names to those of a Hugging Face checkpoint, with what the conversion to GGUF did to the numbers.

The converters of llama.cpp rearrange some tensors: llama's query and key rows are interleaved for its rotary embedding,
gemma's norms have 1 added, GPT-2's matrices are transposed, experts are stacked. `sources` says how to undo each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from paceline.core.errors import CheckpointError

# GGUF architecture -> model_type of config.json ("llama" also covers mistral and mixtral, see gguf_config)
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "gemma2": "gemma2",
                 "gemma3": "gemma3_text", "phi3": "phi3", "gpt2": "gpt2", "olmo2": "olmo2"}  # fmt: skip

_ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj"}  # fmt: skip
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORM = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_SANDWICH = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_POST_NORM}
_GPT2 = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
         "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip

_LAYER: dict[str, dict[str, str]] = {
    "llama": {**_ATTENTION, **_MLP, **_PRE_NORM, "ffn_gate_inp": "block_sparse_moe.gate"},
    "qwen2": {**_ATTENTION, **_MLP, **_PRE_NORM},
    "qwen3": {**_ATTENTION, **_QK_NORM, **_MLP, **_PRE_NORM},
    "qwen3moe": {**_ATTENTION, **_QK_NORM, **_MLP, **_PRE_NORM, "ffn_gate_inp": "mlp.gate"},
    "gemma2": {**_ATTENTION, **_MLP, **_SANDWICH},
    "gemma3": {**_ATTENTION, **_QK_NORM, **_MLP, **_SANDWICH},
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
             "ffn_down": "mlp.down_proj", **_PRE_NORM},
    "olmo2": {**_ATTENTION, **_QK_NORM, **_MLP, **_POST_NORM},
    "gpt2": _GPT2,
}  # fmt: skip
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TOP_GPT2 = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
             "output": "lm_head"}  # fmt: skip

# stacked or single experts: architecture -> kind -> name with the expert's number
_EXPERTS = {
    "llama": {"gate": "block_sparse_moe.experts.{}.w1", "down": "block_sparse_moe.experts.{}.w2",
              "up": "block_sparse_moe.experts.{}.w3"},
    "qwen3moe": {k: f"mlp.experts.{{}}.{k}_proj" for k in ("gate", "up", "down")},
}  # fmt: skip
MAX_EXPERTS = 4096
NO_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # they become config


@dataclass(frozen=True)
class Source:
    """Where a Hugging Face tensor comes from. heads: its rows are llama's interleaved halves of that many heads."""

    name: str
    expert: int | None = None
    heads: int = 0
    minus_one: bool = False
    transpose: bool = False


def sources(arch: str, shapes: Mapping[str, tuple[int, ...]], n_heads: int, n_kv_heads: int) -> dict[str, Source]:
    """Hugging Face name -> source. Tensors nobody knows keep their GGUF name, for the loader to complain about."""
    out: dict[str, Source] = {}
    for name, shape in shapes.items():
        if name in NO_WEIGHTS:
            continue
        for new, source in _names(arch, name, shape, n_heads, n_kv_heads):
            if new in out:
                raise CheckpointError(
                    f"tensors {out[new].name!r} and {name!r} both mean {new!r}; the file contradicts itself"
                )
            out[new] = source
    return out


def _names(arch: str, name: str, shape: tuple[int, ...], n_heads: int, n_kv_heads: int) -> list[tuple[str, Source]]:
    stem, _, ending = name.rpartition(".")
    top = (_TOP_GPT2 if arch == "gpt2" else _TOP).get(stem)
    if top:
        minus_one = arch in ("gemma2", "gemma3") and stem == "output_norm"
        return [(f"{top}.{ending}", Source(name, minus_one=minus_one))]
    m = re.fullmatch(r"blk\.(\d{1,5})\.([a-z_]+?)(?:_(exps)|\.(\d{1,5}))?", stem)
    if not m:
        return [(name, Source(name))]
    layer = f"{'transformer.h' if arch == 'gpt2' else 'model.layers'}.{int(m[1])}"
    part = m[2]
    expert = _EXPERTS.get(arch, {}).get(part.removeprefix("ffn_")) if m[3] or m[4] else None
    if expert and m[3] and len(shape) == 3 and shape[0] <= MAX_EXPERTS:
        return [(f"{layer}.{expert.format(e)}.{ending}", Source(name, expert=e)) for e in range(shape[0])]
    if expert and m[4]:
        return [(f"{layer}.{expert.format(int(m[4]))}.{ending}", Source(name))]
    new = None if m[3] or m[4] else _LAYER[arch].get(part)
    if new is None:
        return [(name, Source(name))]
    heads = {"attn_q": n_heads, "attn_k": n_kv_heads}.get(part, 0) if arch == "llama" else 0
    source = Source(
        name,
        heads=heads,
        minus_one=arch in ("gemma2", "gemma3") and part.endswith("norm"),
        transpose=arch == "gpt2" and len(shape) == 2,
    )
    return [(f"{layer}.{new}.{ending}", source)]
