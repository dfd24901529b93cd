"""Incremental detokenisation equals decoding at once, for any ids; stop strings are found wherever the text is cut."""

from __future__ import annotations

import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vocab import gpt2, llama2, tiny_spm
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from paceline.checkpoints.detokenize import Detokenizer, StopScanner
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.checkpoints.vocab import Vocabulary
from paceline.core.errors import RequestError

P = "tokenizer.ggml."


@cache
def byte_level() -> Tokenizer:
    """Every byte a token, plus a few words and special tokens."""
    table = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]
    tokens = [*table, "Ġthe", "ing", "ðŁĺ", "<|end|>", "<|tool|>"]
    merges = ["Ġ t"]
    metadata: dict[str, Any] = {
        P + "model": "gpt2", P + "pre": "gpt-2", P + "tokens": [*tokens, "Ġt"], P + "merges": merges,
        P + "token_type": [*[1] * (len(tokens) - 2), 3, 4, 1],
    }  # fmt: skip
    return Tokenizer.from_gguf(metadata)


@cache
def spm(prefix: bool = True) -> Tokenizer:
    return Tokenizer.from_gguf({**tiny_spm(), P + "add_space_prefix": prefix})


def word_level(decoder: Any) -> Tokenizer:
    words = {w: i for i, w in enumerate(["[UNK]", "the", "##re", "▁is", "a", "▁", "##s", ",", "don", "'", "t"])}
    backend = Backend(models.WordLevel(words, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(Vocabulary(backend, {}, frozenset()))


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    edges = [0, *sorted(cuts), len(ids)]
    return [*[detokenizer.push(ids[a:b]) for a, b in pairwise(edges)], detokenizer.finish()]


def check_equal(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    pieces = stream(tokenizer, ids, list(range(1, len(ids))), skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, [len(ids) // 2], skip)) == "".join(pieces)
    # What has been said stays said: it begins the text of every longer sequence.
    said = ""
    for n, piece in enumerate(pieces[:-1], 1):
        said += piece
        assert tokenizer.decode(ids, skip_special_tokens=skip).startswith(said), n


CASES: dict[str, Any] = {
    "byte-level": byte_level,
    "spm": spm,
    "spm without prefix": lambda: spm(False),
    "no decoder": lambda: word_level(None),
    "metaspace": lambda: word_level(decoders.Metaspace()),
    "wordpiece": lambda: word_level(decoders.WordPiece(cleanup=False)),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pushes_join_to_the_decoding(name: str, data: st.DataObject) -> None:
    tokenizer = CASES[name]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab + 3), max_size=30))
    check_equal(tokenizer, ids, data.draw(st.booleans()))


@pytest.mark.parametrize("make", [byte_level, spm])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_text_comes_back(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    check_equal(tokenizer, ids, True)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_real_vocabularies(shared: Path, data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(real(shared)))
    near_bytes = st.integers(0, 300)
    ids = data.draw(st.lists(st.one_of(near_bytes, st.integers(0, tokenizer.n_vocab - 1)), max_size=30))
    check_equal(tokenizer, ids, data.draw(st.booleans()))


@cache
def real(shared: Path) -> list[Tokenizer]:
    folders = [shared / "tokenizers/gpt-neox-20b", shared / "tokenizers/llama2-fixed", shared / "models/stories260K"]
    return [
        *map(Tokenizer.from_folder, folders),
        Tokenizer.from_gguf(gpt2(shared)),
        Tokenizer.from_gguf(llama2(shared)),
    ]


def test_a_character_appears_when_it_is_whole() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    pieces = stream(tokenizer, ids, list(range(1, len(ids))), True)
    assert [p for p in pieces if p] == ["a", "😀", "b"]


def test_a_run_of_bytes_appears_when_it_ends() -> None:
    tokenizer = spm()
    ids = tokenizer.encode("ü😀a", add_special_tokens=False)
    pieces = stream(tokenizer, ids, list(range(1, len(ids))), True)
    assert "".join(pieces) == "ü😀a"
    assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize("make", [byte_level, spm])
def test_cut_characters_are_replaced_at_the_end(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer)
    said = detokenizer.push(ids)
    assert "\ufffd" not in said
    assert said + detokenizer.finish() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("\ufffd")


@pytest.mark.parametrize("make", [byte_level, spm])
def test_time_is_linear(make: Any) -> None:
    """A sequence of nothing but held-back bytes is the worst case; a quadratic detokenizer needs minutes for it."""
    tokenizer = make()
    token = next(i for i in range(tokenizer.n_vocab) if tokenizer.token_bytes(i) == b"\xf0")
    detokenizer = Detokenizer(tokenizer)
    start = time.perf_counter()
    for _ in range(100_000):
        detokenizer.push([token])
    detokenizer.finish()
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("make", [byte_level, spm])
def test_token_bytes_join_to_the_text(make: Any) -> None:
    tokenizer = make()
    text = "the naïve 😀 hello"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip(" ") == text
    assert tokenizer.token_bytes(10**6) == b""
    with pytest.raises(RequestError, match="-1"):
        tokenizer.token_bytes(-1)


# --- stop strings --------------------------------------------------------------------------------


def scan(text: str, stops: list[str], cuts: list[int], include: bool) -> tuple[str, str | None]:
    scanner, out = StopScanner(stops, include), ""
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    for a, b in pairwise(edges):
        emitted, stop = scanner.push(text[a:b])
        out += emitted
        if stop is not None:
            return out, stop
    return out + scanner.finish(), None


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first place where some stop is complete, the longest stop there."""
    for end in range(1, len(text) + 1):
        here = [s for s in stops if text[:end].endswith(s)]
        if here:
            stop = max(here, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=10),
    include=st.booleans(),
)
def test_stops_are_found_across_pushes(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    assert scan(text, stops, cuts, include) == expected(text, stops, include)


def test_only_a_possible_beginning_is_held_back() -> None:
    scanner = StopScanner(["</s>", "\n\n"])
    assert scanner.push("hello <") == ("hello ", None)
    assert scanner.push("/b> x\n") == ("</b> x", None)
    assert scanner.push("y") == ("\ny", None)
    assert scanner.push("\n") == ("", None)
    assert scanner.push("\nmore") == ("", "\n\n")
    assert scanner.push("more") == ("", "\n\n")
    assert scanner.finish() == ""


@pytest.mark.parametrize("stops", [[""], ["x" * 5000], "abc", [3], ["x"] * 1000])
def test_unusable_stops_are_refused(stops: Any) -> None:
    with pytest.raises(RequestError, match="stop"):
        StopScanner(stops)
