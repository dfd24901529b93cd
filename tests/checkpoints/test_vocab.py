"""GGUF vocabularies: the same ids as the tokenizer they came from and as llama.cpp, and hostile metadata refused."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from paceline.checkpoints.pretokenize import PRE_TOKENIZERS
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.checkpoints.vocab import TokenType
from paceline.core.errors import CheckpointError

P = "tokenizer.ggml."
SAMPLES = [
    "Hello, world!", " two  spaces   three", "   ", "\n\n\tx", "a", "aaaaaaaaaaaaaaaaaaaaaaa", "ababababab", "naïve café — “quotes”",
    "日本語のテキスト", "😀👩‍👩‍👧 emoji", "I'll they'RE don't", "1234567890 3.14159", "x=f(y);//c\r\n  return", "\u0000\u0001", "é e\u0301",
]  # fmt: skip


def text_lines(shared: Path, per_file: int) -> list[str]:
    lines: list[str] = []
    for file in sorted((shared / "data/text").glob("*.utf8")):
        found = [line for line in file.read_text("utf-8").split("\n") if line]
        lines += found[:: max(1, len(found) // per_file)][:per_file]
    return lines


def tiny_spm() -> dict[str, Any]:
    """A SentencePiece vocabulary of a few words; every field as llama.cpp writes it."""
    words = [
        "▁t",
        "he",
        "▁the",
        "in",
        "▁▁",
        "▁▁▁",
        "▁▁▁▁",
        "ing",
        "▁a",
        "lo",
        "hel",
        "hello",
        "▁hello",
        "wor",
        "ld",
        "▁wor",
        "▁world",
    ]
    letters = [*"▁abcdefghijklmnopqrstuvwxyzé日"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)]]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    for word in dict.fromkeys([*words, *letters]):
        tokens.append(word)
        types.append(TokenType.NORMAL)
    tokens.append("<tool>")
    types.append(TokenType.USER_DEFINED)
    scores = [0.0] * 259 + [-1e9 if set(t) == {"▁"} and len(t) > 1 else -float(i) for i, t in enumerate(tokens[259:])]
    return {
        P + "model": "llama", P + "tokens": tokens, P + "scores": scores, P + "token_type": [int(t) for t in types],
        P + "bos_token_id": 1, P + "eos_token_id": 2, P + "unknown_token_id": 0,
    }  # fmt: skip


def bpe_metadata(vocab: dict[str, int], merges: list[str], pre: str, special: set[str]) -> dict[str, Any]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        P + "model": "gpt2", P + "pre": pre, P + "tokens": tokens, P + "merges": merges,
        P + "token_type": [3 if t in special else 1 for t in tokens],
        P + "bos_token_id": len(tokens) - 1, P + "eos_token_id": len(tokens) - 1,
    }  # fmt: skip


@cache
def llama2(shared: Path) -> dict[str, Any]:
    """The metadata of a Llama-2 GGUF made from its tokenizer.json; runs of spaces have one score there, as in the original."""
    model = json.loads((shared / "tokenizers/llama2-fixed/tokenizer.json").read_text("utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    first: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        first.setdefault(merge.replace(" ", ""), rank)
    scores = [0.0] * 259
    for i, token in enumerate(tokens[259:]):
        spaces = set(token) == {"▁"} and len(token) > 1
        scores.append(-1e9 if spaces else -float(first.get(token, len(first) + i)))
    return {
        P + "model": "llama", P + "tokens": tokens, P + "scores": scores,
        P + "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        P + "bos_token_id": 1, P + "eos_token_id": 2, P + "unknown_token_id": 0,
    }  # fmt: skip


def read_merges(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").split("\n") if line and not line.startswith("#version")]


@cache
def gpt2(shared: Path) -> dict[str, Any]:
    folder = shared / "tokenizers/cs336-gpt2"
    vocab = json.loads((folder / "gpt2_vocab.json").read_text("utf-8"))
    return {
        **bpe_metadata(vocab, read_merges(folder / "gpt2_merges.txt"), "gpt-2", {"<|endoftext|>"}),
        P + "add_bos_token": False,
    }


@cache
def llama3(shared: Path) -> dict[str, Any]:
    folder = shared / "tokenizers/llama3.2"
    vocab = json.loads((folder / "encoder.json").read_text("utf-8"))
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
    vocab.update({text: len(vocab) + i for i, text in enumerate(special)})
    found = bpe_metadata(vocab, read_merges(folder / "vocab.bpe"), "llama-bpe", set(special))
    return {**found, P + "bos_token_id": vocab[special[0]]}


# --- the same ids --------------------------------------------------------------------------------


@cache
def converted(make: Callable[[Path], dict[str, Any]], shared: Path) -> Tokenizer:
    return Tokenizer.from_gguf(make(shared))


def test_llama2_equals_its_source(shared: Path) -> None:
    ours, source = converted(llama2, shared), Tokenizer.from_folder(shared / "tokenizers/llama2-fixed")
    for line in [*SAMPLES, *text_lines(shared, 300)]:
        assert ours.encode(line) == source.encode(line), line


def test_gpt2_equals_its_source(shared: Path, tmp_path: Path) -> None:
    folder = shared / "tokenizers/cs336-gpt2"
    os.symlink(folder / "gpt2_vocab.json", tmp_path / "vocab.json")
    os.symlink(folder / "gpt2_merges.txt", tmp_path / "merges.txt")
    ours, source = converted(gpt2, shared), Tokenizer.from_folder(tmp_path)
    for line in [*SAMPLES, *text_lines(shared, 300)]:
        assert ours.encode(line) == source.encode(line), line


def test_llama3_equals_its_source(shared: Path) -> None:
    ours, source = converted(llama3, shared), Tokenizer.from_folder(shared / "tokenizers/llama3.2", pre="llama-bpe")
    for line in [*SAMPLES, *text_lines(shared, 300)]:
        assert ours.encode(line, add_special_tokens=False) == source.encode(line, add_special_tokens=False), line
    assert ours.encode("x")[0] == ours.bos == 128000
    assert {128001, 128002} <= ours.ends


def llama_cpp_vocabulary(metadata: dict[str, Any], path: Path) -> Any:
    """llama.cpp's own view of the metadata, through a file that holds nothing else."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.parametrize("make", [llama2, gpt2, llama3])
