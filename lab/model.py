"""A compact Llama whose parameter names are those of the Hugging Face checkpoint layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a model; every field is a count of elements except ``rope_theta`` and ``norm_eps``."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int = 4096
    context: int = 4096
    rope_theta: float = 100_000.0
    norm_eps: float = 1e-5

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return dataclasses.asdict(self)


SIZES: dict[str, Config] = {
    "8m": Config(hidden=256, layers=8, heads=4, kv_heads=2, head_dim=64, ffn=832),
    "1m": Config(hidden=128, layers=4, heads=2, kv_heads=1, head_dim=64, ffn=320),
    "toy": Config(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=64, context=256),
}


class RMSNorm(nn.Module):
    """Scale each vector ``[..., hidden]`` to unit root mean square, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_tables(config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each ``[context, head_dim]`` (the halves repeat), float32."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(config.context, dtype=torch.float64), config.rope_theta**-steps)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to ``x`` of ``[batch, heads, length, head_dim]``."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))


class Feedforward(nn.Module):
    """The gated SiLU feed-forward block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = Feedforward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)


class Llama(nn.Module):
    """Token ids ``[batch, length]`` to hidden states; logits and loss share the embedding matrix."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of deviation 0.02, smaller where a layer writes to the residual stream."""
        shrink = 1.0 / math.sqrt(2 * self.config.layers)
        for name, value in self.named_parameters():
            if value.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(value, std=0.02 * (shrink if residual else 1.0))

    def hidden(self, ids: Tensor) -> Tensor:
        """Final normalised states ``[batch, length, hidden]`` for ``ids`` of ``[batch, length]``."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[batch, length, vocab]``."""
        return functional.linear(self.hidden(ids), self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum of ``weights`` times the negative log likelihood in nats; all of ``[batch, length]``."""
        logits = self(ids).flatten(0, 1).float()
        each = functional.cross_entropy(logits, targets.flatten(), reduction="none")
        return (each * weights.flatten()).sum()

    def count(self) -> int:
        """Number of parameters, the tied embedding counted once."""
        return sum(value.numel() for value in self.parameters())
