"""Hugging Face folders: config.json, generation_config.json and safetensors, single or sharded, plain or quantised
(AWQ, GPTQ).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paceline.checkpoints import awq, gptq
from paceline.checkpoints.base import TensorInfo
from paceline.checkpoints.files import read_json, sampled_digest, some
from paceline.checkpoints.safetensors import Entry, SafetensorsFile
from paceline.core.errors import CheckpointError
from paceline.ops.packed import Codes, Packed

INDEX = "model.safetensors.index.json"
_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f64"}
_TINY = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_UNQUANTISED = "use the unquantised model (and `paceline quantize` it), or its AWQ, GPTQ or GGUF version"


class FolderCheckpoint:
    """The tensors of a folder (or of one .safetensors file with its folder's config.json) under their Hugging Face
    names.

    Quantised matrices appear as `<module>.weight` of shape (n_out, n_in). Text models inside multimodal folders
    (gemma3) appear under the names and the config of the text model alone.
    """

    format: Literal["safetensors"] = "safetensors"

    def __init__(self, path: Path):
        self.path = path
        folder = path if path.is_dir() else path.parent
        self.notes: list[str] = []
        self.metadata: dict[str, Any] = {}
        self.config = _config(folder)
        generation = folder / "generation_config.json"
        self.generation = read_json(generation) if generation.is_file() else {}
        self._files: list[SafetensorsFile] = []
        try:
            self._where = self._open(folder, path)
            self._rename()
            self._quantised = self._group(folder)
            self._tie()
        except CheckpointError:
            self.close()
            raise

    def _open(self, folder: Path, path: Path) -> dict[str, tuple[SafetensorsFile, str]]:
        """name -> (file, name in the file)"""
        names, index = ([path.name], None) if path.is_file() else _files(folder)
        where: dict[str, tuple[SafetensorsFile, str]] = {}
        for file_name in names:
            file = SafetensorsFile(folder / file_name)
            self._files.append(file)
            for name in file.entries:
                if name in where:
                    raise CheckpointError(
                        f"{file.path}: tensor {name!r} is also in {where[name][0].path.name}; the checkpoint "
                        "contradicts itself"
                    )
                where[name] = (file, name)
        for name, shard in (index or {}).items():
            if name not in where:
                raise CheckpointError(
                    f"{folder / shard}: lacks tensor {name!r}, which {INDEX} places there; download it again"
                )
            if where[name][0].path.name != shard:
                raise CheckpointError(
                    f"{folder / INDEX}: places tensor {name!r} in {shard}, but it is in {where[name][0].path.name}"
                )
        return where

    def _rename(self) -> None:
        """Bring the variants of names that occur in the wild to those of the text model's own class."""
        rules = _prefix_rules(self.config, self._where)
        dropped = [n for n in self._where if any(n.startswith(p) for p, new in rules if new is None)]
        if dropped:
            self.notes.append(f"only the text model is loaded: {len(dropped)} tensors of other modalities are left out")
        renamed: dict[str, tuple[SafetensorsFile, str]] = {}
        for name, place in self._where.items():
            prefix, new = next(((p, new) for p, new in rules if name.startswith(p)), ("", ""))
            if new is None:
                continue
            text_name = new + name[len(prefix) :]
            if text_name in renamed:
                raise CheckpointError(
                    f"{place[0].path}: tensors {renamed[text_name][1]!r} and {name!r} both mean {text_name!r}; "
                    "the checkpoint "
                    "contradicts itself"
                )
            renamed[text_name] = place
        self._where = renamed
        if isinstance(self.config.get("text_config"), dict):
            self.config = _text_config(self.config)

    def _group(self, folder: Path) -> dict[str, tuple[int, int]]:
        """Replace the parts of quantised matrices by one name each: name -> (n_out, n_in)."""
        self._scheme = _scheme(self.config, folder)
        stems = sorted(name[: -len(".qweight")] for name in self._where if name.endswith(".qweight"))
        if self._scheme is None:
            if stems:
                raise CheckpointError(
                    f"{folder}: {stems[0]}.qweight is quantised, but config.json has no quantization_config"
                )
            self._check_dtypes()
            return {}
        if not stems:
            raise CheckpointError(
                f"{folder}: config.json says {self._scheme.name}, but no tensor ends in .qweight; the files do "
                "not match"
            )
        self._parts: dict[str, dict[str, tuple[SafetensorsFile, str]]] = {}
        out = {}
        for stem in stems:
            found = {
                p: self._where.pop(f"{stem}.{p}", None) for p in (*self._scheme.parts, *self._scheme.optional_parts)
            }
            parts = {p: place for p, place in found.items() if place is not None}
            shapes = {p: f.entries[n].shape for p, (f, n) in parts.items()}
            for part, (f, n) in parts.items():
                _check_part(f, n, part)
            out[f"{stem}.weight"] = self._scheme.shape(shapes, f"{folder}: {stem}")
            self._parts[f"{stem}.weight"] = parts
        if both := next((n for n in out if n in self._where), None):
            raise CheckpointError(
                f"{folder}: {both!r} is stored twice, quantised and plain; the checkpoint contradicts itself"
            )
        self._check_dtypes()
        return out

    def _check_dtypes(self) -> None:
        for file, name in self._where.values():
            if file.entries[name].dtype in _TINY:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} has dtype {file.entries[name].dtype}, which is unsupported; "
                    "convert it to BF16, F16 or F32"
                )

    def _tie(self) -> None:
        """Some files store a tied head too. Equal: one is dropped. Different: both count, whatever the config says."""
        head, table = "lm_head.weight", _table_name(self._where)
        if self.config.get("tie_word_embeddings") is not True or head not in self._where:
            return
        if table is None:
            prefix = "transformer.wte" if self.config.get("model_type") == "gpt2" else "model.embed_tokens"
            self._where[f"{prefix}.weight"] = self._where.pop(head)
        elif _same(self._where[head], self._where[table]):
            del self._where[head]
        else:
            self.config["tie_word_embeddings"] = False
            self.notes.append(
                "config.json ties lm_head to the embeddings, but the file holds two different matrices: both are used"
            )

    def tensors(self) -> dict[str, TensorInfo]:
        out = {}
        for name, (file, inner) in self._where.items():
            e = file.entries[inner]
            out[name] = TensorInfo(e.shape, _FLOATS.get(e.dtype, e.dtype.lower()), e.nbytes)
        for name, shape in self._quantised.items():
            nbytes = sum(f.entries[n].nbytes for f, n in self._parts[name].values())
            assert self._scheme is not None
            out[name] = TensorInfo(shape, f"{self._scheme.name.lower()}-int{self._scheme.bits}", nbytes)
        return out

    def read(self, name: str) -> np.ndarray | Codes | Packed:
        if name in self._quantised:
            assert self._scheme is not None
            parts = {p: file.read(inner) for p, (file, inner) in self._parts[name].items()}
            return self._scheme.read(parts, f"{self.path}: {name[: -len('.weight')]}", self.notes)
        if name not in self._where:
            raise CheckpointError(
                f"{self.path}: has no tensor {name!r}; the files do not match config.json, or are incomplete"
            )
        file, inner = self._where[name]
        if file.entries[inner].dtype not in _FLOATS:
            raise CheckpointError(
                f"{file.path}: tensor {inner!r} has dtype {file.entries[inner].dtype}; weights must be F32, F16 or BF16"
            )
        array = file.read(inner)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    def release(self) -> None:
        for file in self._files:
            file.release()

    def digest(self) -> str:
        return sampled_digest(self.config, [file.path for file in self._files])

    def close(self) -> None:
        for file in self._files:
            file.close()


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        refuse_pickles(folder)
        raise CheckpointError(
            f"{folder}: has no config.json; a model is a folder with config.json and *.safetensors, or a .gguf file"
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f'{path}: model_type = {config.get("model_type")!r}: must name the architecture, such as "llama"'
        )
    return config


