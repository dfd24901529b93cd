"""From a checked request to the pieces of its answer: what the APIs share.

An `Answer` is one API call's generation. It admits the call under its key's quotas, serves its requests, counts, and settles.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.core.errors import RequestError
from paceline.core.types import Delta, Request, SamplingParams, TokenLogprob
from paceline.server import wire
from paceline.server.api.base import Call
from paceline.server.errors import ApiError
from paceline.server.models import Model

log = logging.getLogger("paceline.server")


@dataclass
class Usage:
    """Tokens of one call. cached: of the prompts, found in the prefix cache."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass
class Whole:
    """One completion, complete."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Service:
    """How a request wishes to be served.

    priority: 0 or later, as vLLM counts. salt: narrows whose prefixes are shared. Targets are seconds.
    """

    priority: int = 0
    salt: str = ""
    ttft_target: float | None = None
    tpot_target: float | None = None


NO_WISHES = Service()


class Answer:
    """prompts: token ids of each; completion i of prompt p is choice p * n + i.

    field: what the API calls the prompt, for errors. window: how many of the requests the engine has at a time; None: all.
    """

    def __init__(
        self,
        call: Call,
        model: Model,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        generate: bool = True,
        pool: Any = None,
        service: Service = NO_WISHES,
        field: str = "messages",
        window: int | None = None,
    ):
        self.call, self.model, self.params = call, model, params
        self.field, self.window = field, window
        who = call.identity
        own = f"{who.name}/{service.salt}" if service.salt else who.name
        now, ours = time.perf_counter(), secrets.token_hex(4)  # call.id may be the client's own, and given twice
        self.requests = [
            Request(
                f"{call.id}-{ours}-{i}",
                tuple(tokens),
                params,
                generate=generate,
                pool=pool,
                priority=who.priority - service.priority,
                salt=own,
                ttft_target=service.ttft_target,
                tpot_target=service.tpot_target,
                owner=who.name,
                adapter=model.adapter,
                arrival=now,
            )
            for i, tokens in enumerate(prompts)
        ]
        self.usage = Usage(prompt=sum(len(p) for p in prompts))
        self.said: list[list[str]] = [[] for _ in range(self.n_choices)]  # texts so far, if they are to be logged
        self.ended: list[wire.Ended | None] = [None] * len(self.requests)
        self.started = time.time()

    @property
    def n_choices(self) -> int:
        return len(self.requests) * self.params.n

    def check(self) -> None:
        """Raise ApiError or RequestError for everything that stands against serving this."""
        bounds, server = self.call.server.settings.bounds, self.call.server
        supervisor = self.model.supervisor
        problems = [p for r in self.requests for p in supervisor.problems(r)]
        longest = max((len(r.tokens) for r in self.requests), default=0)
        if bounds.max_prompt_tokens is not None and longest > bounds.max_prompt_tokens:
            problems.append(f"prompt: {longest} tokens, more than the {bounds.max_prompt_tokens} this server takes")
        if problems:
            over = longest + 1 > self.model.ready.serving.capacity
            raise ApiError(
                400,
                "; ".join(dict.fromkeys(problems)),
                param=self.field if over else None,
                code="context_length_exceeded" if over else None,
            )
        if supervisor.n_live + min(len(self.requests), self.window or len(self.requests)) > bounds.max_queue:
            raise ApiError(503, "too many requests are waiting; try again later", headers={"retry-after": "1"})
        if server.draining:
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "5"})

    async def pieces(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """The pieces as they come, (choice, piece), those that came together in one list. Leaving the iteration aborts all.

        The first list is empty: it says that the call is admitted, so that a stream may begin before its first token.
        Raises ApiError before anything is served when quotas or bounds forbid it.
        """
        self.check()
        server, who = self.call.server, self.call.identity
        room = self.model.ready.serving.capacity
        most = min(self.params.max_tokens or room, room) if self.requests[0].generate else 0
        grant = server.gate.admit(who, self.usage.prompt + most * self.n_choices)
        record = server.metrics.begin(self.model.name, self.usage.prompt)
        span = server.traces.begin(self.model.name, self.call.id, self.params, self.call.http.headers)
        error: BaseException | None = None
        timeout = server.settings.bounds.request_timeout
        try:
            yield []
            async for items in self.model.supervisor.serve(self.requests, timeout, self.window):
                found: list[tuple[int, Delta]] = []
                for at, item in items:
                    if isinstance(item, Delta):
                        self.usage.completion += len(item.token_ids)
                        found.append((at * self.params.n + item.index, item))
                    else:
                        self.ended[at] = item
                        self.usage.cached += item.n_cached
                if server.settings.observe.log_prompts:
                    for choice, delta in found:
                        self.said[choice].append(delta.text)
                record.pieces(found, [item for _, item in items if isinstance(item, wire.Ended)])
                if found:
                    yield found
        except Exception as e:
            error = e
            record.fail(e)
            raise
        finally:
            span.end(self.usage, self.ended, error)
            server.gate.settle(grant, self.usage.prompt + self.usage.completion)
            record.close(self.usage.completion)
            if server.settings.observe.log_prompts:
                self._log()

    def _log(self) -> None:
        """What was asked and answered, for who wants that in the log (`log_prompts`)."""
        known = self.model.front.tokenizer
        prompts = [
            list(r.tokens) if known is None else known.decode(r.tokens, skip_special_tokens=False)
            for r in self.requests
        ]
        answers = ["".join(texts) for texts in self.said]
        log.info("prompt and answer", extra={"request": self.call.id, "prompts": prompts, "answers": answers})

    async def whole(self) -> list[Whole]:
        """All completions, each complete."""
        done = [Whole() for _ in range(self.n_choices)]
        texts: list[list[str]] = [[] for _ in done]
        async for pieces in self.pieces():
            for choice, delta in pieces:
                one = done[choice]
                texts[choice].append(delta.text)
                one.token_ids += delta.token_ids
                one.logprobs += delta.logprobs
                if delta.finish_reason is not None:
                    one.finish_reason, one.stop_reason = delta.finish_reason, delta.stop_reason
        for one, parts in zip(done, texts, strict=True):
            one.text = "".join(parts)
        return done

    def prompt_logprobs(self, request: int) -> list[dict[str, Any] | None] | None:
        """Of one prompt, as vLLM writes them: by token id, with rank left out."""
        end = self.ended[request]
        if end is None or end.prompt_logprobs is None:
            return None
        return [
            None
            if lp is None
            else {
                str(t): {"logprob": v, "decoded_token": self.model.text_of(t)}
                for t, v in (*lp.top, (lp.token, lp.logprob))
            }
            for lp in end.prompt_logprobs
        ]

    def receipt(self) -> dict[str, Any]:
        """What made this answer and what it cost. Times in seconds."""
        times = [e.timing for e in self.ended if e is not None]
        return {
            "plan": self.model.fingerprint,
            "cached_tokens": self.usage.cached,
            "preemptions": sum(e.n_preempted for e in self.ended if e is not None),
            "queue_s": max((t.queue for t in times), default=0.0),
            "prompt_s": max((t.prompt for t in times), default=0.0),
            "generation_s": max((t.generation for t in times), default=0.0),
            "first_token_s": max((t.first_token for t in times), default=0.0),
        }

    def headers(self) -> dict[str, str]:
        """Of the answer: where the key's quotas stand."""
        return self.call.server.gate.headers(self.call.identity)


def one_field(e: RequestError) -> ApiError:
    """A RequestError as 400 with the field it begins with."""
    name = str(e).split(" ", 1)[0].split(":", 1)[0]
    return ApiError(400, str(e), param=name if name.isidentifier() else None)
