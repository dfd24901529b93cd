"""Qwen2 and Qwen2.5: Llama with biases on Q, K and V, and optional sliding windows.   arXiv:2407.10671"""

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
    c = blocks.read_decoder(f, "qwen2", context=32768)
    ropes = {"full": rope.read(f, c.head_dim, c.context)}
    windows = blocks.qwen_windows(f, c.n_layers)
    return blocks.finish(f, c, windows=windows, rope=ropes, qkv_bias=True, out_bias=False, mlp_bias=False)
