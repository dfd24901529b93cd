"""Prometheus metrics, under our own prefix and on request under the names that vLLM's dashboards and gateways read.

One registry per server. The front counts requests and times; what the engine knows comes with the workers' gauges.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from paceline.core.types import Delta
from paceline.server import wire

if TYPE_CHECKING:
    from paceline.server.models import Models

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests.",
    "generation_tokens": "Tokens generated.",
    "request_success": "Requests that came to their end, by reason.",
    "num_preemptions": "Sequences whose state was dropped for want of memory.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found there.",
    "engine_steps": "Steps computed.",
    "engine_restarts": "Workers started after a death.",
    "request_failures": "Requests that ended in an error, by kind.",
}
_GAUGES = {
    "num_requests_running": "Sequences being computed.",
    "num_requests_waiting": "Requests waiting for room.",
    "kv_cache_usage_perc": "Share of the KV cache in use, 0 to 1.",
}
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _SLOW),
    "inter_token_latency_seconds": ("Between two tokens of a stream.", _FAST),
    "request_time_per_output_token_seconds": ("Mean time per token after the first, by request.", _FAST),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", _SLOW),
    "request_queue_time_seconds": ("Waiting for the first step.", _SLOW),
    "request_prefill_time_seconds": ("From the first step to the first token.", _SLOW),
    "request_decode_time_seconds": ("From the first token to the last.", _SLOW),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _TOKENS),
}
_LABELS = {"request_success": ("finished_reason",), "request_failures": ("kind",)}
_TOTALS = {  # counters fed from the workers' own totals
    "num_preemptions": "preemptions",
    "prefix_cache_queries": "prefix_n_query_tokens",
    "prefix_cache_hits": "prefix_n_hit_tokens",
    "engine_steps": "steps",
}


class Metrics:
    """All metrics of a server. vllm: also under vLLM's names."""

    def __init__(self, vllm: bool = False):
        self.registry = CollectorRegistry()
        prefixes = ("paceline_", "vllm:") if vllm else ("paceline_",)
        self._made: dict[str, list[Any]] = {}
        for name, text in _COUNTERS.items():
            self._made[name] = [self._counter(p + name, text, _LABELS.get(name, ())) for p in prefixes]
        for name, text in _GAUGES.items():
            self._made[name] = [Gauge(p + name, text, ("model_name",), registry=self.registry) for p in prefixes]
        for name, (text, buckets) in _HISTOGRAMS.items():
            made = [
                Histogram(p + name, text, ("model_name",), buckets=buckets, registry=self.registry) for p in prefixes
            ]
            self._made[name] = made
        self._labelled: dict[tuple[str, ...], list[Any]] = {}
        self._seen: dict[tuple[str, str, int], float] = {}

    def _counter(self, name: str, text: str, more: Sequence[str]) -> Counter:
        return Counter(name, text, ("model_name", *more), registry=self.registry)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def totals(self, model: str) -> dict[str, float]:
        """Every counter of a model so far, summed over its other labels."""
        found = dict.fromkeys(_COUNTERS, 0.0)
        for name in found:
            found[name] = sum(s.value for s in self._samples(name, model) if s.name.endswith("_total"))
        return found

    def buckets(self, model: str, name: str) -> dict[str, float]:
        """How many observations of a histogram were at most so large, by the upper bounds as Prometheus writes them."""
        return {s.labels["le"]: s.value for s in self._samples(name, model) if s.name.endswith("_bucket")}

    def _samples(self, name: str, model: str) -> Iterator[Any]:
        for family in self._made[name][0].collect():
            yield from (s for s in family.samples if s.labels.get("model_name") == model)

    def begin(self, model: str, n_prompt: int) -> Record:
        self.count(model, "prompt_tokens", n_prompt)
        self.observe(model, "request_prompt_tokens", n_prompt)
        return Record(self, model)

    def count(self, model: str, name: str, n: float, *label: str) -> None:
        """label: the value of the metric's own label, if it has one."""
        for m in self._children(name, model, *label):
            m.inc(n)

    def observe(self, model: str, name: str, value: float) -> None:
        for m in self._children(name, model):
            m.observe(value)

    def _children(self, name: str, *labels: str) -> list[Any]:
        """A metric under each prefix with these labels; looking labels up takes longer than counting."""
        key = (name, *labels)
        found = self._labelled.get(key)
        if found is None:
            found = self._labelled[key] = [m.labels(*labels) for m in self._made[name]]
        return found

    def stepped(self, model: str, gauge: wire.Gauge | None, source: int = 0) -> None:
        """What a worker says of itself. source: which of the model's, as two serve while one replaces the other."""
        if gauge is None:
            return
        values = {
            "num_requests_running": gauge.n_running,
            "num_requests_waiting": gauge.n_waiting,
            "kv_cache_usage_perc": gauge.kv_used,
        }
        for name, value in values.items():
            for m in self._children(name, model):
                m.set(value)
        for name, key in _TOTALS.items():
            self.total(model, name, gauge.counters.get(key, 0.0), source)

    def total(self, model: str, name: str, value: float, source: int = 0) -> None:
        """A counter kept elsewhere, which starts over when a worker does."""
        before = self._seen.get((model, name, source), 0.0)
        self._seen[model, name, source] = value
        self.count(model, name, value if value < before else value - before)

    def restarts(self, models: Models) -> None:
        for m in models.loaded.values():
            self.total(m.name, "engine_restarts", m.supervisor.n_restarts)


@dataclass
class Record:
    """One API call as the metrics see it."""

    metrics: Metrics
    model: str

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}
        self._failed = False

    def pieces(self, pieces: Sequence[tuple[int, Delta]], ended: Sequence[wire.Ended]) -> None:
        now, m = time.perf_counter(), self.metrics
        for choice, delta in pieces:
            if delta.token_ids:
                m.count(self.model, "generation_tokens", len(delta.token_ids))
                before = self._last.get(choice)
                name = "time_to_first_token_seconds" if before is None else "inter_token_latency_seconds"
                m.observe(self.model, name, now - (self._start if before is None else before))
                self._last[choice] = now
            if delta.finish_reason is not None:
                m.count(self.model, "request_success", 1, delta.finish_reason)
        for end in ended:
            m.observe(self.model, "request_queue_time_seconds", end.timing.queue)
            m.observe(self.model, "request_prefill_time_seconds", end.timing.prompt)
            m.observe(self.model, "request_decode_time_seconds", end.timing.generation)

    def fail(self, error: BaseException) -> None:
        self._failed = True
        self.metrics.count(self.model, "request_failures", 1, type(error).__name__)

    def close(self, n_tokens: int) -> None:
        m, took = self.metrics, time.perf_counter() - self._start
        if self._failed:
            return
        m.observe(self.model, "e2e_request_latency_seconds", took)
        m.observe(self.model, "request_generation_tokens", n_tokens)
        if self._last and n_tokens > len(self._last):
            per_choice = (n_tokens - len(self._last)) / len(self._last)
            decode = max(self._last.values()) - self._start
            m.observe(self.model, "request_time_per_output_token_seconds", decode / max(1.0, per_choice))