def refuse_pickles(folder: Path) -> None:
    """Raises CheckpointError when the folder's only weights are pickles."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if pickles and not any(p.suffix == ".safetensors" for p in folder.iterdir()):
        raise CheckpointError(
            f"{folder}: its weights are pickles ({some(pickles, 2)}), which can run code when opened and are "
            "never read; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
        )


def _files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files of a folder and, where there is an index, name -> file."""
    if (folder / INDEX).is_file():
        index = _index(folder / INDEX)
        names = sorted(set(index.values()))
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: shards named by {INDEX} are missing: {some(missing)}; download them")
        return names, index
    present = sorted(p.name for p in folder.glob("*.safetensors"))
    if "model.safetensors" in present:
        return ["model.safetensors"], None
    if not present:
        refuse_pickles(folder)
        raise CheckpointError(f"{folder}: has no *.safetensors; download the weights")
    if len(present) == 1:
        return present, None
    numbers = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", n) for n in present]
    if all(numbers) and [(m[1], int(m[2]), int(m[3])) for m in numbers if m] == [
        (m[1], i + 1, len(present)) for i, m in enumerate(numbers) if m
    ]:
        return present, None
    raise CheckpointError(
        f"{folder}: several safetensors ({some(present)}) that are no complete set of shards, and no {INDEX}; "
        "keep one model"
    )