def test_same_ids_as_llama_cpp(shared: Path, tmp_path: Path, make: Any) -> None:
    metadata = make(shared)
    ours, oracle = converted(make, shared), llama_cpp_vocabulary(metadata, tmp_path / "vocab.gguf")
    special = "<s>hi</s> there <|eot_id|>x<|begin_of_text|>"
    for line in [*SAMPLES, special, *text_lines(shared, 200)]:
        if "\u0000" in line:  # llama.cpp's text ends there
            continue
        assert ours.encode(line) == oracle.tokenize(line.encode(), add_bos=True, special=True), line
    untrusted = ours.encode(special, parse_special=False)
    assert untrusted == oracle.tokenize(special.encode(), add_bos=True, special=False)


def test_tiny_spm_same_ids_as_llama_cpp(tmp_path: Path) -> None:
    metadata = tiny_spm()
    ours, oracle = Tokenizer.from_gguf(metadata), llama_cpp_vocabulary(metadata, tmp_path / "vocab.gguf")
    for n in range(1, 40):
        for text in (" " * n, "x" + " " * n + "y", "hello world the thing " * n):
            assert ours.encode(text) == oracle.tokenize(text.encode(), add_bos=True, special=True), text
    for text in ("the <tool> a", "<tool>the", "日é語"):
        assert ours.encode(text) == oracle.tokenize(text.encode(), add_bos=True, special=True), text


@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS)))
def test_every_pre_tokenizer_keeps_the_text(pre: str) -> None:
    rule = PRE_TOKENIZERS[pre].build()
    vocab = {chr(c): i for i, c in enumerate(range(0x20, 0x200))}
    metadata = bpe_metadata({**vocab, "<|end|>": len(vocab)}, [], pre, {"<|end|>"})
    tokenizer = Tokenizer.from_gguf({**metadata, P + "add_bos_token": False})
    for text in SAMPLES:
        assert rule.pre_tokenize_str(text)
        expected = text if not PRE_TOKENIZERS[pre].nfc else unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_digits_follow_the_family() -> None:
    """What tells the families apart: digits in threes (Llama 3), one by one (Qwen 2), all together (GPT-2)."""
    split = {
        name: [w for w, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str("12345")]
        for name in ("llama-bpe", "qwen2", "gpt-2")
    }
    assert split == {"llama-bpe": ["123", "45"], "qwen2": list("12345"), "gpt-2": ["12345"]}


# --- flags ---------------------------------------------------------------------------------------


