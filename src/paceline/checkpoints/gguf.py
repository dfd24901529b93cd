"""GGUF checkpoints: one file or all parts of a split one, presented under Hugging Face names, shapes and conventions.

What `read` gives: Q4_0, Q4_1 and Q8_0 matrices as `Codes` (group 32), F32, F16 and BF16 as views in their own type,
everything else as float32, because no smaller type holds a dequantised K block exactly. One tensor at a time is in
memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paceline.checkpoints import gguf_config, gguf_dequant
from paceline.checkpoints.base import TensorInfo
from paceline.checkpoints.files import sampled_digest, some
from paceline.checkpoints.gguf_file import GgufFile, GgufTensor
from paceline.checkpoints.gguf_names import NO_WEIGHTS, Source, sources
from paceline.core.errors import CheckpointError
from paceline.ops.packed import Codes, Packed

MAX_PARTS = 1000
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_CODED = ("Q4_0", "Q4_1", "Q8_0")


class GgufCheckpoint:
    """A GGUF model. `metadata` holds every key of the (first) file: `tokenizer.ggml.*`, `tokenizer.chat_template`,
    ...
    """

    format: Literal["gguf"] = "gguf"

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []
        self._files: list[GgufFile] = []
        try:
            self._open(path)
            self._place = _merge(self._files)
            self.metadata: dict[str, Any] = self._files[0].metadata
            shapes = {name: self._tensor(name).shape for name in self._place}
            factors = {n: self._factors(n) for n in NO_WEIGHTS if n in self._place}
            self.config = gguf_config.config(self.metadata, shapes, factors, str(path))
            self.generation = gguf_config.generation(self.metadata)
            self._sources = self._name(shapes)
        except CheckpointError:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        first = GgufFile(_first_part(path))
        self._files.append(first)
        count = first.metadata.get("split.count", 1)
        if count in (0, 1):
            return
        m = _SPLIT.fullmatch(first.path.name)
        if type(count) is not int or not 1 < count <= MAX_PARTS:
            raise CheckpointError(
                f"{first.path}: split.count = {str(count)[:40]}: must be an integer up to {MAX_PARTS}"
            )
        if not m or int(m[3]) != count:
            raise CheckpointError(
                f"{first.path}: is one of {count} parts; give it its name back, ending in -00001-of-{count:05d}.gguf"
            )
        names = [f"{m[1]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
        missing = [n for n in names if not (first.path.parent / n).is_file()]
        if missing:
            raise CheckpointError(f"{first.path}: parts are missing beside it: {some(missing)}; download them")
        self._files += [GgufFile(first.path.parent / n) for n in names[1:]]
        _check_split(self._files, count)

    def _tensor(self, name: str) -> GgufTensor:
        return self._place[name].tensors[name]

    def _factors(self, name: str) -> np.ndarray:
        if self._tensor(name).type != "F32":
            raise CheckpointError(f"{self.path}: tensor {name!r} has type {self._tensor(name).type}; must be F32")
        return self._place[name].array(name, gguf_dequant.PLAIN["F32"])

    def _name(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Source]:
        arch = gguf_config.architecture(self.metadata, str(self.path))
        heads, kv_heads = (self.config.get(f"num_{k}_heads", 0) for k in ("attention", "key_value"))
        try:
            out = sources(arch, shapes, heads, kv_heads)
        except CheckpointError as e:
            raise CheckpointError(f"{self.path}: {e}") from e
        for s in out.values():
            if s.heads and shapes[s.name][0] % (2 * s.heads):
                raise CheckpointError(
                    f"{self.path}: tensor {s.name!r}: {shapes[s.name][0]} rows cannot be split into {s.heads} heads"
                )
        return out

    def tensors(self) -> dict[str, TensorInfo]:
        out = {}
        for name, s in self._sources.items():
            t = self._tensor(s.name)
            shape, nbytes = (t.shape, t.nbytes) if s.expert is None else (t.shape[1:], t.nbytes // t.shape[0])
            dtype = t.type.lower() if t.type in gguf_dequant.PLAIN else t.type
            out[name] = TensorInfo(shape[::-1] if s.transpose else shape, dtype, nbytes)
        return out

    def read(self, name: str) -> np.ndarray | Codes | Packed:
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(
                f"{self.path}: has no tensor {name!r}; the file is incomplete or of another architecture"
            )
        tensor, file = self._tensor(source.name), self._place[source.name]
        if tensor.type in gguf_dequant.PLAIN:
            array = file.array(source.name, gguf_dequant.PLAIN[tensor.type])
            return _restore(array if source.expert is None else array[source.expert], source)
        raw, shape = file.raw(source.name), tensor.shape
        if source.expert is not None:
            raw, shape = raw.reshape(shape[0], -1)[source.expert], shape[1:]
        if tensor.type in _CODED and len(shape) == 2 and not (source.transpose or source.minus_one):
            codes = gguf_dequant.codes(raw, tensor.type, (shape[0], shape[1]))
            if codes is not None:
                return _reorder(codes, source.heads)
        return _restore(gguf_dequant.dequantise(raw, tensor.type, shape), source)

    def release(self) -> None:
        for file in self._files:
            file.release()

    def digest(self) -> str:
        return sampled_digest(self.config, [file.path for file in self._files])

    def close(self) -> None:
        for file in self._files:
            file.close()


def _first_part(path: Path) -> Path:
    m = _SPLIT.fullmatch(path.name)
    if m and int(m[2]) > 1:
        return path.with_name(f"{m[1]}-00001-of-{m[3]}.gguf")
    return path


def _check_split(files: list[GgufFile], count: int) -> None:
    for i, file in enumerate(files):
        number, parts = file.metadata.get("split.no"), file.metadata.get("split.count")
        if number != i or parts != count:
            raise CheckpointError(
                f"{file.path}: says it is part {number} of {parts}, its name says {i} of {count}; download the "
                "parts again"
            )
    total, found = files[0].metadata.get("split.tensors.count"), sum(len(f.tensors) for f in files)
    if total is not None and total != found:
        raise CheckpointError(
            f"{files[0].path}: split.tensors.count = {total}, but the parts hold {found} tensors; download them again"
        )


def _merge(files: list[GgufFile]) -> dict[str, GgufFile]:
    out: dict[str, GgufFile] = {}
    for file in files:
        for name in file.tensors:
            if name in out:
                raise CheckpointError(
                    f"{file.path}: tensor {name[:200]!r} is also in {out[name].path.name}; the parts contradict "
                    "each other"
                )
            out[name] = file
    return out


def _order(n_rows: int, heads: int) -> np.ndarray:
    """Row numbers that turn llama's interleaved pairs (0, d/2, 1, d/2 + 1, ...) of every head back to (0, 1, ..., d
    - 1).
    """
    return np.arange(n_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _restore(array: np.ndarray, source: Source) -> np.ndarray:
    """What the conversion to GGUF changed, undone."""
    if source.heads:
        return array[_order(array.shape[0], source.heads)]
    if source.minus_one:
        return array.astype(np.float32) - np.float32(1)
    return array.T if source.transpose else array


def _reorder(codes: Codes, heads: int) -> Codes:
    if not heads:
        return codes
    rows = _order(codes.q.shape[0], heads)
    return Codes(
        codes.bits, codes.q[rows], codes.scales[rows], None if codes.mins is None else codes.mins[rows], codes.group
    )
