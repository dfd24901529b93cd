"""LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

    adapter_config.json        r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, target_modules, ...
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (rank, n_in), .lora_B.weight (n_out, rank)

A module's update is scale * B A with scale = alpha / rank, or alpha / sqrt(rank) with use_rslora (arXiv:2312.03732). Only what is exactly
that is taken: everything else that PEFT knows (DoRA, trained embeddings or heads, biases) is refused by its name, and so is an option
that this reader does not know unless it says nothing. Format: https://huggingface.co/docs/peft, "PEFT checkpoint format".
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from paceline.checkpoints.files import read_json, some
from paceline.checkpoints.safetensors import Entry, SafetensorsFile
from paceline.core.errors import CheckpointError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_RANK = 512
_DTYPES = ("F32", "F16", "BF16")
_KEY = re.compile(r"base_model\.model\.(.{1,400})\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?[\w.]+")  # keys of rank_pattern and alpha_pattern: ends of module names, no expressions

# Options that change nothing for a finished adapter, or that its tensors say themselves.
_IGNORED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA also scales by trained magnitudes; train plain LoRA, or merge the adapter into the model",
    "modules_to_save": "it replaces whole modules (embedding or head); merge the adapter into the model",
    "trainable_token_indices": "it replaces rows of the embedding; merge the adapter into the model",
    "target_parameters": "it adapts parameters that are no linear modules; merge the adapter into the model",
    "layer_replication": "it changes the model's layers; build that model and merge the adapter into it",
    "lora_bias": "it trains a bias of B; train with lora_bias=false",
    "alora_invocation_tokens": "an activated LoRA begins inside the prompt; train plain LoRA",
}
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base model's weights as well


@dataclass(frozen=True)
class Lora:
    """One module's update: scale * b a. `a` and `b` name its tensors; rank, n_in and n_out are theirs."""

    module: str  # as the base checkpoint calls it, without ".weight"
    a: str
    b: str
    rank: int
    n_in: int
    n_out: int
    scale: float
    itemsize: int  # 2 where it is kept as bfloat16, else 4


class AdapterFolder:
    """A PEFT folder, opened and checked; no tensor is read until `read`. Raises CheckpointError with everything wrong.

    dtype: how the numbers are kept: float32, bfloat16 (rounded to nearest, as most engines do), or auto: bfloat16 where both matrices
    of a module are stored so, else float32, which loses nothing.
    """

    def __init__(self, path: str | Path, dtype: str = "auto"):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path}: is not a folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
        if not (self.path / WEIGHTS).exists() and (self.path / PICKLED).exists():
            raise CheckpointError(
                f"{self.path / PICKLED}: pickled files can run code and are not read; save the adapter again with "
                "save_pretrained(..., safe_serialization=True)"
            )
        config = read_json(self.path / CONFIG)
        problems = list(_config_problems(config))
        if problems:
            raise CheckpointError(f"{self.path / CONFIG}: " + "; ".join(problems))
        self._file = SafetensorsFile(self.path / WEIGHTS)
        try:
            self.modules = _modules(config, self._file.entries, dtype)
        except CheckpointError as e:
            self.close()
            raise CheckpointError(f"{self.path / WEIGHTS}: {e}") from None
        self.targets = _targets(config)

    def read(self, module: Lora) -> tuple[np.ndarray, np.ndarray]:
        """a (rank, n_in) and b (n_out, rank), bfloat16 or float32; copies. Raises CheckpointError."""
        dtype = ml_dtypes.bfloat16 if module.itemsize == 2 else np.float32
        out = [np.array(self._file.read(name), dtype) for name in (module.a, module.b)]
        for name, a in zip((module.a, module.b), out, strict=True):
            if not np.isfinite(a).all():
                raise CheckpointError(
                    f"{self.path}: {name} holds NaN or infinite values: the file is damaged; fetch it again"
                )
        return out[0], out[1]

    def digest(self) -> str:
        """SHA-256 in hexadecimal of what it computes: modules, scales and numbers. Equal digests, equal states."""
        h = hashlib.sha256()
        for m in sorted(self.modules, key=lambda m: m.module):
            h.update(f"{m.module}\0{m.rank}\0{m.n_in}\0{m.n_out}\0{m.scale.hex()}\0{m.itemsize}\0".encode())
            for array in self.read(m):
                h.update(array.view(np.uint8).reshape(-1).data)
        return h.hexdigest()

    def close(self) -> None:
        self._file.close()


