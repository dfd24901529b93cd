"""Deaths and races of supervision at places chosen by the test: nothing is lost, nobody is blamed for others, no process is left."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from test_supervisor import CONFIG, POISON, POISONOUS, collect, request

from paceline.core.engine import Serving
from paceline.core.errors import RequestError
from paceline.core.types import Constraint, Delta, Request, Resumed, SamplingParams, Timing
from paceline.llm import LLM
from paceline.server import streams, supervisor, wire
from paceline.server.errors import Fault, Unavailable
from paceline.server.supervisor import COMMAND, Restarts, Supervisor


def run(scenario: Callable[[Supervisor], Awaitable[Any]], command: Any = COMMAND, **options: Any) -> Any:
    async def whole() -> Any:
        made = Supervisor(None, CONFIG, command=command, **options)
        await made.start()
        try:
            return await asyncio.wait_for(scenario(made), 60)
        finally:
            await made.stop()

    return asyncio.run(whole())


def kinds() -> list[Request]:
    """Requests of every kind; each says what it says after (prompt) tokens of its own."""
    texts: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "sampled": {"presence_penalty": 1.0, "repetition_penalty": 1.1},
        "several": {"n": 4, "stop": ("e", "\n")},
        "logprobs": {"logprobs": 3},
        "scored": {"prompt_logprobs": 2, "n": 2, "logprobs": 0},
        "stop": {"stop": ("zzzz never", " th", "ing ")},  # text is held back while it may become a stop string
        "bytes": {"logit_bias": dict.fromkeys(range(130, 230), 12.0), "temperature": 1.3},  # halves of characters
        "regex": {"constraint": Constraint("regex", "[a-z]{9,30}( [a-z]+){3,5}!")},
        "grammar": {"constraint": Constraint("json_schema", '{"type": "array", "items": {"type": "integer"}, "maxItems": 9}')},
    }  # fmt: skip
    made = [request(name, 5 + i, **params) for i, (name, params) in enumerate(texts.items())]
    only = SamplingParams(prompt_logprobs=1)
    made.append(Request("echo", tuple(range(20, 60)), only, generate=False))
    made.append(Request("pooled", tuple(range(30, 60)), SamplingParams(), generate=False, pool="mean"))
    return made


async def told(s: Supervisor, r: Request) -> Any:
    """All that a reader is told, in one form: by completion (tokens, text, logprobs, end), and what comes with the end."""
    found: list[Any] = [[[], "", [], None, None] for _ in range(r.params.n)]
    async for items in s.serve([r]):
        for _, item in items:
            if isinstance(item, Delta):
                one = found[item.index]
                assert one[3] is None, "goes on after its end"
                one[0] += item.token_ids
                one[1] += item.text
                one[2] += item.logprobs
                one[3:] = [item.finish_reason, item.stop_reason]
            else:
                return found, item.prompt_logprobs, item.pooled
    raise AssertionError("no end")


def killer(at: int, **params: Any) -> Request:
    given = {"max_tokens": 40, "seed": 3, "ignore_eos": True, **params}
    return Request(f"killer{at}", (79, at, *range(10, 40)), SamplingParams(**given))


@pytest.mark.parametrize("at", [0, 1, 7, 24])
def test_every_kind_of_request_survives_a_death(at: int) -> None:
    async def undisturbed(s: Supervisor) -> Any:
        return await asyncio.gather(*(told(s, r) for r in kinds()))

    async def disturbed(s: Supervisor) -> Any:
        found = await asyncio.gather(*(told(s, r) for r in [*kinds(), killer(at)]))
        return found[:-1], s.n_restarts

    expected = run(undisturbed)
    found, n_restarts = run(disturbed, POISON)
    assert n_restarts == 1
    for r, a, b in zip(kinds(), expected, found, strict=True):
        assert a == b, r.id


def test_a_completion_that_had_ended_keeps_what_comes_with_the_end_of_all() -> None:
    def made(first: int) -> Request:
        params = SamplingParams(n=3, seed=4, prompt_logprobs=1, stop=("e",), ignore_eos=True, max_tokens=30)
        return Request("r", (first, *range(12, 40)), params)

    async def scenario(s: Supervisor) -> Any:
        return await told(s, made(80)), s.n_restarts

    expected, none = run(scenario)
    found, n_restarts = run(scenario, POISON)
    assert (none, n_restarts) == (0, 1)
    ends = [len(tokens) for tokens, *_ in expected[0]]
    assert ends[0] < max(ends), "the first completion must end before another"
    assert expected[1] is not None
    assert found == expected


def test_a_hanging_worker_is_ended_although_its_request_was_given_up_and_others_keep_coming() -> None:
    async def scenario(s: Supervisor) -> Any:
        hang = s.submit(request("hang", POISONOUS + 1))
        await asyncio.sleep(0.1)
        s.abort(hang)
        pending = []
        for i in range(200):
            pending.append(asyncio.ensure_future(collect(s, request(f"g{i}", 5, max_tokens=3))))
            await asyncio.sleep(0.1)
            if s.n_restarts:
                return len(await asyncio.gather(*pending))
        raise AssertionError("the worker was not ended")

    assert run(scenario, POISON, restarts=Restarts(step_s=0.5)) > 0


def test_a_stopped_worker_ends_with_its_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_S", 0.2)

    async def whole() -> int:
        s = Supervisor(None, CONFIG)
        await s.start()
        assert s.pid is not None
        pid = s.pid
        os.kill(pid, signal.SIGSTOP)
        await s.stop()
        return pid

    pid = asyncio.run(whole())
    with pytest.raises(ProcessLookupError):  # neither running nor a zombie
        os.kill(pid, 0)


def test_a_fault_of_ours_while_listening_costs_a_worker_and_no_stream() -> None:
    faults = itertools.count()

    def observe(stepped: wire.Stepped) -> None:
        if stepped.deltas and next(faults) == 3:
            raise KeyError("a bug")

    async def scenario(s: Supervisor) -> Any:
        return (await collect(s, request("a")))[:2], s.n_restarts

    async def undisturbed(s: Supervisor) -> Any:
        return (await collect(s, request("a")))[:2], s.n_restarts

    assert run(scenario, observe=observe) == (run(undisturbed)[0], 1)


def test_processes_that_cannot_be_had_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "AGAIN_S", 0.05)
    links, tries = supervisor._Link, itertools.count()

    def link(command: Any) -> Any:
        if next(tries) == 1:
            raise OSError(24, "too many open files")
        return links(command)

    monkeypatch.setattr(supervisor, "_Link", link)

    async def scenario(s: Supervisor) -> Any:
        return len((await collect(s, killer(5)))[0][0]), s.n_restarts

    assert run(scenario, POISON) == (40, 2)


# ---- without processes


class Link:
    """The front's end of a worker that says what the test says."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def submitted(self) -> list[str]:
        return [m.request.id.partition("#")[0] for m in self.sent if isinstance(m, wire.Submit)]


