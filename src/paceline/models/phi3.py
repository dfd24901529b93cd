"""Phi-3, Phi-3.5 and Phi-4: Llama with QKV and gate|up stored fused, long contexts by LongRoPE.   arXiv:2404.14219"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    c = blocks.read_decoder(f, "phi3", context=4096, eps=1e-5)
    windows = blocks.windows_of(f, c.n_layers)
    return blocks.finish(f, c, windows=windows, rope={"full": rope.read(f, c.head_dim, c.context)})


class Net(Model):
    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c = config
        return blocks.decoder_params(
            c,
            lambda i: (
                blocks.attention_params(c, i, qkv=("qkv_proj",))
                | blocks.mlp_params(c, i, gate_up=("gate_up_proj",))
                | blocks.norm_params(c, i, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
            ),
        )

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        return blocks.pre_norm_layer(self, i, x, batch)