def test_bos_eos_and_space_prefix_are_the_files() -> None:
    plain = tiny_spm()
    assert Tokenizer.from_gguf(plain).encode("the")[0] == 1
    tokenizer = Tokenizer.from_gguf(
        {**plain, P + "add_bos_token": False, P + "add_eos_token": True, P + "add_space_prefix": False}
    )
    assert [tokenizer.piece(i) for i in tokenizer.encode("the")] == ["t", "he", "</s>"]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert Tokenizer.from_gguf(plain).decode(Tokenizer.from_gguf(plain).encode(" the")) == " the"


def test_bytes_stand_in_for_unknown_characters() -> None:
    tokenizer = Tokenizer.from_gguf(tiny_spm())
    ids = tokenizer.encode("ü", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b" ", b"\xc3", b"\xbc"]


def test_missing_types_are_guessed() -> None:
    metadata = tiny_spm()
    full = Tokenizer.from_gguf(metadata).encode("hello <s> ü")
    del metadata[P + "token_type"]
    assert Tokenizer.from_gguf(metadata).encode("hello <s> ü") == full


def test_named_templates() -> None:
    metadata = {**tiny_spm(), "tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"}
    assert Tokenizer.from_gguf(metadata).chat_template == {"default": "A", "tool_use": "B"}


# --- hostile metadata ----------------------------------------------------------------------------


def with_(key: str, value: Any) -> dict[str, Any]:
    return {**tiny_spm(), P + key: value}


def at(key: str, i: int, value: Any) -> dict[str, Any]:
    metadata = tiny_spm()
    metadata[P + key] = [*metadata[P + key]]
    metadata[P + key][i] = value
    return metadata


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "tokenizer.ggml.model"),
        ({P + "model": "gemma4"}, "gemma4"),
        (with_("model", "t5"), "t5"),
        (with_("tokens", []), "tokens"),
        (with_("tokens", "abc"), "tokens"),
        (at("tokens", 300, "▁t"), "occurs at"),
        (at("tokens", 5, "<0x-1>"), "<0x-1>"),
        (at("tokens", 5, "<0x0g>"), "<0x0g>"),
        (at("tokens", 270, 7), "tokens"),
        (at("tokens", 270, "x" * 5000), "tokens"),
        (at("scores", 270, float("nan")), "scores"),
        (at("scores", 270, float("inf")), "scores"),
        (at("scores", 270, "high"), "scores"),
        (with_("scores", None), "scores"),
        (with_("scores", [0.0] * 3), "scores"),
        (at("token_type", 9, 7), "token_type"),
        (at("token_type", 9, -1), "token_type"),
        (at("token_type", 9, 1.0), "token_type"),
        (with_("token_type", [1]), "token_type"),
        (with_("bos_token_id", 10**6), "bos_token_id"),
        (with_("eos_token_id", -1), "eos_token_id"),
        (with_("eot_token_id", "x"), "eot_token_id"),
        (with_("add_bos_token", 1), "add_bos_token"),
        ({**tiny_spm(), "tokenizer.chat_template": 5}, "chat_template"),
        ({P + "model": "gpt2", P + "tokens": ["a", "b"]}, "merges"),
        ({P + "model": "gpt2", P + "tokens": ["a", "b"], P + "merges": ["ab"]}, "merges"),
        ({P + "model": "gpt2", P + "tokens": ["a", "b"], P + "merges": ["a b"]}, "merge"),
        ({P + "model": "gpt2", P + "tokens": ["a", "b"], P + "merges": [], P + "pre": "unheard-of"}, "unheard-of"),
        ({P + "model": "gpt2", P + "tokens": ["a", "b"], P + "merges": [], P + "pre": 3}, "pre"),
    ],
)  # fmt: skip
def test_hostile_metadata_is_refused(metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_gguf(metadata)
    assert says in str(caught.value)


def test_scores_without_an_order_are_refused() -> None:
    metadata = tiny_spm()
    metadata[P + "tokens"] = [*metadata[P + "tokens"], *[a + b for a in "stuvwxyz" for b in "stuvwxyz"]]
    metadata[P + "token_type"] = [*metadata[P + "token_type"], *[1] * 64]
    metadata[P + "scores"] = [-1000.0] * len(metadata[P + "tokens"])
    with pytest.raises(CheckpointError, match="order"):
        Tokenizer.from_gguf(metadata)