def ready() -> wire.Ready:
    return wire.Ready(Serving(4096, 512), {}, (), "f", 0.0)


def supervised() -> tuple[Supervisor, Link]:
    s = Supervisor(None, CONFIG)
    s.state, s.ready = "ready", ready()
    s._link = link = Link()  # type: ignore[assignment]
    return s, link


def delta(stream: Any, n: int = 1) -> wire.Stepped:
    return wire.Stepped([Delta(stream.key, 0, (7,) * n, "x" * n)], [])


async def dies(s: Supervisor, code: int = -signal.SIGSEGV) -> Link:
    """The worker dies and another is there."""
    s._link = None
    await s._after_death(code, "test")
    s.state = "ready"
    s._link = link = Link()  # type: ignore[assignment]
    s._dispatch()
    return link


def test_a_suspect_runs_when_those_before_it_are_known_to_be_gone() -> None:
    async def whole() -> None:
        s, _ = supervised()
        a, b = s.submit(request("a")), s.submit(request("b"))
        link = await dies(s)
        assert link.submitted() == ["a"]
        for _ in range(streams.CLEAR_AFTER):
            s._stepped(delta(a))
        assert link.submitted() == ["a"], "the worker may still be computing what it was asked to drop"
        assert [m.id for m in link.sent if isinstance(m, wire.Abort)] == [a.key]
        s._stepped(wire.Stepped([], [wire.Ended(a.key, timing=Timing())]))
        assert link.submitted() == ["a", "b"]
        assert not a.done  # its end was that of an attempt
        s._stepped(delta(b, streams.CLEAR_AFTER))
        assert link.submitted() == ["a", "b", "a"]

    asyncio.run(whole())


