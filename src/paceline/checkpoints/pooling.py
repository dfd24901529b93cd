"""How a model folder says that its hidden states become one embedding: the files of sentence-transformers.

`modules.json` lists what follows the transformer, `1_Pooling/config.json` (or where the list says) how its states are pooled.
Format: https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from paceline.checkpoints.files import open_regular, read_json
from paceline.core.errors import CheckpointError

MAX_LIST = 64 << 10  # bytes of modules.json
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_KINDS: dict[str, Literal["mean", "last"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "lasttoken": "last",
}


class _Module(msgspec.Struct):
    path: str = ""
    type: str = ""


@dataclass(frozen=True)
class Pooling:
    """kind: of the final hidden states of all tokens. why_not: what the folder asks for that is not done here."""

    kind: Literal["mean", "last"] = "mean"
    why_not: str | None = None


def read_pooling(path: Path) -> Pooling:
    """What the folder of a checkpoint says; mean where it says nothing. Broken files are told in why_not: they harm embeddings only."""
    folder = path if path.is_dir() else path.parent
    try:
        where = _where(folder)
        config = read_json(folder / where / "config.json") if (folder / where / "config.json").exists() else {}
        return Pooling(_kind(config, where))
    except CheckpointError as e:
        return Pooling(why_not=str(e).replace(f"{folder}/", ""))


def _where(folder: Path) -> str:
    """The folder of the pooling's configuration. Raises CheckpointError for modules that would change the embedding."""
    listing = folder / "modules.json"
    if not listing.exists():
        return "1_Pooling"
    with open_regular(listing) as f:
        text = f.read(MAX_LIST)
    try:
        modules = msgspec.json.decode(text, type=list[_Module])
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise CheckpointError(f"modules.json: cannot be read ({e})") from e
    kinds = {m.type.rpartition(".")[2]: m.path for m in modules}
    others = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if others:
        raise CheckpointError(f"modules.json: the module {others[0][:80]!r} after the model is not supported")
    where = kinds.get("Pooling", "1_Pooling") or "1_Pooling"
    if not _FOLDER.fullmatch(where):
        raise CheckpointError(f"modules.json: {where[:80]!r} is no folder beside it")
    return where


def _kind(config: dict[str, Any], where: str) -> Literal["mean", "last"]:
    """Older files have one switch per kind, newer ones its name or names."""
    chosen = [k for k, v in config.items() if k.startswith("pooling_mode_") and v is True]
    named = config.get("pooling_mode", [])
    chosen += [named] if isinstance(named, str) else [str(n) for n in named] if isinstance(named, list) else []
    if not chosen:
        return "mean"
    if len(chosen) > 1 or chosen[0] not in _KINDS:
        raise CheckpointError(
            f"{where}/config.json: {' and '.join(chosen)[:200]} is not supported, only mean and last token"
        )
    return _KINDS[chosen[0]]
