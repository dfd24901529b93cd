"""GPT-2: learned positions, LayerNorm, a plain GELU MLP, weights stored transposed.   Radford et al. 2019"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks
from paceline.models.base import Model, ModelConfig, Param
from paceline.models.blocks import Params
from paceline.models.fields import MAX_CONTEXT, Fields
from paceline.ops import Array


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    d = f.integer(("n_embd", "hidden_size"), high=1 << 17)
    n_heads = f.integer(("n_head", "num_attention_heads"), high=1 << 12)
    n_layers = f.integer(("n_layer", "num_hidden_layers"), high=1 << 10)
    n_vocab = f.integer("vocab_size", high=1 << 22)
    if d % n_heads:
        f.problem("n_embd", d, f"must be divisible by n_head = {n_heads}")
    if f.flag("add_cross_attention", False):
        f.problem("add_cross_attention", True, "an encoder-decoder model; only decoders are supported")
    bos = f.ids("bos_token_id", n_vocab)
    scale = (d // n_heads) ** -0.5 if f.flag("scale_attn_weights", True) else 1.0
    by_layer = f.flag("scale_attn_by_inverse_layer_idx", False)
    c = ModelConfig(
        model_type="gpt2",
        n_layers=n_layers,
        d_model=d,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=max(1, d // n_heads),
        d_ff=f.integer("n_inner", 4 * d, high=1 << 20),
        n_vocab=n_vocab,
        context=f.integer(("n_positions", "max_position_embeddings", "n_ctx"), 1024, high=MAX_CONTEXT),
        eps=f.number("layer_norm_epsilon", 1e-5, low=0.0, high=1.0),
        tied=f.flag("tie_word_embeddings", True),
        act=f.activation("activation_function", "gelu_new"),
        eos=f.ids("eos_token_id", n_vocab),
        bos=bos[0] if bos else None,
    )
    return blocks.finish(f, c, scales=[scale / (i + 1) if by_layer else scale for i in range(n_layers)], rope={})


class Net(Model):
    ignored = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)

    @staticmethod
    def params(config: ModelConfig) -> dict[str, Param]:
        c, d = config, config.d_model
        params = {
            "embed": Param(("transformer.wte.weight",), (c.n_vocab, d), "embed"),
            "positions": Param(("transformer.wpe.weight",), (c.context, d), "position"),
        }
        for i in range(c.n_layers):
            name, source = f"layers.{i}", f"transformer.h.{i}"
            params |= _norm(f"{name}.attn_norm", f"{source}.ln_1", d)
            params |= _conv1d(f"{name}.attn.qkv", f"{source}.attn.c_attn", 3 * d, d)
            params |= _conv1d(f"{name}.attn.out", f"{source}.attn.c_proj", d, d)
            params |= _norm(f"{name}.mlp_norm", f"{source}.ln_2", d)
            params |= _conv1d(f"{name}.mlp.up", f"{source}.mlp.c_fc", c.d_ff, d)
            params |= _conv1d(f"{name}.mlp.down", f"{source}.mlp.c_proj", d, c.d_ff)
        params |= _norm("norm", "transformer.ln_f", d)
        if not c.tied:
            params["head"] = Param(("lm_head.weight",), (c.n_vocab, d), "head")
        return params

    def embed(self, batch: Any) -> Array:
        rows = self.ops.embed(batch, self.matrix("embed"))
        return self.ops.add(rows, self.ops.embed(batch, self.matrix("positions"), by="positions"))

    def layer(self, i: int, x: Array, batch: Any) -> Array:
        ops, name = self.ops, f"layers.{i}"
        x = ops.add(x, blocks.attention(self, i, self._norm(f"{name}.attn_norm", x), batch, rope=None))
        y = ops.act(self.linear(f"{name}.mlp.up", self._norm(f"{name}.mlp_norm", x), batch), self.config.act)
        return ops.add(x, self.linear(f"{name}.mlp.down", y, batch))

    def norm(self, x: Array) -> Array:
        return self._norm("norm", x)

    def _norm(self, name: str, x: Array) -> Array:
        return self.ops.layer_norm(x, self.vector(name), self.vector(f"{name}.bias"), self.config.eps)


def _norm(name: str, source: str, n: int) -> Params:
    return {name: blocks.vector(f"{source}.weight", n), f"{name}.bias": blocks.vector(f"{source}.bias", n)}


def _conv1d(name: str, source: str, n_out: int, n_in: int) -> Params:
    weight = Param((f"{source}.weight",), (n_out, n_in), transpose=True)
    return {name: weight, f"{name}.bias": blocks.vector(f"{source}.bias", n_out)}
