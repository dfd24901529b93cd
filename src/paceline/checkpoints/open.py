"""Which reader a reference means."""

from __future__ import annotations

from pathlib import Path

from paceline.checkpoints import hub
from paceline.checkpoints.base import Checkpoint
from paceline.checkpoints.files import open_regular, some
from paceline.checkpoints.folder import FolderCheckpoint
from paceline.checkpoints.gguf import GgufCheckpoint
from paceline.checkpoints.packed import TABLE, PackedCheckpoint
from paceline.core.errors import CheckpointError

_KINDS = "a folder with config.json and *.safetensors, a .safetensors or .gguf file, or a Hub name such as user/repo"


def open_checkpoint(ref: str | Path, *, offline: bool | None = None, progress: type | None = None) -> Checkpoint:
    """The model that `ref` names: a Hugging Face folder, one .safetensors, a .gguf file (or any part of a split one), a
    folder quantised by us, a Hub name `user/repo`, or `user/repo:Q4_K_M` for GGUF repositories. What exists on disk
    comes before the Hub.

    offline: never ask the Hub (None: as HF_HUB_OFFLINE says). progress: a tqdm class for downloads. Raises
    CheckpointError with the remedy.
    """
    try:
        path = Path(ref).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as e:  # a name too long, a NUL inside, an unknown ~user
        raise CheckpointError(f"{str(ref)[:200]!r}: is no usable path ({e}); a model is {_KINDS}") from e
    if not exists:
        name = hub.parse(str(ref))
        if name is None:
            raise CheckpointError(f"{ref}: no such file or folder; a model is {_KINDS}")
        path = hub.fetch(name, offline=offline, progress=progress)
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_folder(path: Path) -> Checkpoint:
    if (path / TABLE).is_file():
        return PackedCheckpoint(path)
    ggufs = hub.gguf_models(p.name for p in path.iterdir())
    if not ggufs or ((path / "config.json").is_file() and any(path.glob("*.safetensors"))):
        return FolderCheckpoint(path)
    if len(ggufs) > 1:
        raise CheckpointError(
            f"{path}: holds {len(ggufs)} GGUF models; name one of the files: {some(f[0] for f in ggufs.values())}"
        )
    return GgufCheckpoint(path / next(iter(ggufs.values()))[0])


def _open_file(path: Path) -> Checkpoint:
    with open_regular(path) as f:
        magic = f.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.suffix == ".safetensors":
        return FolderCheckpoint(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: pickled weights can run code when opened and are never read; convert them to safetensors "
            "with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
        )
    raise CheckpointError(f"{path}: is not a model file; a model is {_KINDS}")
