"""Measuring in a serving engine: only while it is idle, and as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.analysis import probe
from paceline.analysis.probe import Probe
from paceline.analysis.synthetic import RandomCheckpoint
from paceline.assemble import native_isas
from paceline.core.types import SamplingParams
from paceline.llm import LLM

CONFIG = {
    "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "sliding_window": 48,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip

native = pytest.mark.skipif(not native_isas(), reason="the native core is not built")


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr(probe, "BANDWIDTH_BYTES", 1 << 22)
    monkeypatch.setattr(probe, "PEAK_S", 1e-4)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    with LLM(RandomCheckpoint(str(path)), format="int8", context=256, max_seqs=4, max_rows=64) as llm:
        yield llm


def state(llm: LLM) -> object:
    runner = llm.engine.runner
    used = [{k: v for k, v in p.items() if k != "peak"} for p in runner.cache.stats()]
    return used, runner.n_steps, vars(llm.engine.stats).copy(), runner.parts.prefix.stats()  # type: ignore[union-attr]


class Idle:
    """Says so n times."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self) -> bool:
        self.n -= 1
        return self.n >= 0


@native
def test_it_measures_once_in_a_while_and_changes_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.generate([list(range(100))], SamplingParams(max_tokens=4, ignore_eos=True))
    before, idle = state(llm), Idle(10_000)
    p = Probe(llm.engine.runner, llm.plan, idle)
    first = p.ask()
    assert first["refused"] is None
    assert [s["work"] for s in first["steps"]] == ["decode", "prompt"]
    assert all(len(s["operators"]) >= 5 for s in first["steps"])
    assert state(llm) == before
    left = idle.n
    assert p.ask()["steps"] == first["steps"]
    assert idle.n == left  # nothing was measured again
    monkeypatch.setattr(probe, "FRESH_S", 0.0)
    assert p.ask()["age"] < first["age"] + 60
    assert idle.n < left


@native
def test_work_that_comes_in_ends_a_measurement_at_the_next_piece(llm: LLM) -> None:
    before = state(llm)
    whole = Idle(10_000)
    Probe(llm.engine.runner, llm.plan, whole).ask()
    n_pieces = 10_000 - whole.n
    p = Probe(llm.engine.runner, llm.plan, Idle(0))
    for n in (0, 1, 3, 5, 7, n_pieces // 2):
        idle = p.idle = Idle(n)
        told = p.ask()
        assert "requests are being served" in told["refused"]
        assert told["age"] is None
        assert "steps" not in told
        assert idle.n == -1  # asked once more, and believed
        assert state(llm) == before
        assert not llm.engine.runner.ops.device.profile(False)  # no longer counting
    p.idle = Idle(10_000)
    assert p.ask()["refused"] is None


@native
def test_the_limits_are_measured_once(llm: LLM) -> None:
    p = Probe(llm.engine.runner, llm.plan, Idle(2))  # time for the bandwidth and one unit
    p.ask()
    p.idle = Idle(10_000)
    told = p.ask()
    assert set(told["peaks"]) == {"f32", "bf16", "int8"}
    kept = told["bandwidth"], told["peaks"]
    p._last = None
    again = p.ask()
    assert (again["bandwidth"], again["peaks"]) == kept


@native
def test_what_was_measured_is_told_while_requests_run(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Probe(llm.engine.runner, llm.plan, Idle(10_000))
    steps = p.ask()["steps"]
    monkeypatch.setattr(probe, "FRESH_S", 0.0)
    p.idle = lambda: False
    told = p.ask()
    assert told["steps"] == steps
    assert "requests are being served" in told["refused"]


@native
def test_no_room_in_memory_or_cache(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Probe(llm.engine.runner, llm.plan, lambda: True)
    monkeypatch.setattr(probe, "BANDWIDTH_BYTES", 1 << 60)
    assert "MiB free" in p.ask()["refused"]
    monkeypatch.setattr(probe, "BANDWIDTH_BYTES", 1 << 22)
    pool = llm.engine.runner.cache.pools[0]
    held = pool.take(pool.n_free - 2)
    assert "no free pages" in p.ask()["refused"]
    pool.release(held)
    assert p.ask()["refused"] is None


def test_the_reference_backend_has_nothing_to_tell(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    with LLM(RandomCheckpoint(str(path)), backend="reference", context=128) as llm:
        told = Probe(llm.engine.runner, llm.plan, lambda: True).ask()
    assert "reference backend does not time" in told["refused"]
