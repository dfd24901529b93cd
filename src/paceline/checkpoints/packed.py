"""Our own quantised checkpoints: a folder whose matrices are stored in the kernels' tile layout and used by mmap,
without a copy.

docs/checkpoint-format.md is the schema. Beside config.json, the tokenizer and the shards lies paceline.json, which says
for every parameter its format, shape, group and shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paceline.checkpoints.base import TensorInfo
from paceline.checkpoints.files import AtomicFile, check_space, is_count, read_json, sampled_digest, sync_folder
from paceline.checkpoints.safetensors import SafetensorsFile, SafetensorsWriter, dtype_name
from paceline.core.errors import CheckpointError
from paceline.ops import formats
from paceline.ops.packed import Codes, Packed

VERSION = 2
TABLE = "paceline.json"
ALIGN = 64  # bytes: a cache line and the widest vector
MAX_SHARD = 4 << 30
FIRST_ROOM, LAST_ROOM = 32 << 10, 4 << 20  # bytes for the header of the first shard; doubled with every further one
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
PARTS = ("data", "scales", "mins", "factors")

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


def layout(form: str, shape: tuple[int, int], group: int, mins: bool) -> Layout:
    """Shape and dtype of a `Packed`'s arrays. Raises ValueError, saying why, for what is no format of ours."""
    if form not in formats.names():
        raise ValueError(f"format {form!r} is unknown; there are {', '.join(formats.names())}")
    if why := formats.get(form).why_not(shape, group, mins):
        raise ValueError(f"format {form}: {why}")
    return formats.get(form).arrays(shape, group, mins)


class PackedCheckpoint:
    """A folder written by `save_packed`. Names are parameter names of our model programs; `read` gives `Packed` on
    mapped memory.
    """

    format: Literal["packed"] = "packed"

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []
        self.metadata: dict[str, Any] = {}
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation = read_json(generation) if generation.is_file() else {}
        table = read_json(path / TABLE)
        if table.get("version") != VERSION:
            raise CheckpointError(
                f"{path / TABLE}: version = {str(table.get('version'))[:40]!r}: this program reads version {VERSION}; "
                "quantize the model again, or use the program that wrote it"
            )
        self._files: list[SafetensorsFile] = []
        try:
            self._files = _open_shards(path, table)
            self._entries = _entries(path, table, self._files)
        except CheckpointError:
            self.close()
            raise

    def tensors(self) -> dict[str, TensorInfo]:
        out = {}
        for name, entry in self._entries.items():
            file = self._files[entry["file"] - 1]
            nbytes = sum(file.entries[stored].nbytes for stored in entry["stored"].values())
            out[name] = TensorInfo(tuple(entry["shape"]), entry["format"] or "f32", nbytes)
        return out

    def read(self, name: str) -> np.ndarray | Codes | Packed:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: has no parameter {name!r}; quantize the model again with this version")
        file = self._files[entry["file"] - 1]
        arrays = {part: file.read(stored) for part, stored in entry["stored"].items()}
        if entry["format"] is None:
            return arrays["data"]
        shape = (entry["shape"][0], entry["shape"][1])
        rest = (arrays.get("scales"), arrays.get("mins"), entry["group"], arrays.get("factors"))
        return Packed(entry["format"], shape, arrays["data"], *rest)

    def release(self) -> None:
        for file in self._files:
            file.release()

    def digest(self) -> str:
        return sampled_digest(self.config, [file.path for file in self._files])

    def close(self) -> None:
        for file in self._files:
            file.close()


def _shard_name(i: int, n: int) -> str:
    return f"paceline-{i:05d}-of-{n:05d}.safetensors"


def _open_shards(path: Path, table: Mapping[str, Any]) -> list[SafetensorsFile]:
    n = table.get("files")
    if type(n) is not int or not 1 <= n <= 99999:
        raise CheckpointError(f"{path / TABLE}: files = {str(n)[:40]}: must be the number of shards")
    missing = [name for name in (_shard_name(i, n) for i in range(1, n + 1)) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path}: shards are missing, the first is {missing[0]}; copy the folder again")
    files: list[SafetensorsFile] = []
    try:
        for i in range(1, n + 1):
            files.append(SafetensorsFile(path / _shard_name(i, n)))
    except CheckpointError:
        for file in files:
            file.close()
        raise
    return files


def _entries(path: Path, table: Mapping[str, Any], files: list[SafetensorsFile]) -> dict[str, dict[str, Any]]:
    raw = table.get("tensors")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path / TABLE}: tensors must be an object")
    return {name: _entry(f"{path / TABLE}: {name[:200]!r}", name, entry, files) for name, entry in raw.items()}


