"""Gemma 3, multi-modal: its text part alone; the vision tensors are left on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.core.errors import CheckpointError
from paceline.models import gemma3_text
from paceline.models.base import ModelConfig
from paceline.models.gemma3_text import Net

__all__ = ["Net", "config"]

_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id")


def config(raw: Mapping[str, Any]) -> ModelConfig:
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json: text_config = {text!r}: must be the object that describes the text model")
    outer = {name: raw[name] for name in _SHARED if name in raw}
    return gemma3_text.config({**outer, **text})
