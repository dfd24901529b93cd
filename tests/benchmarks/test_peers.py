"""The parts of benchmarks/peers.py that need no peer: checkpoints that hold the same weights, ratios, the README's table."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers
import peers_checkpoints as checkpoints
import peers_environments as environments
import peers_report as report

from paceline import LLM

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Paths of the tiny shape's checkpoints by form and bits."""
    pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("peers")
    shape = root / "tiny.json"
    shape.write_text(json.dumps(TINY), encoding="utf-8")
    wanted = [("hf", "bf16"), ("compressed-tensors", "int8"), ("compressed-tensors", "int4")]
    wanted += [("gguf", bits) for bits in checkpoints.BITS]
    return {(form, bits): checkpoints.ensure(root, str(shape), form, bits) for form, bits in wanted}


def logits(path: Path) -> np.ndarray:
    with LLM(str(path), dtype="float32", backend="reference", offline=True) as llm:
        return llm.logits([300, 5, 77, 401, 12, 9, 8, 250])


def test_gguf_holds_the_same_model(made: dict[tuple[str, str], Path]) -> None:
    """Names, rotary pairs and frequencies: logits agree where the weights do, and as far as their bits allow."""
    expected = logits(made["hf", "bf16"])
    for bits, least in (("bf16", 0.99999), ("int8", 0.999), ("int4", 0.9)):
        got = logits(made["gguf", bits])
        assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > least


