"""Mistral 7B and its descendants: Llama with an optional sliding window on every layer.   arXiv:2310.06825"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models import blocks, rope
from paceline.models.base import ModelConfig
from paceline.models.fields import Fields
from paceline.models.llama import Net

__all__ = ["Net", "config"]


def config(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw)
    c = blocks.read_decoder(f, "mistral", context=131072)
    ropes = {"full": rope.read(f, c.head_dim, c.context)}
    windows = blocks.windows_of(f, c.n_layers)
    return blocks.finish(f, c, windows=windows, rope=ropes, qkv_bias=False, out_bias=False, mlp_bias=False)