def _index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must map tensor names to files")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or Path(file).name != file
            or "\\" in file
            or "\0" in file
        ):
            raise CheckpointError(
                f"{path}: weight_map[{name[:100]!r}] = {str(file)[:100]!r}: must be the name of a .safetensors "
                "file in this folder"
            )
    return weight_map


def _prefix_rules(config: Mapping[str, Any], names: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """(prefix, replacement; None drops the tensor), the first that matches counts."""
    if isinstance(config.get("text_config"), dict):
        others = [
            "vision_tower.",
            "multi_modal_projector.",
            "audio_tower.",
            "vision_model.",
            "visual.",
            "embed_vision.",
        ]
        return [
            *((f"{p}{other}", None) for other in others for p in ("model.", "")),
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
        ]
    if config["model_type"] == "gpt2" and not any(n.startswith("transformer.") for n in names):
        return [("lm_head.", "lm_head."), ("", "transformer.")]  # published GPT-2 files hold the bare GPT2Model
    return []


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = dict(config["text_config"])
    text.setdefault("model_type", f"{config['model_type']}_text")
    for key in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "quantization_config",
        "torch_dtype",
        "dtype",
    ):
        if key in config:
            text.setdefault(key, config[key])
    return text


def _scheme(config: Mapping[str, Any], folder: Path) -> awq.Awq | gptq.Gptq | None:
    """How quantised matrices are stored; None when the checkpoint is not quantised."""
    raw, where = config.get("quantization_config"), f"{folder / 'config.json'}: quantization_config"
    older = folder / "quantize_config.json"
    if raw is None and older.is_file():
        raw, where = {"quant_method": "gptq", **read_json(older)}, str(older)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: must be an object, found {type(raw).__name__}")
    method = raw.get("quant_method")
    if method in ("awq", "gptq") and config["model_type"] == "gpt2":
        raise CheckpointError(
            f"{where}: quant_method = {method!r} is not supported for gpt2 (transposed weights); {_UNQUANTISED}"
        )
    if method == "awq":
        return awq.options(raw, where)
    if method == "gptq":
        return gptq.options(raw, where)
    raise CheckpointError(f"{where}: quant_method = {str(method)[:60]!r} is not supported; {_UNQUANTISED}")


def _check_part(file: SafetensorsFile, name: str, part: str) -> None:
    entry: Entry = file.entries[name]
    allowed = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
    if entry.dtype not in allowed:
        raise CheckpointError(f"{file.path}: tensor {name!r} has dtype {entry.dtype}; must be {' or '.join(allowed)}")


def _table_name(names: Mapping[str, Any]) -> str | None:
    return next((n for n in ("model.embed_tokens.weight", "transformer.wte.weight") if n in names), None)


def _same(a: tuple[SafetensorsFile, str], b: tuple[SafetensorsFile, str]) -> bool:
    """Whether two tensors are equal bit for bit; reads no further than the first difference."""
    (fa, na), (fb, nb) = a, b
    ea, eb = fa.entries[na], fb.entries[nb]
    if (ea.dtype, ea.shape) != (eb.dtype, eb.shape):
        return False
    x, y = fa.read(na).reshape(-1).view(np.uint8), fb.read(nb).reshape(-1).view(np.uint8)
    step = 1 << 24
    return all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, x.size, step))
