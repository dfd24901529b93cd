"""A short chaos run with a fixed seed, and that its judge sees what is wrong. Long ones: `benchmarks/README.md`."""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import chaos
import leaks
from chaos_clients import asks, difference


def test_innocent_neighbours_get_every_token_through_some_seconds_of_chaos(tmp_path: Path) -> None:
    options = argparse.Namespace(minutes=0.15, seed=7, clients=3, attackers=2, requests=12, pause=1.0, model=None)
    result = asyncio.run(chaos.run(options, tmp_path))
    assert result["problems"] == []
    assert result["deaths_in_log"] > 0
    assert sum(result["innocent"].values()) > 3


def test_the_same_seed_asks_the_same() -> None:
    assert asks(3, 24) == asks(3, 24)
    assert asks(3, 24) != asks(4, 24)
    assert len({a.kind for a in asks(3, 24)}) == 12


CHOICE: dict[str, Any] = {"index": 0, "finish_reason": "stop", "token_ids": [1, 2], "text": "ab"}


@pytest.mark.parametrize(("field", "value"), [("token_ids", [1]), ("text", "abb"), ("finish_reason", "length")])
def test_a_difference_is_told(field: str, value: Any) -> None:
    assert difference([CHOICE], [copy.deepcopy(CHOICE)]) is None
    assert field in (difference([CHOICE], [{**CHOICE, field: value}]) or "")
    assert difference([CHOICE], []) == "0 choices, not 1"


def test_a_slope_is_that_of_most_rounds() -> None:
    rounds = [{"front": {"own": 1000 * i + (50_000 if i == 15 else 0)}} for i in range(leaks.N_ROUNDS)]
    n = 1000 * leaks.N_ROUNDS
    assert leaks._slope(rounds, "front", n) == pytest.approx(1000)