def _entry(where: str, name: str, entry: Any, files: list[SafetensorsFile]) -> dict[str, Any]:
    """The table's entry with its stored arrays, checked against the shard's header."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: must be an object")
    form, shape, group, number = entry.get("format"), entry.get("shape"), entry.get("group", 0), entry.get("file")
    if not isinstance(shape, list) or not all(is_count(n) for n in shape) or (form is not None and len(shape) != 2):
        raise CheckpointError(f"{where}: shape = {str(shape)[:60]}: must be non-negative integers (two for a matrix)")
    if type(number) is not int or not 1 <= number <= len(files):
        raise CheckpointError(f"{where}: file = {str(number)[:40]}: must be from 1 to {len(files)}")
    if not is_count(group):
        raise CheckpointError(f"{where}: group = {str(group)[:40]}: must be a non-negative integer")
    file = files[number - 1]
    if form is None:
        stored, expected = {"data": name}, {"data": (tuple(shape), np.dtype(np.float32))}
    else:
        try:
            expected = layout(str(form), (shape[0], shape[1]), group, f"{name}.mins" in file.entries)
        except ValueError as e:
            raise CheckpointError(f"{where}: {e}; quantize the model again with this version") from e
        stored = {part: f"{name}.{part}" for part in expected}
    for part, inner in stored.items():
        found = file.entries.get(inner)
        if found is None:
            raise CheckpointError(f"{file.path}: lacks {inner!r}, which {TABLE} places there; copy the folder again")
        dims, dtype = expected[part]
        if (found.dtype, found.shape) != (dtype_name(dtype), dims):
            raise CheckpointError(
                f"{file.path}: {inner!r} is {found.dtype} {list(found.shape)}, but must be {dtype_name(dtype)} "
                f"{list(dims)}; "
                "the folder contradicts itself, quantize the model again"
            )
    return {"format": form, "shape": shape, "group": group, "file": number, "stored": stored}


def save_packed(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Packed | np.ndarray]],
    *,
    form: str,
    generation: Mapping[str, Any] | None = None,
    source: Path | None = None,
    write_tokenizer: Callable[[Path], None] | None = None,
    expected_bytes: int = 0,
    overwrite: bool = False,
    max_shard: int = MAX_SHARD,
) -> None:
    """Write a quantised checkpoint, one tensor at a time. The folder appears complete or not at all.

    `form` is the user's word for the quantisation ("int4:group=64"); it is only displayed. Tokenizer files are copied
    from the folder `source`, then `write_tokenizer(folder)` may add what the source keeps elsewhere (GGUF). Raises
    CheckpointError when the folder exists (and is not one of ours to overwrite), the disk is too small, or a tensor is
    none of our formats.
    """
    _check_target(folder, overwrite)
    temp = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_space(folder.parent, expected_bytes)
        temp.mkdir()
        table = _write_shards(temp, tensors, max_shard)
        if source is not None:
            _copy_tokenizer(source, temp)
        if write_tokenizer is not None:
            write_tokenizer(temp)
        if generation:
            _write_json(temp / "generation_config.json", generation)
        groups = sorted({e["group"] for e in table["tensors"].values() if e.get("group")})
        section = {"version": VERSION, "format": form, "groups": groups}
        original = {k: v for k, v in config.items() if k != "quantization_config"}  # it described the source's tensors
        _write_json(temp / "config.json", {**original, "paceline": section})
        _write_json(temp / TABLE, table)
        sync_folder(temp)
        _replace(temp, folder)
    except OSError as e:
        raise CheckpointError(
            f"{folder}: writing failed ({e.strerror or e}); nothing was left behind; free some space and try again"
        ) from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / TABLE).is_file():
        raise CheckpointError(
            f"{folder}: exists and is no quantised checkpoint of ours, so it is not replaced; choose another folder"
        )
    if not overwrite:
        raise CheckpointError(f"{folder}: exists; choose another folder or allow overwriting it")


def _replace(temp: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(temp, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with AtomicFile(path) as f:
        f.write(json.dumps(value, indent=1).encode() + b"\n")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _arrays(name: str, tensor: Packed | np.ndarray) -> dict[str, np.ndarray]:
    """The stored arrays of a tensor by their names in the file; checks them against the layout."""
    if isinstance(tensor, np.ndarray):
        return {name: tensor.astype(np.float32, copy=False)}
    try:
        expected = layout(tensor.format, tensor.shape, tensor.group, tensor.mins is not None)
    except ValueError as e:
        raise CheckpointError(f"parameter {name!r}: {e}, so it cannot be stored") from e
    out = {}
    for part in PARTS:
        array = getattr(tensor, part)
        if array is None:
            continue
        assert (array.shape, array.dtype) == expected.get(part), f"{name}.{part}: {array.dtype} {array.shape}"
        out[f"{name}.{part}"] = array
    return out


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Packed | np.ndarray]], max_shard: int) -> dict[str, Any]:
    """Write the shards and give the table."""
    table: dict[str, Any] = {}
    n, room = 0, FIRST_ROOM
    writer: SafetensorsWriter | None = None
    try:
        for name, tensor in tensors:
            if name in table:
                raise CheckpointError(f"parameter {name!r} is written twice")
            arrays = _arrays(name, tensor)
            size = sum(a.nbytes for a in arrays.values())
            if writer and writer.nbytes and (writer.nbytes + size > max_shard or not writer.fits(arrays)):
                writer.finish()
                writer = None
            if writer is None:
                n += 1
                writer = SafetensorsWriter(folder / f"{n}", room=room, align=ALIGN, metadata={"format": "paceline"})
                room = min(room * 2, LAST_ROOM)
            for stored, array in arrays.items():
                writer.add(stored, array)
            table[name] = {"file": n, **_describe(tensor)}
        if writer is None:
            raise CheckpointError("there is nothing to write: the model has no parameters")
        writer.finish()
    except BaseException:
        if writer is not None:
            writer.abort()
        raise
    for i in range(1, n + 1):
        os.rename(folder / f"{i}", folder / _shard_name(i, n))
    return {"version": VERSION, "files": n, "tensors": table}


def _describe(tensor: Packed | np.ndarray) -> dict[str, Any]:
    if isinstance(tensor, np.ndarray):
        return {"shape": list(tensor.shape)}
    return {"format": tensor.format, "shape": list(tensor.shape), "group": tensor.group}