def test_compressed_tensors_hold_the_same_weights(made: dict[tuple[str, str], Path]) -> None:
    """Every weight is within half a step of the original; scales take their own rounding to bfloat16."""
    original = load_file(made["hf", "bf16"] / "model.safetensors")
    name = "model.layers.1.mlp.down_proj."
    w = original[name + "weight"].astype(np.float32)
    eight = load_file(made["compressed-tensors", "int8"] / "model.safetensors")
    scale = eight[name + "weight_scale"].astype(np.float32)
    assert scale.shape == (64, 1)
    assert (np.abs(eight[name + "weight"] * scale - w) <= scale * 0.75).all()
    four = load_file(made["compressed-tensors", "int4"] / "model.safetensors")
    words, scale = four[name + "weight_packed"], four[name + "weight_scale"].astype(np.float32)
    assert words.dtype == np.int32
    assert four[name + "weight_shape"].tolist() == [64, 128]
    codes = (words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).astype(np.int32).reshape(
        64, 128
    ) - 8
    step = np.repeat(scale, 128 // scale.shape[1], axis=1)
    assert (np.abs(codes * step - w) <= step * 0.6).all()
    assert np.array_equal(four["model.norm.weight"], original["model.norm.weight"])


def test_the_first_code_is_in_the_lowest_bits() -> None:
    words = checkpoints.pack_int4(np.array([[-8, -7, -6, -5, -4, -3, -2, -1], [7, 0, 0, 0, 0, 0, 0, 0]], np.int8))
    assert words.view(np.uint32).ravel().tolist() == [0x76543210, 0x8888888F]


def test_group_divides_every_width() -> None:
    assert checkpoints.group_of(checkpoints.config_of("smollm2-135m")) == 64
    assert checkpoints.group_of(checkpoints.config_of("llama-3.2-1b")) == 128


def test_tokens_have_names_of_their_own() -> None:
    names = [checkpoints.token_name(i, 1000) for i in range(1000)]
    assert len(set(names)) == 1000
    assert names[-2:] == ["<s>", "</s>"]
    assert names[ord("A")] == "A"


def cell(work: str = "decode1", isa: str = "native", **rates: float | str) -> dict[str, object]:
    results = {p: {"error": r} if isinstance(r, str) else {"tokens_per_s": r} for p, r in rates.items()}
    return {"isa": isa, "shape": "tiny", "bits": "int8", "work": work, "results": results, "bound_tokens_per_s": 200.0}


def test_ratio_is_to_the_best_peer_and_share_to_the_bound() -> None:
    c = cell(paceline=100.0, a=50.0, b=80.0, c="no such instruction")
    assert report.best_peer(c) == ("b", 80.0)
    assert report.ratio(c) == 1.25
    assert report.share(c) == 0.5
    assert report.ratio(cell(paceline=100.0, a="failed")) is None
    header, (row,) = report.rows([c])
    assert header[3:6] == ["paceline", "a", "b"]
    assert row == ["tiny", "int8", "decode1", "100", "50.0", "80.0", "b", "1.25", "200", "50 %"]


def test_median_and_spread_of_runs() -> None:
    runs = [{"tokens": 10, "seconds": s} for s in (1.0, 0.5, 2.0)]
    assert report.summary(runs) == {"tokens_per_s": 10.0, "spread": 1.5, "runs": [10.0, 20.0, 5.0]}


def test_merging_replaces_whole_cells() -> None:
    """A figure never stands beside one of another run."""
    old = {"cells": [cell(paceline=1.0, a=2.0), cell("decode8", paceline=3.0)], "machine": {"cpu": "x"}}
    new = {"cells": [cell(paceline=5.0)], "environments": {"a": {"error": "why"}}}
    merged = report.merge(report.merge({}, old), new)
    assert [set(c["results"]) for c in merged["cells"]] == [{"paceline"}, {"paceline"}]
    assert merged["machine"] == {"cpu": "x"}
    assert merged["checks"] == []


def test_what_failed_is_named_once_with_its_cells() -> None:
    cells = [cell(a="too old"), cell("decode8", a="too old")]
    lines = report.problems({"environments": {"b": {"error": "no compiler"}}, "cells": cells})
    assert lines == ["b: no compiler", "a: too old (tiny int8 decode1, tiny int8 decode8)"]


def test_judgement_of_tokens() -> None:
    got = report.judged([[0.0, 0.5], [0.0, 0.1]], [[4.0, 2.0]])
    assert got == {"top1": 0.5, "mean": pytest.approx(0.15), "worst": 0.5, "control": 3.0}


def test_readme_part_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    for text in ("new", "newer"):
        report.write_between(path, text)
        assert path.read_text(encoding="utf-8") == f"before\n{report.BEGIN}\n\n{text}\n\n{report.END}\nafter\n"
    path.write_text(f"{report.END} {report.BEGIN}", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        report.write_between(path, "x")


def test_the_readme_has_its_markers(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((peers.HERE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    report.write_between(copy, "x")


def test_report_of_a_whole_result() -> None:
    machine = {"date": "2026-01-01", "cpu": "C", "cores": 2, "memory_bytes": 8 << 30, "isa": "avx2", "threads": 2}
    machine |= {"system": "Linux"}
    check = {"isa": "native", "shape": "tiny", "bits": "int8", "peer": "a", "error": "no reference"}
    cells = [cell(paceline=9.5, a=19.0) | {"bandwidth": b, "peaks": {"f32": 1e11}} for b in (2e10, 3e10)]
    results = {"machine": machine, "cells": cells, "checks": [check]}
    text = report.report({**results, "environments": {"a": {"versions": {"pkg": "1.2"}, "compiler": "gcc"}}})
    assert "read 20-30 GB/s, f32 100-100 GFLOP/s" in text
    assert "| tiny | int8 | decode1 | 9.50 | 19.0 | a | 0.50 | 200 | 5 % |" in text
    assert "not checked: no reference" in text
    assert "a (pkg 1.2, built by gcc)" in text


@pytest.mark.parametrize(("isa", "bits", "absent"), [("native", "int8", "llama.cpp-avx2"), ("avx2", "int4", "vllm")])
def test_engines_of_a_group(isa: str, bits: str, absent: str) -> None:
    names = list(peers.chosen(Namespace(peers=None, isa=isa), bits))
    assert names[0] == "paceline"
    assert absent not in names
    assert "ctranslate2" not in peers.chosen(Namespace(peers=None, isa="native"), "bf16")


def test_machines_without_a_feature_are_told() -> None:
    assert "avx512_bf16" in str(environments.why_not("llama.cpp-no-amx", frozenset({"avx2"})))
    assert "same as" in str(environments.why_not("llama.cpp-no-amx", frozenset({"avx512_bf16"})))
    assert environments.why_not("llama.cpp-avx2", frozenset({"avx2"})) is None
