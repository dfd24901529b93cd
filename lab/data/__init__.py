"""The data generators: one module each, deterministic from a seed, split into training and held-out."""

from __future__ import annotations

from lab.data.arithmetic import Arithmetic
from lab.data.base import Document, Generator, Item
from lab.data.chat import Chat
from lab.data.lists import Lists
from lab.data.recall import Recall
from lab.data.records import Records
from lab.data.stdlib_text import StdlibText, paragraphs

__all__ = ["Document", "Generator", "Item", "generators"]


def generators() -> dict[str, Generator]:
    """Every generator by its name."""
    found: list[Generator] = [
        StdlibText(),
        Recall(list(paragraphs())),
        Arithmetic(),
        Lists(),
        Records(),
        Chat(),
    ]
    return {each.name: each for each in found}
