"""A worker may die: streams go on, token for token, and who ends workers is refused. Real processes, the embedded model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.core.config import EngineConfig
from paceline.core.errors import ConfigError, RequestError
from paceline.core.types import Delta, Request, SamplingParams
from paceline.llm import LLM
from paceline.server import wire
from paceline.server.errors import Fault, Unavailable
from paceline.server.supervisor import Restarts, Supervisor

CONFIG = EngineConfig(context=512, threads=1, kv_memory=64 << 20)
POISON = (sys.executable, str(Path(__file__).with_name("poisoned_worker.py")))
POISONOUS = 77  # a prompt that begins with this token ends the poisoned worker (see there)


def run(scenario: Callable[[Supervisor], Awaitable[Any]], **options: Any) -> Any:
    async def whole() -> Any:
        supervisor = Supervisor(None, options.pop("config", CONFIG), **options)
        await supervisor.start()
        try:
            return await asyncio.wait_for(scenario(supervisor), 60)
        finally:
            await supervisor.stop()

    return asyncio.run(whole())


def request(name: str, first: int = 5, *, n_prompt: int = 40, **params: Any) -> Request:
    given = {"max_tokens": 60, "seed": 3, "ignore_eos": True, **params}
    return Request(name, (first, *range(10, 9 + n_prompt)), SamplingParams(**given))


async def collect(supervisor: Supervisor, r: Request, told: Callable[[int], None] = lambda n: None) -> Any:
    """Tokens and texts of each completion, and the end."""
    n = r.params.n
    tokens: list[list[int]] = [[] for _ in range(n)]
    texts = [""] * n
    async for items in supervisor.serve([r]):
        for _, item in items:
            if isinstance(item, Delta):
                tokens[item.index] += item.token_ids
                texts[item.index] += item.text
                told(sum(map(len, tokens)))
            else:
                return tokens, texts, item
    raise AssertionError("no end")


def alone(r: Request) -> Any:
    with LLM(None, CONFIG) as llm:
        output = llm.generate([list(r.tokens)], r.params)[0]
        return [c.token_ids for c in output.completions], [c.text for c in output.completions]


def test_kill_9_in_the_middle_of_streams_loses_and_repeats_nothing() -> None:
    requests = [
        request("a"), request("b", 6, temperature=0.0), request("c", 7, n=3, max_tokens=40), request("d", 8, max_tokens=9),
    ]  # fmt: skip

    async def scenario(supervisor: Supervisor) -> Any:
        killed = [0, 0]

        def kill(n: int) -> None:
            for i, at in enumerate((12, 40)):
                if n >= at and not killed[i] and supervisor.pid is not None and killed[0] >= i:
                    killed[i] = supervisor.pid
                    os.kill(supervisor.pid, signal.SIGKILL)

        told = [kill] + [lambda n: None] * 3
        found = await asyncio.gather(*(collect(supervisor, r, t) for r, t in zip(requests, told, strict=True)))
        return killed, supervisor.n_restarts, found

    killed, n_restarts, found = run(scenario)
    assert all(killed)
    assert killed[0] != killed[1]
    assert n_restarts == 2
    for r, (tokens, texts, end) in zip(requests, found, strict=True):
        assert (tokens, texts) == alone(r), r.id
        assert isinstance(end, wire.Ended)


def test_who_ends_the_worker_twice_is_refused_and_its_neighbours_finish() -> None:
    good = [request(f"g{i}", 5 + i) for i in range(3)]
    bad = request("bad", POISONOUS)

    async def scenario(supervisor: Supervisor) -> Any:
        found = await asyncio.gather(*(collect(supervisor, r) for r in [*good, bad]), return_exceptions=True)
        return found, supervisor.n_restarts

    found, n_restarts = run(scenario, command=POISON)
    assert isinstance(found[-1], Fault)
    assert n_restarts == 2
    for r, result in zip(good, found, strict=False):
        assert result[:2] == alone(r), r.id


def test_too_many_deaths_end_every_stream_with_a_reason() -> None:
    async def scenario(supervisor: Supervisor) -> Any:
        first = await asyncio.gather(collect(supervisor, request("bad", POISONOUS)), return_exceptions=True)
        with pytest.raises(Unavailable, match="given up"):
            supervisor.submit(request("late"))
        return first, supervisor.state

    (error,), state = run(scenario, command=POISON, restarts=Restarts(most=0))
    assert isinstance(error, Unavailable)
    assert state == "failed"


def test_a_worker_that_hangs_is_ended() -> None:
    hang = request("hang", POISONOUS + 1)

    async def scenario(supervisor: Supervisor) -> Any:
        return await asyncio.gather(
            collect(supervisor, hang), collect(supervisor, request("g")), return_exceptions=True
        )

    found = run(scenario, command=POISON, restarts=Restarts(step_s=1.0))
    assert isinstance(found[0], Fault)
    assert found[1][:2] == alone(request("g"))


def test_requests_that_cannot_be_served_are_refused_at_once() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(RequestError, match="exceed 511"):
            supervisor.submit(request("long", n_prompt=600))
        with pytest.raises(RequestError, match="vocabulary"):
            supervisor.submit(request("x", 1 << 30))
        stream = supervisor.submit(request("twice"))
        with pytest.raises(RequestError, match="is being served"):
            supervisor.submit(request("twice"))
        supervisor.abort(stream)

    run(scenario)


def test_leaving_a_stream_frees_its_pages_before_the_next_gauge() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        serving = supervisor.serve([request("a", max_tokens=400)])
        async for _ in serving:
            break
        await serving.aclose()  # type: ignore[attr-defined]
        for _ in range(100):
            if (supervisor.gauge.n_running, supervisor.gauge.kv_used) == (0, 0.0) and supervisor.gauge.counters:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(supervisor.gauge)

    run(scenario)


def test_options_that_cannot_be_met_are_told() -> None:
    async def whole() -> None:
        supervisor = Supervisor(None, EngineConfig(context=1 << 20))
        with pytest.raises(ConfigError, match="context = 1048576"):
            await supervisor.start()
        await supervisor.stop()

    asyncio.run(whole())
