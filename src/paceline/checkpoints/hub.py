"""Models by their Hugging Face Hub name: `user/repo`, or `user/repo:Q4_K_M` for one file of a GGUF repository.

huggingface_hub does the work and its environment variables count: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN,
HF_ENDPOINT. Only files that are read are downloaded; pickled weights never are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.checkpoints.files import some
from paceline.checkpoints.packed import TOKENIZER_FILES
from paceline.core.errors import CheckpointError

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::(?P<quant>[\w.-]{1,64}))?")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
_NOTHING = "no file has this name"
_CONFIGS = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "model.safetensors.index.json",
    "paceline.json",
    "modules.json",
    "1_Pooling/config.json",
)


@dataclass(frozen=True)
class HubName:
    repo: str
    quant: str | None = None


def parse(ref: str) -> HubName | None:
    """The Hub name that `ref` can be, or None."""
    m = _NAME.fullmatch(ref)
    if m is None or ref.endswith((".gguf", ".safetensors")) or ".." in ref:
        return None
    return HubName(m["repo"], m["quant"])


def fetch(name: HubName, *, offline: bool | None = None, progress: type | None = None) -> Path:
    """Download what is missing and give the local path: a folder, or a GGUF file.

    offline: use the cache alone (None: as HF_HUB_OFFLINE says). progress: a tqdm class. Raises CheckpointError with the
    remedy.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    if offline or (offline is None and constants.HF_HUB_OFFLINE):
        return _cached(name, "offline mode is on")
    try:
        files = [f.rfilename for f in HfApi().model_info(name.repo, timeout=10).siblings or ()]
    except (
        Exception
    ) as e:  # the library's errors have no common base, and those of its HTTP client change with versions
        return _cached(name, _reason(name, e))
    wanted = choose(name, files)
    try:
        options: dict[str, Any] = {} if progress is None else {"tqdm_class": progress}
        folder = snapshot_download(name.repo, allow_patterns=[_literal(f) for f in wanted], **options)
    except Exception as e:
        raise CheckpointError(
            f"{name.repo}: the download failed: {_reason(name, e)}; run the command again to continue it"
        ) from e
    return _resolve(name, Path(folder), wanted)


def choose(name: HubName, files: Iterable[str]) -> list[str]:
    """Of a repository's files those that we read. Raises CheckpointError when there are none or the choice is the
    user's.
    """
    files = list(files)
    weights = _safetensors(files)
    if weights and name.quant is None:
        return [f for f in files if f in (*_CONFIGS, *TOKENIZER_FILES)] + weights
    models = gguf_models(files)
    if models:
        return _pick(name, models)
    if name.quant is not None:
        raise CheckpointError(f"{name.repo}: has no GGUF files, so {name.quant!r} names none of them; leave it out")
    if any(f.endswith((".bin", ".pt", ".pth")) for f in files):
        raise CheckpointError(
            f"{name.repo}: has only pickled weights, which can run code when opened and are never read; take a "
            "repository with safetensors or GGUF"
        )
    raise CheckpointError(
        f"{name.repo}: has neither safetensors nor GGUF files at its top; it is no language model we can read"
    )


def _safetensors(files: list[str]) -> list[str]:
    top = [f for f in files if "/" not in f and f.endswith(".safetensors")]
    if "paceline.json" in files:
        return [f for f in top if re.fullmatch(r"paceline-\d{5}-of-\d{5}\.safetensors", f)]
    if "model.safetensors.index.json" in files:
        return [f for f in top if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", f)] or top
    return ["model.safetensors"] if "model.safetensors" in top else top


def gguf_models(files: Iterable[str]) -> dict[str, list[str]]:
    """Model name without ending and part number -> its files in order."""
    out: dict[str, list[str]] = {}
    for f in sorted(files):
        if f.endswith(".gguf") and not f.rpartition("/")[2].startswith(("mmproj", "imatrix")):
            out.setdefault(_SPLIT.sub("", f[: -len(".gguf")]), []).append(f)
    return out


def _pick(name: HubName, models: dict[str, list[str]]) -> list[str]:
    if name.quant is None:
        found = list(models)
    else:
        word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(name.quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [m for m in models if word.search(m.rpartition("/")[2])]
    if len(found) == 1:
        return models[found[0]]
    problem = "none of its files is" if not found else f"{len(found)} files are"
    what = f"{problem} {name.quant!r}" if name.quant else f"has {len(models)} GGUF models"
    raise CheckpointError(
        f"{name.repo}: {what}; say which, as {name.repo}:Q4_K_M; there are {some((found or list(models)), 12)}"
    )


def _cached(name: HubName, reason: str) -> Path:
    """What the cache holds, when the Hub cannot be asked."""
    from huggingface_hub import snapshot_download

    try:
        # A snapshot never holds all files of its repository, since we download some: a pattern that asks for none of
        # them keeps the library from calling it incomplete. What we need of it the readers check.
        folder = Path(snapshot_download(name.repo, local_files_only=True, allow_patterns=[_NOTHING]))
    except Exception as e:  # see `fetch`
        raise CheckpointError(
            f"{name.repo}: {reason}, and the model is not in the local cache; go online (unset HF_HUB_OFFLINE) "
            "and run the command again, or give the path of a local model"
        ) from e
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    try:
        return _resolve(name, folder, choose(name, files))
    except CheckpointError as e:
        raise CheckpointError(f"{reason}, so only the local cache counts: {e}") from e


def _resolve(name: HubName, folder: Path, wanted: list[str]) -> Path:
    return folder / wanted[0] if wanted[0].endswith(".gguf") else folder


def _literal(file: str) -> str:
    """A pattern that matches this file only."""
    return re.sub(r"([*?\[])", r"[\1]", file)


def _reason(name: HubName, e: Exception) -> str:
    kind = type(e).__name__
    if kind == "GatedRepoError":
        return f"access to it must be granted at huggingface.co/{name.repo} and HF_TOKEN set"
    if kind == "RepositoryNotFoundError":
        return "there is no such repository (or it is private and HF_TOKEN is not set)"
    return (
        f"the Hub cannot be reached ({kind}: "
        f"{str(e).strip().splitlines()[0][:200] if str(e).strip() else 'no details'})"
    )
