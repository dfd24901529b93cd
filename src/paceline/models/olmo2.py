"""OLMo 2: norms after each block instead of before, and over the whole query and key.   arXiv:2501.00656"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    c = blocks.read_decoder(f, "olmo2", eps=1e-5)
    bias = f.flag("attention_bias", False)
    return blocks.finish(f, c, rope={"full": rope.read(f, c.head_dim, c.context)}, bias=bias)


class Net(Model):
    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c, bias = config, config.extra["bias"]
        norms = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim)
        return blocks.decoder_params(
            c,
            lambda i: (
                blocks.attention_params(c, i, bias=bias, out_bias=bias, norms=norms)
                | blocks.mlp_params(c, i)
                | blocks.norm_params(c, i, attn_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
            ),
        )

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        x = self.ops.add(x, self.rms(f"layers.{i}.attn_norm", blocks.attention(self, i, x, batch)))
        return self.ops.add(x, self.rms(f"layers.{i}.mlp_norm", blocks.mlp(self, i, x, batch)))
