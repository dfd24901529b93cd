"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers, all experts resident.   arXiv:2505.09388"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.fields import Fields
from paceline.ops import Array


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    c = blocks.read_decoder(f, "qwen3_moe", context=32768)
    n_experts = f.integer(("num_experts", "num_local_experts"), 128, high=1 << 12)
    step = f.integer("decoder_sparse_step", 1, high=1 << 10)
    plain = f.layers("mlp_only_layers", c.n_layers)
    windows = blocks.windows_of(f, c.n_layers) if f.flag("use_sliding_window", False) else ()
    return blocks.finish(
        f,
        c,
        windows=windows,
        rope={"full": rope.read(f, c.head_dim, c.context)},
        bias=f.flag("attention_bias", False),
        sparse=tuple(i not in plain and (i + 1) % step == 0 for i in range(c.n_layers)),
        d_expert=f.integer("moe_intermediate_size", high=1 << 20),
        n_experts=n_experts,
        n_active=f.integer("num_experts_per_tok", 8, high=n_experts),
        normalise=f.flag("norm_topk_prob", False),
    )


class Net(Model):
    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c, e = config, config.extra

        def layer(i: int) -> dict[str, Param]:
            params = blocks.attention_params(
                c, i, bias=e["bias"], out_bias=e["bias"], norms=(c.head_dim, c.head_dim)
            ) | blocks.norm_params(c, i, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
            if not e["sparse"][i]:
                return params | blocks.mlp_params(c, i)
            return params | blocks.moe_params(
                c, i, block="mlp", gate_up=("gate_proj", "up_proj"), down="down_proj", d_ff=e["d_expert"]
            )

        return blocks.decoder_params(c, layer)

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        feed = blocks.moe if self.config.extra["sparse"][i] else blocks.mlp
        return blocks.pre_norm_layer(self, i, x, batch, feed)
