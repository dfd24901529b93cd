"""The GGUF parser against damaged, hostile and merely large files, all made byte by byte."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_builders import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf_bytes,
    gguf_string,
    llama_keys,
    small_gguf,
)

from paceline.checkpoints import open_checkpoint
from paceline.checkpoints.gguf_file import GgufFile
from paceline.core.errors import CheckpointError

HUGE = (1 << 64) - 1


def refused(tmp_path: Path, content: bytes, *words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path)
    for word in ("model.gguf", *words):
        assert word in str(e.value), f"{word!r} not in {e.value}"


def matrix(name: str = "token_embd.weight", extents: Any = (32, 4), kind: int = 0, offset: int = 0) -> Any:
    return (name, list(extents), kind, offset)


DATA = np.arange(128, dtype="<f4").tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_valid_file(tmp_path: Path, version: int) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(llama_keys(), [matrix()], DATA, version=version))
    file = GgufFile(tmp_path / "x.gguf")
    assert file.tensors["token_embd.weight"].shape == (4, 32)
    np.testing.assert_array_equal(file.array("token_embd.weight", np.dtype("<f4")), np.arange(128).reshape(4, 32))
    c = open_checkpoint(tmp_path / "x.gguf")
    assert c.format == "gguf"
    assert c.read("model.embed_tokens.weight").tolist() == np.arange(128).reshape(4, 32).tolist()  # type: ignore[union-attr]


def test_every_metadata_type(tmp_path: Path) -> None:
    keys = [
        ("u8", U8, 255),
        ("i8", I8, -1),
        ("u16", U16, 65535),
        ("i16", I16, -2),
        ("u32", U32, 1 << 31),
        ("i32", I32, -3),
        ("f32", F32, 0.5),
        ("bool", BOOL, True),
        ("string", STRING, "grün"),
        ("u64", U64, HUGE),
        ("i64", I64, -4),
        ("f64", F64, 0.1),
        ("list", ARRAY, (I32, [1, -2, 3])),
        ("words", ARRAY, (STRING, ["a", "", "ß"])),
        ("flags", ARRAY, (BOOL, [True, False])),
        ("floats", ARRAY, (F32, [0.5, -1])),
        ("none", ARRAY, (U8, [])),
        ("nested", ARRAY, (ARRAY, [(I32, [1]), (STRING, ["x"])])),
    ]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(keys, []))
    assert GgufFile(tmp_path / "x.gguf").metadata == {
        "u8": 255,
        "i8": -1,
        "u16": 65535,
        "i16": -2,
        "u32": 1 << 31,
        "i32": -3,
        "f32": 0.5,
        "bool": True,
        "string": "grün",
        "u64": HUGE,
        "i64": -4,
        "f64": 0.1,
        "list": [1, -2, 3],
        "words": ["a", "", "ß"],
        "flags": [True, False],
        "floats": [0.5, -1.0],
        "none": [],
        "nested": [[1], ["x"]],
    }


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    whole = small_gguf()
    path = tmp_path / "model.gguf"
    for n in [*range(len(whole) - 512), len(whole) - 512, len(whole) - 100, len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(whole)
    open_checkpoint(path)


def test_magic_version_and_byte_order(tmp_path: Path) -> None:
    refused(tmp_path, gguf_bytes([], [], magic=b"GGML", data=bytes(64)), "not a GGUF")
    refused(tmp_path, b"GGUF", "GGUF")
    refused(tmp_path, gguf_bytes([], [], version=1), "version 1")
    refused(tmp_path, gguf_bytes([], [], version=4), "version 4")
    refused(tmp_path, gguf_bytes([], [], version=3 << 24), "big-endian")


@pytest.mark.parametrize("n", [HUGE, 1 << 63, (1 << 32) + 1, 1 << 21, 1 << 17, 100])
def test_counts_that_the_file_cannot_hold(tmp_path: Path, n: int) -> None:
    refused(tmp_path, gguf_bytes([], [matrix()], DATA, n_tensors=n), "tensor count", str(n))
    refused(tmp_path, gguf_bytes([], [matrix()], DATA, n_keys=n), "metadata count", str(n))


@pytest.mark.parametrize("n", [HUGE, 1 << 63, 1 << 40, 1 << 28, 500])
def test_lengths_that_the_file_cannot_hold(tmp_path: Path, n: int) -> None:
    length = struct.pack("<Q", n)
    refused(tmp_path, gguf_bytes([("k", STRING, "v")], [matrix()], DATA).replace(gguf_string("k"), length + b"k"))
    for kind in (U8, I32, F64, STRING, BOOL, ARRAY):
        refused(tmp_path, gguf_bytes([("k", ARRAY, struct.pack("<I", kind) + length + b"xxxx")], [], bytes(200)), "'k'")
    body = struct.pack("<IQ", STRING, 2) + gguf_string("ok") + length + b"yy"
    refused(tmp_path, gguf_bytes([("k", ARRAY, body)], [], bytes(64)), "'k'")


def test_nested_arrays_are_bounded(tmp_path: Path) -> None:
    body = struct.pack("<IQ", ARRAY, 1) * 10_000 + struct.pack("<IQ", U8, 0)
    refused(tmp_path, gguf_bytes([("deep", ARRAY, body)], []), "'deep'", "nested")


def test_types_of_values(tmp_path: Path) -> None:
    refused(tmp_path, gguf_bytes([("k", 99, b"")], [], bytes(64)), "'k'", "99")
    refused(tmp_path, gguf_bytes([("k", ARRAY, struct.pack("<IQ", 77, 1))], [], bytes(64)), "'k'", "77")


def test_duplicate_keys_and_text_that_is_no_text(tmp_path: Path) -> None:
    refused(tmp_path, gguf_bytes([("k", U8, 1), ("k", U8, 2)], []), "'k'", "twice")
    refused(tmp_path, gguf_bytes([("k", STRING, b"\xff\xfe")], []), "'k'", "UTF-8")
    refused(tmp_path, gguf_bytes([("k", ARRAY, (STRING, [b"fine", b"\xff"]))], []), "'k'", "UTF-8", "string 1")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (U32, 0),
        (U32, 3),
        (U32, 48),
        (U32, 1 << 21),
        (U32, 1 << 31),
        (STRING, "32"),
        (U64, 32),
        (I32, -32),
        (F32, 32.0),
        (ARRAY, (U32, [32])),
    ],
)
def test_alignment(tmp_path: Path, kind: int, value: Any) -> None:
    refused(tmp_path, small_gguf(general__alignment=(kind, value)), "general.alignment")


def test_other_alignments_are_honoured(tmp_path: Path) -> None:
    for n in (1, 8, 64, 4096):
        data = np.arange(128, dtype="<f4").tobytes()
        keys = llama_keys(general__alignment=(U32, n))
        (tmp_path / "x.gguf").write_bytes(gguf_bytes(keys, [matrix()], data, alignment=n))
        a = open_checkpoint(tmp_path / "x.gguf").read("model.embed_tokens.weight")
        assert isinstance(a, np.ndarray)
        assert a.flags.aligned
        assert a.ravel().tolist() == list(range(128))


@pytest.mark.parametrize(
    "extents",
    [
        [0, 4],
        [1 << 63, 2],
        [1 << 32, 1 << 32],
        [HUGE],
        [HUGE, HUGE, HUGE, HUGE],
        [32, 5],
        [32, 4, 2],
        [1 << 16, 1 << 16, 1 << 16, 1 << 16],
    ],
)
def test_extents(tmp_path: Path, extents: list[int]) -> None:
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix(extents=extents)], DATA), "token_embd.weight")


@pytest.mark.parametrize("rank", [0, 5, 1 << 31])
def test_rank(tmp_path: Path, rank: int) -> None:
    content = gguf_bytes(llama_keys(), [matrix()], DATA)
    name = gguf_string("token_embd.weight")
    refused(tmp_path, content.replace(name + struct.pack("<I", 2), name + struct.pack("<I", rank)), "rank")


@pytest.mark.parametrize("offset", [HUGE, 1 << 63, 1 << 40, 7, 33, 32])
def test_offsets(tmp_path: Path, offset: int) -> None:
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix(offset=offset)], DATA), "token_embd.weight")


def test_overlaps_and_duplicate_tensors(tmp_path: Path) -> None:
    two = [matrix(), matrix("output.weight", offset=32)]
    refused(tmp_path, gguf_bytes(llama_keys(), two, DATA + DATA), "output.weight", "inside")
    two = [matrix(), matrix(offset=512)]
    refused(tmp_path, gguf_bytes(llama_keys(), two, DATA + DATA), "token_embd.weight", "twice")


def test_types_of_tensors(tmp_path: Path) -> None:
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix(kind=16)], DATA), "IQ2_XXS", "token_embd.weight", "Q4_K_M")
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix(kind=39)], DATA), "MXFP4")
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix(kind=4)], DATA), "unknown type 4")
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix(kind=1 << 31)], DATA), "unknown type")
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix(extents=[16, 8], kind=8)], DATA), "Q8_0", "block of 32")


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("general.architecture", STRING, "mamba"),
        ("general.architecture", U32, 5),
        ("llama.block_count", U32, 0),
        ("llama.block_count", U32, 1 << 31),
        ("llama.block_count", STRING, "1"),
        ("llama.embedding_length", F32, 32.0),
        ("llama.attention.head_count", U32, 0),
        ("llama.attention.head_count", ARRAY, (U32, [2, 4])),
        ("llama.attention.layer_norm_rms_epsilon", STRING, "x"),
        ("llama.attention.layer_norm_rms_epsilon", F32, float("nan")),
        ("llama.attention.value_length", U32, 4),
        ("llama.rope.scaling.type", U32, 4),
        ("llama.context_length", BOOL, True),
        ("llama.rope.freq_base", F32, float("inf")),
    ],
)
def test_hyperparameters(tmp_path: Path, key: str, kind: int, value: Any) -> None:
    refused(tmp_path, small_gguf(**{key.replace(".", "__"): (kind, value)}), key)


def test_missing_hyperparameter_and_missing_table(tmp_path: Path) -> None:
    keys = [k for k in llama_keys() if k[0] != "llama.context_length"]
    refused(tmp_path, gguf_bytes(keys, [matrix()], DATA), "llama.context_length", "missing")
    refused(tmp_path, gguf_bytes(llama_keys(), [matrix("output.weight")], DATA), "token_embd.weight")
    refused(tmp_path, gguf_bytes([], [matrix()], DATA), "general.architecture")


def test_vocabulary_larger_than_the_table(tmp_path: Path) -> None:
    tokens = (ARRAY, (STRING, ["<0x-1>", "b", "c", "d", "e"]))
    refused(tmp_path, small_gguf(tokenizer__ggml__tokens=tokens), "5 tokens", "4")


def test_a_file_that_shrinks_while_open_is_refused_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    big = np.zeros(1 << 16, "<f4").tobytes()
    path.write_bytes(gguf_bytes(llama_keys(), [matrix(extents=[32, 2048])], big))
    c = open_checkpoint(path)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="truncated while in use"):
        c.read("model.embed_tokens.weight")


def test_a_real_vocabulary_opens_quickly_and_in_proportion(tmp_path: Path) -> None:
    """Hardening must not cost: 60,000 tokens with scores, 100,000 merges, 1,000 tensors."""
    tokens = [f"token{i}" for i in range(60_000)]
    merges = [f"to ken{i}" for i in range(100_000)]
    raw = {
        n: struct.pack("<IQ", STRING, len(v)) + b"".join(map(gguf_string, v))
        for n, v in {"t": tokens, "m": merges}.items()
    }
    keys = [
        *llama_keys(),
        ("tokenizer.ggml.tokens_", ARRAY, raw["t"]),
        ("tokenizer.ggml.merges", ARRAY, raw["m"]),
        ("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", F32, 60_000) + bytes(240_000)),
    ]
    tensors = [matrix(), *(matrix(f"blk.{i}.x.weight", [8], offset=512 + 32 * i) for i in range(1000))]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(keys, tensors, DATA + bytes(32_000)))
    start = time.process_time()
    file = GgufFile(tmp_path / "x.gguf")
    assert time.process_time() - start < 3  # takes about 0.1 s; a quadratic parser would take minutes
    assert file.metadata["tokenizer.ggml.merges"][-1] == "to ken99999"


def test_a_small_file_cannot_take_much_memory(tmp_path: Path) -> None:
    keys = [(f"k{i}", ARRAY, struct.pack("<IQ", U8, 1 << 24)) for i in range(50)]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(keys, [], bytes(10_000)))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        GgufFile(tmp_path / "x.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
