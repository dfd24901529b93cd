"""Qwen3 (dense): queries and keys are normalised per head before the rotary embedding.   arXiv:2505.09388"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    c = blocks.read_decoder(f, "qwen3", defaults={"head_dim": 128}, context=32768)
    bias = f.flag("attention_bias", False)
    ropes = {"full": rope.read(f, c.head_dim, c.context)}
    return blocks.finish(f, c, windows=blocks.qwen_windows(f, c.n_layers), rope=ropes, bias=bias)


class Net(Model):
    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c, bias = config, config.extra["bias"]
        norms = (c.head_dim, c.head_dim)
        return blocks.decoder_params(
            c,
            lambda i: (
                blocks.attention_params(c, i, bias=bias, out_bias=bias, norms=norms)
                | blocks.mlp_params(c, i)
                | blocks.norm_params(c, i, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
            ),
        )

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        return blocks.pre_norm_layer(self, i, x, batch)
