"""Model families. A file of this package is a family; its name is the `model_type` it reads."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from paceline.core.errors import CheckpointError
from paceline.models.base import Model, ModelConfig

_SHARED = {"adapters", "base", "blocks", "fields", "loader", "rope"}


class Family(Protocol):
    """What a model file provides."""

    config: Callable[[Mapping[str, Any]], ModelConfig]
    Net: type[Model]


def names() -> list[str]:
    """Every known model_type, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def get(model_type: str) -> Family:
    """The model file for a `model_type`. Raises CheckpointError for an unknown one."""
    if model_type not in names():
        raise CheckpointError(
            f"config.json: model_type = {model_type!r} is not a known architecture; known are {', '.join(names())}. "
            "Use a model of one of these, or add a file of that name to paceline/models"
        )
    return cast(Family, import_module(f"{__name__}.{model_type}"))


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a checkpoint's config.json. Raises CheckpointError with every problem found."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json: model_type = {model_type!r} must name the architecture, one of {', '.join(names())}"
        )
    return get(model_type).config(raw)
