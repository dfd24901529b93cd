"""Requests in, streams out: queues, text, stop conditions and the life of a sequence around `Runner.step`.

Not thread-safe: one thread owns an engine (`llm.AsyncLLM` shows how to share it).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from paceline.core import rng
from paceline.core.adapters import Adapter, Adapters
from paceline.core.clock import Clock, RealClock
from paceline.core.errors import RequestError
from paceline.core.kvcache import KVCache
from paceline.core.runner import Parts, Runner
from paceline.core.sampler import Drawn
from paceline.core.scheduler import Limits
from paceline.core.sequence import Sequence
from paceline.core.types import Completion, Delta, FinishReason, Output, Request, Resumed, SamplingParams, Timing


class TextStream(Protocol):
    """Turns tokens into text that is safe to show, and watches for stop strings."""

    def push(self, token: int) -> tuple[str, str | None]:
        """New text, and the stop string that was completed, if any."""

    def finish(self) -> str: ...


class NoText:
    """For engines without a tokenizer."""

    def push(self, token: int) -> tuple[str, str | None]:
        return "", None

    def finish(self) -> str:
        return ""


@dataclass
class _Live:
    """A request being served: its sequences, and the text of each so far."""

    request: Request
    seqs: list[Sequence]
    streams: list[TextStream]
    texts: list[list[str]]
    start: float
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def done(self) -> bool:
        return all(s.done for s in self.seqs)


@dataclass(frozen=True)
class Serving:
    """What requests are checked against. capacity: tokens one sequence may have, prompt and output."""

    n_vocab: int
    capacity: int
    eos: frozenset[int] = frozenset()
    why_capacity: str = "the context"

    def problems(self, request: Request) -> list[str]:
        """Everything that stands against a request, whatever else is being served."""
        p, problems = request.params, []
        if not request.tokens:
            problems.append(
                "prompt: is empty; give at least one token (models with a BOS token get it from the tokenizer)"
            )
        bad = next((t for t in request.tokens if not 0 <= t < self.n_vocab), None)
        if bad is not None:
            problems.append(f"prompt token id {bad}: must be from 0 to {self.n_vocab - 1} (the model's vocabulary)")
        n_more = 1 if request.generate else 0
        if len(request.tokens) + n_more > self.capacity:
            fit = f"exceed {self.capacity - n_more} that fit ({self.why_capacity}); shorten it"
            problems.append(f"prompt: {len(request.tokens)} tokens {fit}")
        for name, ids in (("logit_bias", p.logit_bias), ("stop_token_ids", p.stop_token_ids)):
            out = [t for t in ids if not 0 <= t < self.n_vocab]
            if out:
                problems.append(f"{name}: token id {out[0]} is outside the vocabulary (0 to {self.n_vocab - 1})")
        return problems


def _no_reader(name: str, path: Path, room: int) -> Adapter:
    raise RequestError(f"adapter = {name!r}: this engine was built without a reader of adapters")


@dataclass
class Stats:
    n_requests: int = 0
    n_finished: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    def __init__(
        self,
        model: Any,
        cache: KVCache,
        parts: Parts,
        limits: Limits,
        serving: Serving,
        text: Callable[[SamplingParams], TextStream] = lambda params: NoText(),
        clock: Clock | None = None,
        adapters: Adapters | None = None,
    ):
        self.clock = clock or RealClock()
        self.serving, self.text = serving, text
        self.runner = Runner(model, cache, parts, limits, serving.eos, self._append)
        self.adapters = adapters or Adapters(_no_reader, 0)
        self.live: dict[str, _Live] = {}
        self.stats = Stats()
        self._unscheduled: list[_Live] = []  # those that have not begun to run
        self._deltas: list[Delta] = []
        self._done: list[Output] = []
        self._ids = 0

    # ---- requests

    def add(self, request: Request, parent: Sequence | None = None, resumed: Seq[Resumed] = ()) -> None:
        """Queue a request. Raises RequestError (nothing is queued then).

        parent: a parked sequence whose tokens are a prefix of the request's; its state is shared instead of computed.
        resumed: what each completion had in an engine that was lost; the streams go on behind it. With the request's own
        seed the tokens are those that would have come.
        """
        self.check(request)
        now = self.clock.now()
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        n = request.params.n if request.generate else 1
        adapter = self.adapters.loaded[request.adapter] if request.adapter else None
        seqs = [self._sequence(request, i, rng.child_seed(seed, i), adapter) for i in range(n)]
        streams = [self.text(request.params) for _ in seqs]
        live = _Live(request, seqs, streams, [[] for _ in seqs], now)
        self.live[request.id] = live
        self._unscheduled.append(live)
        if any(r.tokens or r.finish_reason for r in resumed):
            self._resume(live, resumed)
        else:
            seqs[0].siblings = seqs[1:]
            self._start(seqs[0], parent)
        self.stats.n_requests += 1
        self.stats.n_prompt_tokens += len(request.tokens)

    def _resume(self, live: _Live, resumed: Seq[Resumed]) -> None:
        """Completions that had begun start each on its own: they share no more than their prompt, which is in the tokens."""
        for seq, had in zip(live.seqs, resumed, strict=True):
            seq.tokens += had.tokens
            live.texts[seq.index] += [live.streams[seq.index].push(token)[0] for token in had.tokens]
            seq.finish_reason = had.finish_reason
            if not seq.done:
                self.runner.scheduler.add(seq)
        if live.done:
            self._retire(live)

    def _sequence(self, request: Request, index: int, seed: int, adapter: Adapter | None) -> Sequence:
        self._ids += 1
        n_prompt = len(request.tokens)
        room = self.serving.capacity - n_prompt
        max_tokens = room if request.params.max_tokens is None else min(request.params.max_tokens, room)
        tokens, max_len = list(request.tokens), n_prompt + max_tokens
        return Sequence(self._ids, request, index, tokens, n_prompt, seed, max_len, adapter=adapter)

    def _start(self, seq: Sequence, parent: Sequence | None) -> None:
        # the state of another adapter is another one
        of_another = parent is not None and parent.adapter is not seq.adapter
        if parent is None or parent.kv is None or parent.n_computed >= len(seq.tokens) or of_another:
            self.runner.scheduler.add(seq)
            return
        seq.kv = self.runner.cache.fork(parent.kv)
        seq.n_computed = parent.n_computed
        seq.n_cached = min(parent.n_computed, seq.n_prompt)
        self.runner.scheduler.run(seq)

    def fork(self, seq: Sequence | None) -> Sequence | None:
        """A parked sequence that shares this one's state (None: there is none to share)."""
        if seq is None:
            return None
        child = self._sequence(seq.request, seq.index, seq.seed, seq.adapter)
        child.tokens = list(seq.tokens)
        if seq.kv is not None:
            child.kv, child.n_computed = self.runner.cache.fork(seq.kv), seq.n_computed
            self.runner.scheduler.park(child)
        return child

    def check(self, request: Request) -> None:
        """Raise RequestError naming everything wrong with a request."""
        problems = self.serving.problems(request)
        if request.adapter and (problem := self.adapters.problem(request.adapter)) is not None:
            problems.append(problem)
        if request.id in self.live:
            problems.append(f"id = {request.id!r}: a request of this id is being served")
        problems += self.runner.sampler.why_not(request.params)
        if problems:
            raise RequestError("; ".join(problems))

    def abort(self, request_id: str) -> None:
        """End a request now; what it has so far becomes its output. Unknown ids are ignored (it may just have ended)."""
        live = self.live.get(request_id)
        if live is None:
            return
        for seq in live.seqs:
            if not seq.done:
                self._finish(live, seq, "abort")
        self._retire(live)

    def close(self) -> None:
        """Drop every request, and let tiers write what they still have in hand."""
        for request_id in list(self.live):
            self.abort(request_id)
        if self.runner.parts.tiers is not None:
            self.runner.parts.tiers.close()

    # ---- adapters

    def load_adapter(self, name: str, path: str | Path) -> Adapter:
        """Requests may name it from now on. Raises RequestError (name, memory) and CheckpointError (its files)."""
        before = self.adapters.sites
        adapter = self.adapters.load(name, path)
        if self.adapters.sites != before:
            self.runner.adapted = self.runner.model.adapted(self.adapters.sites)
        return adapter

    def unload_adapter(self, name: str) -> None:
        """New requests cannot name it; those being served keep it to their end. Raises RequestError when it is not loaded."""
        self.adapters.unload(name)

    # ---- steps

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def step(self) -> tuple[list[Delta], list[Output]]:
        """Run one step; the new pieces of every stream, and the requests that ended."""
        before = self.clock.now()
        touched = self.runner.step(before)
        now = self.clock.now()
        self.runner.observe(now - before)
        if self._unscheduled:
            self._note_scheduled(before)
        ended: dict[str, _Live] = {}
        for seq in touched:
            live = self.live.get(seq.request.id)
            if live is None:
                continue
            if live.first_token is None:
                live.first_token = now
            live.last_token = now
            if seq.finish_reason is not None or not seq.request.generate:
                ended[live.request.id] = live
        for live in ended.values():
            self._end(live)
        deltas, self._deltas = self._deltas, []
        done, self._done = self._done, []
        return deltas, done

    def _note_scheduled(self, now: float) -> None:
        """Who has begun to run in the step of that time."""
        running = {seq.request.id for seq in self.runner.scheduler.running}
        for live in self._unscheduled:
            if live.request.id in running:
                live.first_scheduled = now
        self._unscheduled = [
            live for live in self._unscheduled if live.first_scheduled is None and live.request.id in self.live
        ]

    def _end(self, live: _Live) -> None:
        """Finish and release the sequences of a request that have come to their end; the request with the last of them."""
        for seq in live.seqs:
            if not seq.request.generate and seq.n_computed == len(seq.tokens) and not seq.done:
                self._finish(live, seq, "length")
            elif seq.finish_reason == "error" and seq.kv is not None:
                self._finish(live, seq, "error")
            elif seq.done and seq.kv is not None:
                self._release(seq)
        if live.done:
            self._retire(live)

    def _append(self, seq: Sequence, drawn: Drawn) -> bool:
        """Commit one token: text, stop conditions, stream. True when the sequence has ended."""
        live = self.live[seq.request.id]
        p, token = seq.params, drawn.token
        seq.tokens.append(token)
        self.stats.n_output_tokens += 1
        if drawn.logprob is not None:
            seq.logprobs.append(drawn.logprob)
        text, matched = live.streams[seq.index].push(token)
        n_output = len(seq.tokens) - seq.n_prompt
        reason: FinishReason | None = None
        stop: str | int | None = None
        if p.constraint is not None and token in self.serving.eos:
            reason = "stop"  # drawn only where the constraint allows it; see SamplingParams
        elif n_output >= p.min_tokens:
            if token in self.serving.eos and not p.ignore_eos:
                reason, stop = "stop", None
            elif token in p.stop_token_ids:
                reason, stop = "stop", token
            elif matched is not None:
                reason, stop = "stop", matched
        if reason is None and len(seq.tokens) >= seq.max_len:
            reason = "length"
        self._emit(live, seq, (token,), text, drawn, reason, stop)
        return reason is not None

    def _emit(
        self,
        live: _Live,
        seq: Sequence,
        tokens: tuple[int, ...],
        text: str,
        drawn: Drawn | None,
        reason: FinishReason | None,
        stop: str | int | None = None,
    ) -> None:
        if reason is not None:
            seq.finish_reason, seq.stop_reason = reason, stop
            if not isinstance(stop, str):
                text += live.streams[seq.index].finish()
        if text:
            live.texts[seq.index].append(text)
        lp = (drawn.logprob,) if drawn is not None and drawn.logprob is not None else ()
        self._deltas.append(Delta(seq.request.id, seq.index, tokens, text, lp, reason, stop))

    def _finish(self, live: _Live, seq: Sequence, reason: FinishReason) -> None:
        self._emit(live, seq, (), "", None, reason)
        self._release(seq)

    def _release(self, seq: Sequence) -> None:
        scheduler = self.runner.scheduler
        if seq.request.park and seq.kv is not None and seq.finish_reason in ("stop", "length"):
            if seq not in scheduler.parked:
                scheduler.park(seq)
            return
        scheduler.remove(seq)
        seq.adapter = None  # outputs are kept by who asked; an adapter that was unloaded is not

    def _retire(self, live: _Live) -> None:
        for seq in live.seqs:
            self._release(seq)
        del self.live[live.request.id]
        first = live.seqs[0]
        self.stats.n_finished += 1
        self.stats.n_cached_tokens += first.n_cached
        reason = first.finish_reason or "abort"
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        completions = [
            Completion(
                s.index,
                s.output,
                "".join(live.texts[s.index]),
                s.finish_reason,
                s.stop_reason,
                s.logprobs if s.params.logprobs is not None else None,
            )
            for s in live.seqs
        ]
        errors = [s.error for s in live.seqs if s.error]
        self._done.append(
            Output(
                live.request.id,
                list(live.request.tokens),
                completions,
                next((s.prompt_logprobs for s in live.seqs if s.prompt_logprobs is not None), None),
                first.n_cached,
                sum(s.n_preempted for s in live.seqs),
                self._timing(live),
                errors[0] if errors else None,
                live.seqs,
            )
        )

    def _timing(self, live: _Live) -> Timing:
        end = self.clock.now()
        scheduled = live.first_scheduled if live.first_scheduled is not None else end
        first = live.first_token if live.first_token is not None else end
        last = live.last_token if live.last_token is not None else first
        return Timing(scheduled - live.start, first - scheduled, last - first, first - live.start)
