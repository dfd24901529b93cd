"""Paceline: an LLM inference engine whose speed-ups are parts you can switch on, measure, combine and serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "Recipe", "Request", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from paceline.core.recipe import Recipe
    from paceline.core.types import Request, SamplingParams
    from paceline.llm import LLM, AsyncLLM

_HOMES = {
    "LLM": "paceline.llm",
    "AsyncLLM": "paceline.llm",
    "Recipe": "paceline.core.recipe",
    "Request": "paceline.core.types",
    "SamplingParams": "paceline.core.types",
}


def __getattr__(name: str) -> Any:
    """Load on first use: `paceline --help` and `import paceline` cost nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