def _config_problems(c: Mapping[str, Any]) -> Iterator[str]:
    if c.get("peft_type") != "LORA":
        yield f"peft_type = {_shown(c.get('peft_type'))}: only LORA adapters can be loaded"
        return
    if not _is_rank(c.get("r")):
        yield f"r = {_shown(c.get('r'))}: must be an integer from 1 to {MAX_RANK}"
    if not _is_alpha(c.get("lora_alpha")):
        yield f"lora_alpha = {_shown(c.get('lora_alpha'))}: must be a number"
    for name, good, what in (
        ("rank_pattern", _is_rank, f"ranks from 1 to {MAX_RANK}"),
        ("alpha_pattern", _is_alpha, "numbers"),
    ):
        pattern = c.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(good, pattern.values())):
            yield f"{name}: must map module names to {what}"
        else:
            odd = [k for k in pattern if not _PATTERN.fullmatch(k)]
            if odd:
                yield f"{name}: {odd[0][:80]!r} is an expression; write the ends of module names, such as layers.0.mlp.down_proj"
    if not isinstance(c.get("use_rslora", False), bool):
        yield f"use_rslora = {_shown(c['use_rslora'])}: must be true or false"
    if c.get("bias", "none") != "none":
        yield f"bias = {_shown(c['bias'])}: trained biases cannot be loaded; train with bias='none', or merge the adapter into the model"
    if c.get("init_lora_weights", True) not in _INITS:
        how = "convert the adapter to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        yield f"init_lora_weights = {_shown(c['init_lora_weights'])}: it changes the base model; {how}"
    for name, value in c.items():
        if name in _IGNORED or name in ("bias", "init_lora_weights") or value in (None, False, "", [], {}):
            continue
        why = _REFUSED.get(name, "this option is unknown here and may change what the adapter computes")
        yield f"{name[:80]} = {_shown(value)}: {why}"


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _targets(c: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in target_modules; none where it is an expression, which only chose what was trained."""
    targets = c.get("target_modules")
    return tuple(str(t) for t in targets) if isinstance(targets, list) else ()


def _modules(c: Mapping[str, Any], entries: Mapping[str, Entry], dtype: str) -> tuple[Lora, ...]:
    """Every adapted module with its scale, from the tensors' names and shapes."""
    found: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    strange = []
    for key in entries:
        m = _KEY.fullmatch(key)
        if m:
            found.setdefault(m[1], {})[m[2]] = key
        else:
            strange.append(key)
    if strange:
        kinds = "only lora_A and lora_B of linear modules can be loaded, no embeddings, heads, magnitudes or biases"
        problems.append(f"{some(k[:200] for k in strange)}: {kinds}")
    if not found:
        problems.append("has no lora_A and lora_B tensors")
    modules = []
    for module, pair in found.items():
        if len(pair) == 1:
            problems.append(f"{module}: lora_{'A' if 'B' in pair else 'B'} is missing")
            continue
        a, b = entries[pair["A"]], entries[pair["B"]]
        problem = _pair_problem(c, module, a, b)
        if problem:
            problems.append(f"{module}: {problem}")
            continue
        rank = a.shape[0]
        alpha = float(_of_pattern(c.get("alpha_pattern"), module, c["lora_alpha"]))
        scale = alpha / math.sqrt(rank) if c.get("use_rslora") else alpha / rank
        as_stored = "bfloat16" if a.dtype == b.dtype == "BF16" else "float32"
        itemsize = 2 if (as_stored if dtype == "auto" else dtype) == "bfloat16" else 4
        modules.append(Lora(module, pair["A"], pair["B"], rank, a.shape[1], b.shape[0], scale, itemsize))
    if problems:
        raise CheckpointError("; ".join(_at_most(problems)))
    return tuple(modules)


def _pair_problem(c: Mapping[str, Any], module: str, a: Entry, b: Entry) -> str | None:
    rank = _of_pattern(c.get("rank_pattern"), module, c["r"])
    if a.dtype not in _DTYPES or b.dtype not in _DTYPES:
        return f"stored as {a.dtype} and {b.dtype}; convert it to {', '.join(_DTYPES)}"
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} must be [{rank}, n_in] and [n_out, {rank}] (its rank in {CONFIG})"
    return None


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that is the end of the module's name, or all of it behind a ^."""
    for key, value in (pattern or {}).items():
        if module == key.lstrip("^") or (not key.startswith("^") and module.endswith(f".{key}")):
            return value
    return default


def _at_most(problems: Iterable[str], n: int = 20) -> list[str]:
    problems = list(problems)
    return problems[:n] + ([f"and {len(problems) - n} more"] if len(problems) > n else [])
