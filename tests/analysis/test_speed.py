"""Measurements: what is counted is what ran, and what does not fit is refused before time is spent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.analysis import operators, speed
from paceline.analysis.synthetic import RandomCheckpoint
from paceline.assemble import native_isas
from paceline.core.errors import ConfigError
from paceline.llm import LLM

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
LIMITS = operators.Limits(1e9, {"f32": 1e9, "bf16": 2e9, "int8": 4e9})

native = pytest.mark.skipif(not native_isas(), reason="the native core is not built")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(CONFIG))
    with LLM(
        RandomCheckpoint(str(path)), format="int8", context=256, max_seqs=4, max_rows=64, use=("no:serving/radix",)
    ) as llm:
        yield llm


def test_rates_follow_from_times_and_counts(llm: LLM) -> None:
    times = speed.Times("decode b2", 2, 100, 8, (1.0, 2.0, 4.0), (([1, 1], [100, 100], "last"),), repeats=4)
    got = speed.judge(llm, times, LIMITS)
    assert (got.tokens_per_s, got.spread, got.runs) == (4.0, 1.5, 3)
    entry = 2 * 3 * 2 * 16 * 2  # K and V, layers, heads, dim, bfloat16
    vectors = 4 * 64 * (2 * 3 + 1)
    matrices = sum(w.nbytes for w in llm.engine.runner.model.w.values()) - vectors
    embedded = 2 * llm.engine.runner.model.w["embed"].nbytes // 304  # two rows of the padded table
    assert got.bytes == 4 * (matrices + vectors + embedded + 2 * entry * 102)
    assert got.bandwidth_share == pytest.approx(got.bytes / 1e9 / 2.0)
    assert got.bound_tokens_per_s is not None
    assert got.bound_tokens_per_s * max(got.bandwidth_share or 0, got.peak_share or 0) == pytest.approx(
        got.tokens_per_s
    )


def test_a_long_prompt_is_counted_by_chunks(llm: LLM) -> None:
    times = speed.prefill(llm, 150, runs=1)
    assert [(new, cached, want) for new, cached, want in times.passes] == [
        ([64], [0], "none"), ([64], [64], "none"), ([22], [128], "last"),
    ]  # fmt: skip
    assert len(times.seconds) == 1
    n_head = 2 * 64 * 300
    whole = operators.count(llm.engine.runner.model, [150], [0], "bfloat16", "none")
    flops = sum(c.flops for c in whole.values())
    got = speed.judge(llm, times, None)
    assert flops + n_head < got.flops < flops + n_head + 10_000  # the last row's norm and its sampling come on top
    assert got.bandwidth_share is None


def test_measurements_leave_nothing_behind(llm: LLM) -> None:
    speed.decode(llm, 3, 20, n=4, runs=2)
    found = speed.verification(llm, 5, 20, n=2, runs=2)
    assert found.ratio == found.seconds / found.seconds_of_one > 0
    assert llm.engine.runner.parts.drafter is None
    assert not llm.engine.has_work
    assert llm.engine.runner.cache.stats()[0]["n_used"] == 0


@native
@pytest.mark.parametrize("work", ["prefill", "decode"])
def test_what_is_profiled_is_what_is_counted(llm: LLM, work: str) -> None:
    rows = speed.profile_decode(llm, 2, 40, LIMITS, n=4) if work == "decode" else speed.profile_prefill(llm, 40, LIMITS)
    new, cached = ([1, 1], [44, 44]) if work == "decode" else ([40], [0])
    costs = operators.count(llm.engine.runner.model, new, cached, "bfloat16")
    for r in rows:
        assert (r.bytes, r.flops) == (costs[r.name].bytes, costs[r.name].flops)
    assert costs.keys() - {r.name for r in rows} <= {"rms_norm", "gated", "add"}  # what linears have taken in
    calls = {r.name: r.calls for r in rows}
    assert calls["attention"] == calls["linear 192x64 int8"] == 3
    assert calls["linear 300x64 int8"] == calls["sample"] == 1
    for r in rows:
        assert r.share == pytest.approx(
            max(r.bytes / 1e9, r.flops / LIMITS.peaks[operators.unit_of(r.name, "bfloat16")]) / r.seconds
        )


@native
def test_a_head_in_two_passes_is_profiled_as_it_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "vocab_size": 1 << 14}))
    with LLM(RandomCheckpoint(str(path)), format="int4", context=256, use=("no:serving/radix",)) as llm:
        assert llm.plan.model.weight_bytes == sum(w.nbytes for w in llm.engine.runner.model.w.values())
        rows = speed.profile_decode(llm, 2, 40, LIMITS, n=4)
        costs = operators.count(llm.engine.runner.model, [1, 1], [44, 44], "bfloat16")
    (head,) = [r for r in rows if r.name == "rescored 16384x64 int4 int8"]
    assert (head.calls, head.bytes, head.flops) == (1, costs[head.name].bytes, costs[head.name].flops)
    assert operators.unit_of(head.name, "bfloat16") == "int8"


@pytest.mark.parametrize(("batch", "context"), [(1, 250), (5, 20), (4, 255)])
def test_what_does_not_fit_is_refused(llm: LLM, batch: int, context: int) -> None:
    with pytest.raises(ConfigError, match="prompt|batch"):
        speed.decode(llm, batch, context, n=4, runs=2)
