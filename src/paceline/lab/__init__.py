"""The small models that the package carries; ``CARD.md`` beside this file says what they are."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEFAULT", "DRAFT", "names", "path"]

DEFAULT = "lab-8m"
DRAFT = "lab-1m"
_HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """The names of the packaged models, sorted."""
    return sorted(folder.name for folder in _HERE.iterdir() if (folder / "config.json").is_file())


def path(name: str = DEFAULT) -> Path:
    """The folder of a packaged model, in the Hugging Face layout.

    Raises ``ValueError`` for a name that is not packaged; the message lists the names that are.
    """
    known = names()
    if name not in known:
        listed = ", ".join(known) if known else "none in this installation"
        raise ValueError(f"there is no packaged model {name!r}; packaged models: {listed}")
    return _HERE / name
