"""Traces: both formats read and refused by name, scaling keeps the traffic's kind, what is summed up follows from the times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline import techniques
from paceline.analysis.simulation import StepCost, simulate
from paceline.analysis.synthetic import RandomCheckpoint
from paceline.analysis.traffic import Arrival, Served, owned, read_trace, scale, summary
from paceline.core.errors import ConfigError
from paceline.core.runner import Parts
from paceline.core.scheduler import Limits
from paceline.core.types import GREEDY
from paceline.llm import LLM
from paceline.techniques.serving.radix import RadixIndex

CSV = "arrived_at,num_prefill_tokens,num_decode_tokens\n5.5,374,44\n4.5,396,109\n6.5,0,55\n"
LINES = [
    {"timestamp": 1000, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 4000, "input_length": 600, "output_length": 7, "hash_ids": [0, 2]},
    {"timestamp": 2500, "input_length": 900, "output_length": 7},
]


def test_both_formats_are_read_in_order_of_time_from_zero(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n")
    assert read_trace(tmp_path / "a.csv") == [Arrival(0.0, 396, 109), Arrival(1.0, 374, 44), Arrival(2.0, 1, 55)]
    assert read_trace(tmp_path / "b.jsonl") == [
        Arrival(0.0, 1000, 5, (0, 1)),
        Arrival(1.5, 900, 7),
        Arrival(3.0, 600, 7, (0, 2)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n",
        "arrived_at,num_prefill_tokens,num_decode_tokens\n1,x,3\n",
        CSV + "7,99999999999,1\n",
        CSV + "nan,1,1\n",
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match="neither arrived_at"):
        read_trace(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="neither arrived_at"):
        read_trace(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")


def test_scaling_keeps_proportions_and_shared_prefixes() -> None:
    arrivals = [Arrival(10.0 * i, 512 * (1 + i % 4), 100 + i, tuple(range(1 + i % 4))) for i in range(101)]
    got = scale(arrivals, rate=2.0, max_prompt=256, max_output=50)
    assert got[-1].at_s == pytest.approx(50.0)
    assert max(a.n_prompt for a in got) == 256
    assert max(a.n_output for a in got) == 50
    assert {a.n_prompt for a in got} == {64, 128, 192, 256}
    short, long = got[0].tokens(1000, 0), got[3].tokens(1000, 1)
    assert long[: len(short)] == short
    assert len(long) == 256
    assert all(0 <= t < 1000 for t in long)
    assert scale(arrivals) == arrivals
    assert scale([]) == []
    assert Arrival(0.0, 7, 1).tokens(50, 3) != Arrival(0.0, 7, 1).tokens(50, 4)
    shares = [a.owner for a in owned(arrivals, {"x": 0.9, "y": 0.1})]
    assert shares.count("x") > 3 * shares.count("y") > 0


def test_a_summary_follows_from_the_times() -> None:
    served = [
        Served(Arrival(1.0, 5, 3), [2.0, 3.0, 4.0]),
        Served(Arrival(2.0, 5, 1), [11.0]),
        Served(Arrival(3.0, 5, 1)),
    ]
    got = summary(served, ttft=1.5, tpot=1.0)
    assert (got["n"], got["makespan"], got["tokens_per_s"]) == (2, 10.0, 0.4)
    assert (got["ttft_mean"], got["tpot_mean"], got["gap_p99"]) == (5.0, 1.0, 1.0)
    assert (got["met"], got["goodput"]) == (0.5, 0.1)
    assert summary([], 1.0, 1.0) == {}


def test_simulated_time_is_that_of_the_cost() -> None:
    cost = StepCost(((1, 1.0), (16, 1.0), (32, 2.0), (64, 4.0)), per_seq=0.5, per_entry=0.0, per_pair=0.0)
    limits = Limits(64, 8, 64, 64)
    got = simulate([Arrival(3.0, 60, 3)], cost, lambda cache: Parts(), limits=limits, n_pages=10)
    assert got.served[0].token_times == [3.0 + 4.5, 3.0 + 6.0, 3.0 + 7.5]  # 60 rows take whole tiles: those of 64
    assert (got.n_rows, got.n_needed, got.n_steps, got.n_preempted) == (62, 62, 3, 0)
    same = [Arrival(float(9 * i), 512, 1, (7,)) for i in range(2)]
    reused = simulate(same, cost, lambda cache: Parts(prefix=RadixIndex(cache)), limits=limits, n_pages=40)
    assert reused.n_rows == 512 + 32  # the last page is computed again, for a row to draw from
    with pytest.raises(RuntimeError, match="not at an end"):
        simulate(same, cost, lambda cache: Parts(), limits=limits, n_pages=40, steps=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> RandomCheckpoint:
    path = tmp_path_factory.mktemp("shape") / "config.json"
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return RandomCheckpoint(str(path))


SCHEDULES = ("first_come", "priority", "shortest", "laps", "fair", "deadline")


def test_every_policy_and_the_budget_run_in_the_engine_by_name(checkpoint: RandomCheckpoint) -> None:
    prompts = [[(7 * i + j) % 300 for j in range(20 + 30 * i)] for i in range(6)]
    found = []
    for use in (("no:serving/splitfuse",), *(("serving/splitfuse:target_ms=0.1", f"serving/{s}") for s in SCHEDULES)):
        with LLM(checkpoint, context=256, max_rows=64, max_seqs=4, use=use) as llm:
            found.append([o.token_ids for o in llm.generate(prompts, GREEDY.with_(max_tokens=12))])
            assert {"serving/splitfuse", *use[1:]} <= {t.name for t in llm.plan.techniques} or len(use) == 1
    assert all(f == found[0] for f in found)
    assert {f"serving/{s}" for s in SCHEDULES} < set(techniques.names())


def test_two_orders_at_once_are_refused(checkpoint: RandomCheckpoint) -> None:
    with pytest.raises(ConfigError, match="both fill the seam schedule"):
        LLM(checkpoint, use=("serving/fair", "serving/laps"))
