"""Gemma 3 (text): as Gemma 2 with query/key norms for soft caps, five windowed layers to one full.   arXiv:2503.19786

Windowed layers rotate with their own small base; the full layers' embedding is the one that is stretched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array

# what the multi-modal checkpoints leave out of their text part
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    names = ("hidden_activation", "hidden_act")
    c = blocks.read_decoder(
        f, "gemma3_text", defaults=SIZES, context=131072, tied=True, act=names, act_default="gelu_pytorch_tanh"
    )
    if f.flag("use_bidirectional_attention", False):
        f.problem("use_bidirectional_attention", True, "an embedding model, which generates no text; use a causal one")
    period = f.integer("sliding_window_pattern", 6, high=1 << 10)
    scale = f.number("query_pre_attn_scalar", 256, low=1e-3, high=1e6) ** -0.5
    local = rope.read(
        f, c.head_dim, c.context, layer_type="sliding_attention", theta_field="rope_local_base_freq", scaled=False
    )
    full = rope.read(f, c.head_dim, c.context, layer_type="full_attention", theta=1e6)
    return blocks.finish(
        f,
        c,
        windows=blocks.windows_of(f, c.n_layers, [bool((i + 1) % period) for i in range(c.n_layers)], size=4096),
        scales=[scale] * c.n_layers,
        softcap=f.optional_number("attn_logit_softcapping", low=1e-3, high=1e6),
        rope={"full": full, "local": local},
        logit_softcap=f.optional_number("final_logit_softcapping", low=1e-3, high=1e6),
        bias=f.flag("attention_bias", False),
    )


class Net(Model):
    norm_offset = 1.0

    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c, bias = config, config.extra["bias"]
        return blocks.decoder_params(
            c,
            lambda i: (
                blocks.attention_params(c, i, bias=bias, out_bias=bias, norms=(c.head_dim, c.head_dim))
                | blocks.mlp_params(c, i)
                | blocks.sandwich_norm_params(c, i)
            ),
        )

    def embed(self, batch: Any) -> Array:
        return blocks.scaled_embed(self, batch)

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        return blocks.sandwich_layer(self, i, x, batch, "local" if self.config.attn[i].window else "full")

    def head(self, x: Array) -> Array:
        return blocks.capped_head(self, x)
