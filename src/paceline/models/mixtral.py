"""Mixtral: Mistral with a mixture of experts in place of each MLP.   arXiv:2401.04088"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    c = blocks.read_decoder(f, "mixtral", context=131072, eps=1e-5)
    n_experts = f.integer(("num_local_experts", "num_experts"), 8, high=1 << 12)
    return blocks.finish(
        f,
        c,
        windows=blocks.windows_of(f, c.n_layers),
        rope={"full": rope.read(f, c.head_dim, c.context, theta=1e6)},
        n_experts=n_experts,
        n_active=f.integer("num_experts_per_tok", 2, high=n_experts),
        normalise=True,
    )


class Net(Model):
    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c = config
        return blocks.decoder_params(
            c,
            lambda i: (
                blocks.attention_params(c, i)
                | blocks.moe_params(c, i, block="block_sparse_moe", gate_up=("w1", "w3"), down="w2", d_ff=c.d_ff)
                | blocks.norm_params(c, i, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
            ),
        )

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        return blocks.pre_norm_layer(self, i, x, batch, blocks.moe)
