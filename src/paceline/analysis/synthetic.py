"""Checkpoints of random weights in real shapes: speed and memory can be measured without the model's files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from paceline import models
from paceline.checkpoints.base import TensorInfo
from paceline.checkpoints.files import sampled_digest
from paceline.checkpoints.safetensors import save_safetensors
from paceline.core.errors import ConfigError
from paceline.models import adapters

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SHAPES = Path(__file__).parent / "shapes"


def shapes() -> list[str]:
    """The names of the shapes that come with the package."""
    return sorted(p.stem for p in _SHAPES.glob("*.toml"))


def shape_config(shape: str) -> dict[str, Any]:
    """config.json of a named shape, or of a config.json file. Raises ConfigError."""
    if shape in shapes():
        return tomllib.loads((_SHAPES / f"{shape}.toml").read_text(encoding="utf-8"))
    path = Path(shape)
    if path.is_file():
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as e:
            raise ConfigError(f"shape = {shape!r}: not a config.json: {e}") from None
    raise ConfigError(f"shape = {shape!r}: must be a config.json file or one of {', '.join(shapes())}")


class RandomCheckpoint:
    """A `Checkpoint` of normal weights (standard deviation 0.02, as initialised), bfloat16, repeatable from its seed."""

    def __init__(self, shape: str, seed: int = 0):
        self.path = Path(shape)
        self.config = shape_config(shape)
        self.generation: dict[str, Any] = {}
        self.notes = ["random weights: good for speed, not for text"]
        self._params = models.get(str(self.config["model_type"])).Net.params(models.read(self.config))
        rng = np.random.default_rng(seed)
        self._noise = (0.02 * rng.standard_normal(1 << 20, np.float32)).astype(ml_dtypes.bfloat16)

    def tensors(self) -> dict[str, TensorInfo]:
        found = {}
        for p in self._params.values():
            for source, rows in zip(p.sources, p.rows_of(), strict=True):
                shape = (rows, *p.shape[1:])
                found[source] = TensorInfo(shape[::-1] if p.transpose else shape, "bf16", 2 * math.prod(shape))
        return found

    def read(self, name: str) -> np.ndarray:
        shape = self.tensors()[name].shape
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        out = np.empty(math.prod(shape), self._noise.dtype)
        for at in range(0, len(out), len(self._noise)):
            out[at : at + len(self._noise)] = self._noise[: len(out) - at]
        return out.reshape(shape)

    def digest(self) -> str:
        return sampled_digest(self.config, ())

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def random_adapter(folder: Path, config: dict[str, Any], rank: int, seed: int = 0, **options: Any) -> Path:
    """A PEFT folder that adapts every linear of the model by about a tenth of its size; `options` go into adapter_config.json.

    With rank_pattern a module of such an end has its own rank; target_modules chooses modules by the end of their names.
    """
    rng = np.random.default_rng(seed)
    places = adapters.places(models.read(config))
    targets = options.get("target_modules") or sorted({module.rpartition(".")[2] for module in places})
    tensors: dict[str, np.ndarray] = {}
    for module, place in places.items():
        name = module.rpartition(".")[2]
        if name in targets:
            r = options.get("rank_pattern", {}).get(name, rank)
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((r, place.n_in), np.float32)
            b = rng.standard_normal((place.n_out, r), np.float32)
            tensors[f"{key}.lora_B.weight"] = b * np.float32(0.1 / math.sqrt(r * place.n_in))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, **options}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
