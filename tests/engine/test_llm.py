"""The Python interface on the embedded model: streams, stops, branches, many at once from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from paceline import lab
from paceline.core.errors import ConfigError, RequestError
from paceline.core.types import SamplingParams
from paceline.llm import LLM, AsyncLLM

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
PROMPT = "def add(a, b):\n    "


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("lab-1m", context=1024) as engine:
        yield engine


def test_a_stream_is_the_whole_text(llm: LLM) -> None:
    whole = llm.generate(PROMPT, GREEDY)[0]
    pieces = llm.stream(PROMPT, GREEDY)
    text, tokens, output = "", [], None
    while output is None:
        try:
            d = next(pieces)
        except StopIteration as end:
            output = end.value
        else:
            text, tokens = text + d.text, [*tokens, *d.token_ids]
    assert (text, tokens) == (whole.text, whole.token_ids)
    assert output.completions[0].finish_reason == whole.completions[0].finish_reason


def test_leaving_a_stream_frees_it(llm: LLM) -> None:
    pieces = llm.stream(PROMPT, GREEDY)
    next(pieces)
    pieces.close()
    assert not llm.engine.has_work
    assert not llm.engine.runner.scheduler.running


def test_stop_strings_across_tokens(llm: LLM) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].text
    stop = text[7:12]
    at = text.index(stop)
    out = llm.generate(PROMPT, GREEDY.with_(stop=[stop]))[0]
    assert out.text == text[:at]
    assert out.completions[0].stop_reason == stop
    kept = llm.generate(PROMPT, GREEDY.with_(stop=[stop], include_stop=True))[0]
    assert kept.text == text[: at + len(stop)]


def test_branches(llm: LLM) -> None:
    whole = llm.generate(PROMPT, GREEDY)[0].token_ids
    branch = llm.prefill(PROMPT)
    for b in (branch, *llm.fork(branch, 2)):
        out = llm.generate(b, GREEDY)[0]
        assert out.token_ids == whole
        assert out.n_cached == len(branch.tokens) - 1
        llm.release(b)
    first = llm.generate(PROMPT, GREEDY.with_(max_tokens=10), park=True)[0]
    rest = llm.generate(llm.branch(first), GREEDY.with_(max_tokens=14))[0]
    assert first.token_ids + rest.token_ids == whole


def test_scores_sum_to_the_probability_of_the_text(llm: LLM) -> None:
    out = llm.generate(PROMPT, GREEDY.with_(logprobs=0))[0]
    scores = llm.score([out.prompt_token_ids + out.token_ids])[0]
    got = scores[len(out.prompt_token_ids) - 1 :]
    assert np.array_equal(got, [lp.logprob for lp in out.completions[0].logprobs or []])


def test_everything_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="exceed"):
        llm.generate(["ok", "word " * 3000], GREEDY)
    assert not llm.engine.has_work
    with pytest.raises(RequestError, match="params: 2 given for 1"):
        llm.generate(["a"], [GREEDY, GREEDY])
    with pytest.raises(ConfigError, match="option 'contxt' is unknown"):
        LLM("lab-1m", contxt=3)
    with pytest.raises(ConfigError, match="dtype = 'fp4'"):
        LLM("lab-1m", dtype="fp4")


def test_many_at_once_from_an_event_loop() -> None:
    prompts = [PROMPT, "import os\n", "class Stack:\n", "# A list of"]

    async def serve(llm: AsyncLLM) -> list[str]:
        async def one(p: str) -> str:
            return await llm.complete(p, GREEDY)

        async def leaves() -> None:
            async for _ in llm.generate(PROMPT, GREEDY.with_(max_tokens=500)):
                return

        async def wrong() -> str:
            with pytest.raises(RequestError, match="exceed"):
                await llm.complete("x " * 5000, GREEDY)
            return ""

        texts = await asyncio.gather(*map(one, prompts), wrong(), leaves())
        for _ in range(200):
            if not llm.llm.engine.has_work:
                break
            await asyncio.sleep(0.02)
        assert not llm.llm.engine.has_work, "an abandoned request goes on"
        return [t for t in texts if t]

    engine = AsyncLLM("lab-1m", context=1024)
    try:
        texts = asyncio.run(serve(engine))
    finally:
        engine.close()
    with LLM("lab-1m", context=1024) as plain:
        assert texts == [o.text for o in plain.generate(prompts, GREEDY)]


def test_the_embedded_models_are_there() -> None:
    assert {"lab-8m", "lab-1m"} <= set(lab.names())