def test_a_suspect_that_ends_in_the_step_that_clears_it_has_ended() -> None:
    async def whole() -> None:
        s, _ = supervised()
        a, b = s.submit(request("a")), s.submit(request("b"))
        link = await dies(s)
        last = Delta(a.key, 0, (7,) * streams.CLEAR_AFTER, "", (), "length")
        s._stepped(wire.Stepped([last], [wire.Ended("gone#1"), wire.Ended(a.key)]))
        assert a.done
        assert link.submitted() == ["a", "b"]
        assert not [m for m in link.sent if isinstance(m, wire.Abort)]
        assert list(s._live.values()) == [b]

    asyncio.run(whole())


def test_a_request_of_which_only_the_end_is_missing_ends_at_once() -> None:
    r = request("r", n=2)
    with LLM(None, CONFIG) as llm:
        engine = llm.engine
        engine.add(r, resumed=(Resumed((5, 6), "stop"), Resumed((7,), "length")))
        assert not engine.has_work
        deltas, (output,) = engine.step()
    assert deltas == []
    assert [c.token_ids for c in output.completions] == [[5, 6], [7]]


def test_what_was_given_up_may_have_ended_the_worker() -> None:
    async def whole() -> None:
        s, _ = supervised()
        a, b = s.submit(request("a")), s.submit(request("b"))
        link = await dies(s)
        assert link.submitted() == ["a"]
        s.abort(a)  # its client leaves; the step that it is in ends the worker
        link = await dies(s)
        assert link.submitted() == ["b"]
        assert (b.n_alone, b.done) == (0, False)
        await dies(s)  # now nobody else can have been it
        assert isinstance(b.queue.get_nowait()[1], Fault)

    asyncio.run(whole())


def test_a_suspect_whose_reader_is_too_slow_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_PENDING", 1)

    async def whole() -> None:
        s, _ = supervised()
        a, b = s.submit(request("a", n=4)), s.submit(request("b"))
        link = await dies(s)
        for _ in range(2):
            s._stepped(delta(a))
        assert isinstance([a.queue.get_nowait()[1] for _ in range(3)][-1], Unavailable)
        s._stepped(wire.Stepped([], [wire.Ended(a.key, timing=Timing())]))
        assert link.submitted() == ["a", "b"]
        assert not b.done

    asyncio.run(whole())


def test_a_worker_that_becomes_ready_while_stopping_is_not_used() -> None:
    async def whole() -> None:
        s, link = supervised()
        s.state = "stopping"
        messages = iter([ready(), None])

        async def receive() -> Any:
            return next(messages)

        link.receive = receive  # type: ignore[attr-defined]
        await s._listen(link)  # type: ignore[arg-type]
        assert s.state == "stopping"
        with pytest.raises(Unavailable, match="shutting down"):
            s.submit(request("late"))

    asyncio.run(whole())


def test_a_refusal_by_the_next_worker_ends_the_stream() -> None:
    async def whole() -> None:
        s, _ = supervised()
        a = s.submit(request("a"))
        s._stepped(delta(a))
        await dies(s)
        asyncio.get_running_loop().call_soon(s._finish, a.key, RequestError("prompt: does not fit any more"))
        await asyncio.sleep(0)
        assert [type(item) for _, item in (a.queue.get_nowait(), a.queue.get_nowait())] == [Delta, RequestError]
        assert s.n_live == 0

    asyncio.run(whole())


def test_work_that_keeps_coming_does_not_hide_a_silent_worker() -> None:
    async def whole() -> None:
        s, _ = supervised()
        s.submit(request("a"))
        heard = s._heard
        time.sleep(0.01)
        s.submit(request("b"))
        assert s._heard == heard

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "paceline.server")
