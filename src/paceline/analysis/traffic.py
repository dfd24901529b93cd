"""Recorded traffic: when requests come and how long they are, and what serving them gave.

Two published kinds of trace are read: CSV with `arrived_at,num_prefill_tokens,num_decode_tokens` (Azure LLM inference 2023, seconds) and
JSON lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (Mooncake: equal ids are equal blocks of 512 tokens, each
after equal blocks).
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from paceline.core.errors import ConfigError

BLOCK = 512  # tokens of a block of `hash_ids`
_MAX_BYTES = 1 << 30
_MAX_LENGTH = 1 << 24  # tokens of one request


@dataclass(frozen=True)
class Arrival:
    """A request of a trace. hash_ids: ids of the prompt's blocks of `block` tokens, () when unknown."""

    at_s: float
    n_prompt: int
    n_output: int
    hash_ids: tuple[int, ...] = ()
    owner: str = ""
    block: int = BLOCK

    def tokens(self, n_vocab: int, seed: int) -> list[int]:
        """A prompt of this length: equal blocks for equal ids, else random from `seed`."""
        if not self.hash_ids:
            return np.random.default_rng(seed).integers(0, n_vocab, self.n_prompt).tolist()
        blocks = [np.random.default_rng([i, self.block]).integers(0, n_vocab, self.block) for i in self.hash_ids]
        found: list[int] = np.concatenate(blocks)[: self.n_prompt].tolist()
        return found


def read_trace(path: str | Path) -> list[Arrival]:
    """The arrivals of a file in order of time, the first at 0. Raises ConfigError when it cannot be read."""
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"trace {path}: larger than {_MAX_BYTES} bytes")
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                found = [_from_csv(row) for row in csv.DictReader(file)]
            else:
                found = [_from_json(json.loads(line)) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"trace {path}: cannot be read: {e}") from None
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(
            f"trace {path}: neither arrived_at,num_prefill_tokens,num_decode_tokens nor timestamp/input_length/output_length: {e}"
        ) from None
    found.sort(key=lambda a: a.at_s)
    return [replace(a, at_s=a.at_s - found[0].at_s) for a in found]


def _length(value: Any) -> int:
    n = int(value)
    if not 0 <= n <= _MAX_LENGTH:
        raise ValueError(f"a length of {n} tokens")
    return max(1, n)


def _time(value: Any) -> float:
    at = float(value)
    if not math.isfinite(at):
        raise ValueError(f"a time of {at}")
    return at


def _from_csv(row: dict[str, str]) -> Arrival:
    return Arrival(_time(row["arrived_at"]), _length(row["num_prefill_tokens"]), _length(row["num_decode_tokens"]))


def _from_json(row: dict[str, Any]) -> Arrival:
    n = _length(row["input_length"])
    ids = tuple(int(i) for i in row.get("hash_ids", ()))
    return Arrival(
        _time(row["timestamp"]) / 1e3, n, _length(row["output_length"]), ids if len(ids) * BLOCK >= n else ()
    )


def scale(
    arrivals: Sequence[Arrival],
    *,
    rate: float | None = None,
    max_prompt: int | None = None,
    max_output: int | None = None,
) -> list[Arrival]:
    """The same traffic at `rate` requests per second on average, with lengths shrunk alike so that the 99th percentile is the maximum.

    What is longer still is cut. Blocks of prompts shrink with them, so that as much of a prompt is shared as before.
    """
    if not arrivals:
        return []
    span = arrivals[-1].at_s
    stretch = 1.0 if rate is None or not span else (len(arrivals) - 1) / span / rate
    prompt = _factor([a.n_prompt for a in arrivals], max_prompt)
    output = _factor([a.n_output for a in arrivals], max_output)
    block = max(1, round(BLOCK * prompt))
    out = []
    for a in arrivals:
        n = max(1, round(a.n_prompt * prompt))
        if a.hash_ids:
            n = min(n, len(a.hash_ids) * block)
        n = min(n, max_prompt or n)
        m = min(max(1, round(a.n_output * output)), max_output or a.n_output)
        out.append(replace(a, at_s=a.at_s * stretch, n_prompt=n, n_output=m, block=block))
    return out


def _factor(lengths: Sequence[int], most: int | None) -> float:
    return 1.0 if most is None else min(1.0, most / float(np.percentile(lengths, 99)))


def owned(arrivals: Sequence[Arrival], shares: dict[str, float], seed: int = 0) -> list[Arrival]:
    """Each request given to an owner at random, in these proportions."""
    rng = random.Random(seed)
    names = rng.choices(list(shares), list(shares.values()), k=len(arrivals))
    return [replace(a, owner=name) for a, name in zip(arrivals, names, strict=True)]


@dataclass
class Served:
    """What became of a request: when each of its tokens came, in seconds on the clock of the arrivals."""

    arrival: Arrival
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival.at_s

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; 0 when there is only one."""
        n = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / n if n else 0.0

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


def summary(served: Iterable[Served], ttft: float, tpot: float) -> dict[str, float]:
    """Seconds, tokens and requests per second. goodput: requests per second that met both targets (seconds)."""
    served = [s for s in served if s.token_times]
    if not served:
        return {}
    start, end = min(s.arrival.at_s for s in served), max(s.token_times[-1] for s in served)
    first = [s.ttft for s in served]
    each = [s.tpot for s in served if len(s.token_times) > 1]
    gaps = [g for s in served for g in s.gaps]
    good = sum(s.ttft <= ttft and s.tpot <= tpot for s in served)
    n_tokens = sum(len(s.token_times) for s in served)
    span = max(end - start, 1e-9)
    out: dict[str, float] = {"n": len(served), "makespan": span, "tokens_per_s": n_tokens / span}
    for name, values in (("ttft", first), ("tpot", each), ("gap", gaps)):
        out |= {f"{name}_{k}": f(values) if values else 0.0 for k, f in _STATISTICS.items()}
    return {**out, "met": good / len(served), "goodput": good / span}


_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda v: float(np.mean(v)),
    "p50": lambda v: float(np.percentile(v, 50)),
    "p99": lambda v: float(np.percentile(v, 99)),
}
