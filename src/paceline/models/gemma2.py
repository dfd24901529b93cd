"""Gemma 2: norms around each block, soft-capped scores and logits, every other layer windowed.   arXiv:2408.00118"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000}


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    names = ("hidden_activation", "hidden_act")
    c = blocks.read_decoder(
        f, "gemma2", defaults=SIZES, context=8192, tied=True, act=names, act_default="gelu_pytorch_tanh"
    )
    scale = f.number("query_pre_attn_scalar", 256, low=1e-3, high=1e6) ** -0.5
    return blocks.finish(
        f,
        c,
        windows=blocks.windows_of(f, c.n_layers, [i % 2 == 0 for i in range(c.n_layers)], size=4096),
        scales=[scale] * c.n_layers,
        softcap=f.optional_number("attn_logit_softcapping", 50.0, low=1e-3, high=1e6),
        rope={"full": rope.read(f, c.head_dim, c.context)},
        logit_softcap=f.optional_number("final_logit_softcapping", 30.0, low=1e-3, high=1e6),
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
                blocks.attention_params(c, i, bias=bias, out_bias=bias)
                | blocks.mlp_params(c, i)
                | blocks.sandwich_norm_params(c, i)
            ),
        )

    def embed(self, batch: Any) -> Array:
        return blocks.scaled_embed(self, batch)

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        return blocks.sandwich_layer(self, i, x, batch)

    def head(self, x: Array) -> Array:
        return blocks.capped_head(self, x)
