"""Hugging Face folders: what is read, under which names, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_builders import safetensors_bytes, tensors_bytes, write_folder

from paceline.checkpoints import open_checkpoint
from paceline.checkpoints.folder import INDEX
from paceline.core.errors import CheckpointError

LLAMA = {"model_type": "llama"}


def ones(*shape: int, value: float = 1.0) -> np.ndarray:
    return np.full(shape, value, np.float32)


def sharded(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: Any = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for name, arrays in shards.items():
        (folder / name).write_bytes(tensors_bytes(arrays))
    if weight_map is None:
        weight_map = {t: name for name, arrays in shards.items() for t in arrays}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path)
    for word in words:
        assert word in str(e.value), f"{word!r} not in {e.value}"


def test_single_file_with_every_dtype(tmp_path: Path) -> None:
    arrays = {
        "f32": ones(2, 3),
        "f16": ones(4).astype(np.float16),
        "bf16": ones(2, 2).astype(ml_dtypes.bfloat16),
        "f64": np.full((2,), 0.1),
        "mask": np.ones((2, 2), np.uint8),
    }
    folder = write_folder(tmp_path / "m", {**LLAMA, "x": 1}, arrays)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    c = open_checkpoint(folder)
    assert c.format == "safetensors"
    assert c.config == {**LLAMA, "x": 1}
    assert c.generation == {"eos_token_id": 2}
    assert c.notes == []
    assert c.metadata == {}
    assert {n: (t.shape, t.dtype, t.nbytes) for n, t in c.tensors().items()} == {
        "f32": ((2, 3), "f32", 24),
        "f16": ((4,), "f16", 8),
        "bf16": ((2, 2), "bf16", 8),
        "f64": ((2,), "f64", 16),
        "mask": ((2, 2), "u8", 4),
    }
    assert c.read("f32").dtype == np.float32
    assert c.read("f16").dtype == np.float16
    assert c.read("bf16").dtype == ml_dtypes.bfloat16
    assert c.read("f64").tolist() == [np.float32(0.1)] * 2
    with pytest.raises(CheckpointError, match="'mask' has dtype U8"):
        c.read("mask")
    with pytest.raises(CheckpointError, match="has no tensor 'other'"):
        c.read("other")
    c.close()


def test_one_file_by_its_path(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", LLAMA, {"a": ones(2)})
    assert open_checkpoint(folder / "model.safetensors").read("a").tolist() == [1, 1]
    assert open_checkpoint(str(folder / "model.safetensors")).config == LLAMA
    (folder / "config.json").unlink()
    refused(folder / "model.safetensors", "config.json")


def test_real_checkpoint(shared: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy", reason="needs the safetensors package")
    for model in ("stories260K", "gpt-nano-sort"):
        c = open_checkpoint(shared / "models" / model)
        expected = reference.load_file(shared / "models" / model / "model.safetensors")
        assert set(c.tensors()) == set(expected)
        for name, a in expected.items():
            np.testing.assert_array_equal(c.read(name), a)


def test_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": ones(2)}, TWO: {"b": ones(3, value=2)}})
    c = open_checkpoint(folder)
    assert c.read("a").tolist() == [1, 1]
    assert c.read("b").tolist() == [2, 2, 2]
    (folder / INDEX).unlink()
    assert set(open_checkpoint(folder).tensors()) == {"a", "b"}  # a complete set needs no index
    (folder / ONE).unlink()
    (folder / "other.safetensors").write_bytes(tensors_bytes({"a": ones(2)}))
    refused(folder, "several safetensors", "other.safetensors")


def test_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": ones(2)}, TWO: {"b": ones(3)}})
    (folder / TWO).unlink()
    refused(folder, TWO, "missing", "download")


def test_tensor_in_the_wrong_shard_in_none_and_in_two(tmp_path: Path) -> None:
    shards = {ONE: {"a": ones(2), "z": ones(1)}, TWO: {"b": ones(3)}}
    refused(sharded(tmp_path / "wrong", shards, {"a": TWO, "b": TWO, "z": ONE}), "'a'", ONE, TWO)
    refused(sharded(tmp_path / "none", shards, {"a": ONE, "b": TWO, "c": TWO}), "'c'", TWO)
    refused(
        sharded(tmp_path / "two", {ONE: {"a": ones(2)}, TWO: {"a": ones(2)}}, {"a": ONE, "b": TWO}), "'a'", "also in"
    )


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 5, "..\\x.safetensors", None]
)
def test_index_cannot_leave_the_folder(tmp_path: Path, name: Any) -> None:
    (tmp_path / "x.safetensors").write_bytes(tensors_bytes({"a": ones(2)}))
    refused(sharded(tmp_path / "m", {ONE: {"a": ones(2)}}, {"a": name}), "weight_map['a']")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"a": 1, "a": 2}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path / "m", {ONE: {"a": ones(2)}})
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


def test_truncated_and_empty_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", LLAMA, {"a": ones(200)})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    refused(folder, "model.safetensors", "truncated", "download")
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, "model.safetensors", "empty")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"hidden_size": 4}', '{"model_type": 3}', '{"model_type":"a","model_type":"b"}', "\xff"],
)
def test_broken_config(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "m", LLAMA, {"a": ones(2)})
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json")


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02c__builtin__\neval\n.")
    refused(folder, "pytorch_model.bin", "run code", "save_pretrained")
    refused(folder / "pytorch_model.bin", "run code", "save_pretrained")


def test_what_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.gguf", "no such file")
    refused(tmp_path, "config.json")
    refused("", "config.json")
    refused("bad\0name", "no such file")
    refused("x" * 5000, "path")
    (tmp_path / "x.txt").write_text("hello")
    refused(tmp_path / "x.txt", "not a model file")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    refused(tmp_path, "no *.safetensors")


def test_unsupported_dtype_is_found_on_opening(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", LLAMA, {})
    header = {"model.w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(4)))
    refused(folder, "model.w", "F8_E4M3", "BF16")


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "compressed-tensors", "mxfp4", "hqq", None])
def test_other_quantisations_are_refused_by_name(tmp_path: Path, method: str | None) -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": method, "bits": 4}}
    refused(write_folder(tmp_path / "m", config, {"a": ones(2)}), str(method), "AWQ, GPTQ or GGUF")


# tied heads

TABLE = "model.embed_tokens.weight"


def test_tied_head_stored_twice(tmp_path: Path) -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    same = {TABLE: ones(4, 2), "lm_head.weight": ones(4, 2)}
    c = open_checkpoint(write_folder(tmp_path / "same", tied, same))
    assert set(c.tensors()) == {TABLE}
    different = {TABLE: ones(4, 2), "lm_head.weight": ones(4, 2, value=2)}
    c = open_checkpoint(write_folder(tmp_path / "different", tied, different))
    assert set(c.tensors()) == set(different)
    assert c.config["tie_word_embeddings"] is False
    assert "lm_head" in c.notes[0]
    c = open_checkpoint(write_folder(tmp_path / "head", tied, {"lm_head.weight": ones(4, 2)}))
    assert set(c.tensors()) == {TABLE}
    c = open_checkpoint(write_folder(tmp_path / "untied", {**LLAMA, "tie_word_embeddings": False}, same))
    assert set(c.tensors()) == set(same)


# variants of names


def test_bare_gpt2_names(tmp_path: Path) -> None:
    arrays = {"wte.weight": ones(4, 2), "h.0.ln_1.weight": ones(2), "lm_head.weight": ones(4, 2)}
    c = open_checkpoint(write_folder(tmp_path / "m", {"model_type": "gpt2"}, arrays))
    assert set(c.tensors()) == {"transformer.wte.weight", "transformer.h.0.ln_1.weight", "lm_head.weight"}
    assert c.read("transformer.h.0.ln_1.weight").tolist() == [1, 1]


@pytest.mark.parametrize("style", ["old", "new"])
def test_text_model_of_a_multimodal_folder(tmp_path: Path, style: str) -> None:
    prefix = "language_model.model." if style == "old" else "model.language_model."
    vision = "vision_tower.a" if style == "old" else "model.vision_tower.a"
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 2}, "eos_token_id": [1, 106], "vision_config": {}}
    arrays = {f"{prefix}embed_tokens.weight": ones(4, 2), f"{prefix}norm.weight": ones(2), vision: ones(3)}
    c = open_checkpoint(write_folder(tmp_path / "m", config, arrays))
    assert set(c.tensors()) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert c.config == {"model_type": "gemma3_text", "hidden_size": 2, "eos_token_id": [1, 106]}
    assert "other modalities" in c.notes[0]


def test_two_spellings_of_one_name(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 2}}
    arrays = {"model.language_model.norm.weight": ones(2), "language_model.model.norm.weight": ones(2)}
    refused(write_folder(tmp_path / "m", config, arrays), "model.norm.weight", "both mean")


def test_a_digest_tells_checkpoints_apart(tmp_path: Path) -> None:
    from paceline import lab
    from paceline.checkpoints import open_checkpoint

    first, other = (open_checkpoint(lab.path(name)).digest() for name in ("lab-8m", "lab-1m"))
    assert first == open_checkpoint(lab.path()).digest() != other
    copy = tmp_path / "copy"
    shutil.copytree(lab.path(), copy)
    assert open_checkpoint(copy).digest() == first
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_checkpoint(copy).digest() != first
