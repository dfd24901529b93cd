"""Llama 2 and 3.x, SmolLM2, TinyLlama, and everything else of this shape.   arXiv:2302.13971, arXiv:2407.21783"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    c = blocks.read_decoder(f, "llama")
    bias = f.flag("attention_bias", False)
    ropes = {"full": rope.read(f, c.head_dim, c.context)}
    return blocks.finish(f, c, rope=ropes, qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", False))


class Net(Model):
    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c, e = config, config.extra
        return blocks.decoder_params(
            c,
            lambda i: (
                blocks.attention_params(c, i, bias=e["qkv_bias"], out_bias=e["out_bias"])
                | blocks.mlp_params(c, i, bias=e["mlp_bias"])
                | blocks.norm_params(c, i, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
            ),
        )

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        return blocks.pre_norm_layer(self, i, x, batch)
