"""How models write calls of functions. A file of this package is a dialect; its name is the file's.

A server asks `detect` which dialect a model's template has, or takes an option's; then, for each request,

    dialect = get(name)
    parser = dialect(names of the tools)              # or ReasoningParser(dialect(...), tags, opens_reasoning(prompt, tags))
    for text in stream: events = parser.push(text)
    events = parser.finish()
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Collection, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from paceline.core.errors import ConfigError
from paceline.server.dialects.base import Parser

if TYPE_CHECKING:
    from paceline.checkpoints.tokenizer import Tokenizer

_SHARED = {"base", "events", "grammar", "messages", "reading", "reasoning"}
_XML = ("<function=", "<arg_key>", "<tool_call_name>")  # models that write no JSON between Hermes's markers
_JSON = re.compile(r"""["']name\\?["'].{0,200}["'](?:arguments|parameters)\\?["']""", re.DOTALL)
_OTHER = re.compile(
    r"<[|｜/]?[^<>\n]{0,20}(?:tool|function|action)", re.IGNORECASE
)  # markers of dialects not known here
_OVER_PARTS = re.compile(r"for\s+\w+\s+in\s+\w+(?:\.content|\[['\"]content['\"]\])")


@cache
def names() -> tuple[str, ...]:
    """Every dialect, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED))


@cache
def get(name: str) -> type[Parser]:
    """The dialect of this name. Raises ConfigError when there is none."""
    if name not in names():
        raise ConfigError(f"tool dialect {name!r}: there is none of this name; known are {', '.join(names())}")
    module = import_module(f"{__name__}.{name}")
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    parsers = [c for c in own if issubclass(c, Parser)]
    assert len(parsers) == 1, f"{name}: a dialect's file defines exactly one Parser"
    return parsers[0]


def detect(template: str | Mapping[str, str] | None) -> str:
    """The dialect that a model with this chat template writes; "plain" where it knows no tools, or writes calls in a
    way not known here."""
    source = text_of(template)
    if "tool" not in source:
        return "plain"
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<tool_call>" in source:
        return "plain" if any(mark in source for mark in _XML) else "hermes"
    if "<|python_tag|>" in source or ("ipython" in source and '"parameters"' in source):
        return "llama3"
    return "json" if _JSON.search(source) and not _OTHER.search(source) else "plain"


def reads_parts(template: str | Mapping[str, str] | None) -> bool:
    """Whether the template takes content as a list of parts only."""
    source = text_of(template)
    return bool(_OVER_PARTS.search(source)) and "is string" not in source


def text_of(template: str | Mapping[str, str] | None) -> str:
    """The source of all of a model's templates."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template or ""


def added(tokenizer: Tokenizer, markers: Collection[str]) -> dict[str, int]:
    """Those of the markers that are tokens of their own, and their ids: `tokens` of `grammar.constraint`."""
    tokens = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: i for i, token in tokens.items() if token.content in markers}


def visible(tokenizer: Tokenizer, markers: Collection[str]) -> tuple[int, ...]:
    """Ids of the markers that decoding would leave out: `SamplingParams.show_special`."""
    return tuple(sorted(tokenizer.special_ids.intersection(added(tokenizer, markers).values())))
