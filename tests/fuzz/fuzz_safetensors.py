"""Fuzz target: any bytes as model.safetensors of a folder (plain, and with AWQ's config), opened and read in full."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "checkpoints"))
from checkpoint_builders import safetensors_bytes, tensors_bytes
from mutate import main

from paceline.checkpoints.folder import FolderCheckpoint
from paceline.core.errors import CheckpointError

_FOLDER = tempfile.TemporaryDirectory()
_DATA = Path(_FOLDER.name) / "x.safetensors"
_QUANTISATIONS = {
    "plain": None,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
}


def _folder(name: str, quantisation: dict[str, Any] | None) -> Path:
    folder = Path(_FOLDER.name) / name
    folder.mkdir()
    config = {"model_type": "llama", "tie_word_embeddings": True, "quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    (folder / "model.safetensors").symlink_to(_DATA)
    return folder


_FOLDERS = [_folder(name, q) for name, q in _QUANTISATIONS.items()]


def target(data: bytes) -> None:
    _DATA.write_bytes(data)
    for folder in _FOLDERS:
        try:
            c = FolderCheckpoint(folder)
        except CheckpointError:
            continue
        for tensor in c.tensors():
            with contextlib.suppress(CheckpointError):
                c.read(tensor)
        c.close()


def seeds() -> list[bytes]:
    """A plain file, one with a tied head, metadata, AWQ's and GPTQ's parts, and odd dtypes."""
    words = np.arange(64, dtype=np.int32)
    scales = np.ones((2, 16), np.float16)
    odd = {
        "__metadata__": {"format": "pt"},
        "x": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]},
        "y": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [4, 8]},
    }
    return [
        tensors_bytes(
            {"model.embed_tokens.weight": np.ones((2, 4), np.float32), "lm_head.weight": np.ones((2, 4), np.float32)}
        ),
        safetensors_bytes(odd, bytes(8)),
        tensors_bytes(
            {"a.qweight": np.tile(words, 2).reshape(64, 2), "a.qzeros": words[:4].reshape(2, 2), "a.scales": scales}
        ),
        tensors_bytes(
            {
                "a.qweight": np.tile(words, 2).reshape(8, 16),
                "a.qzeros": words[:4].reshape(2, 2),
                "a.scales": scales,
                "a.g_idx": np.arange(64, dtype=np.int32) // 32,
            }
        ),
    ]


if __name__ == "__main__":
    main(target, seeds())
