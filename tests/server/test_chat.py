"""/v1/chat/completions, /v1/completions and what is around them, through the unchanged OpenAI client and plain HTTP."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest
from served import CONFIG, Served, eventually, served

from paceline.core.types import SamplingParams
from paceline.llm import LLM

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as s:
        yield s


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(None, CONFIG) as model:
        yield model


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat_answers_as_the_engine_does(client: openai.OpenAI, llm: LLM) -> None:
    plain = llm.chat(QUESTION, SamplingParams(temperature=0.0))
    r = client.chat.completions.create(model="lab-8m", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2)
    choice = r.choices[0]
    assert choice.message.content == plain.text
    assert "Paris" in plain.text
    assert choice.finish_reason == "stop"
    assert r.usage is not None
    assert (r.usage.prompt_tokens, r.usage.completion_tokens) == (len(plain.prompt_token_ids), len(plain.token_ids))
    assert choice.logprobs is not None
    told = choice.logprobs.content or []
    assert len(told) == len(plain.token_ids)
    assert b"".join(bytes(t.bytes or []) for t in told[:-1]).decode() == plain.text
    assert all(len(t.top_logprobs) == 2 for t in told)


def test_a_stream_is_the_same_answer_in_chunks(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="lab-8m", messages=QUESTION, seed=4, n=2)
    chunks = list(
        client.chat.completions.create(
            model="lab-8m", messages=QUESTION, seed=4, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for c in chunk.choices:
            texts[c.index] += c.delta.content or ""
            reasons[c.index] = c.finish_reason or reasons[c.index]  # type: ignore[assignment]
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert [c.delta.role for chunk in chunks[:2] for c in chunk.choices] == ["assistant", "assistant"]
    assert len({c.id for c in chunks}) == len({c.created for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_wire_is_sse_to_the_letter(server: Served) -> None:
    body = {"model": "lab-8m", "messages": QUESTION, "stream": True, "max_tokens": 4}
    with server.client() as c:
        r = c.post("/v1/chat/completions", json=body)
    assert r.headers["content-type"].startswith("text/event-stream")
    assert r.headers["x-accel-buffering"] == "no"
    lines = r.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert all(json.loads(line[6:])["object"] == "chat.completion.chunk" for line in lines[:-2])


def test_completions_echo_and_score_as_lm_eval_asks(client: openai.OpenAI, llm: LLM, server: Served) -> None:
    prompts = ["The capital of France is Paris.", "One two three"]
    tokens = [llm.tokens(p) for p in prompts]
    r = client.completions.create(
        model="lab-8m", prompt=tokens, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for i, choice in enumerate(r.choices):
        assert choice.logprobs is not None
        own = choice.logprobs.token_logprobs or []
        assert own[0] is None
        assert own[1:-1] == pytest.approx(llm.score([tokens[i]])[0].tolist(), abs=1e-5)
        n = len(tokens[i])
        spans = list(zip(choice.logprobs.text_offset or [], choice.logprobs.tokens or [], strict=True))[:n]
        assert [choice.text[at : at + len(t)] for at, t in spans] == [t for _, t in spans]
    with server.client() as c:  # nothing generated at all
        body = {"prompt": prompts[0], "echo": True, "logprobs": 0, "max_tokens": 0}
        only = c.post("/v1/completions", json=body).json()
    assert only["usage"]["completion_tokens"] == 0
    assert only["choices"][0]["text"] == prompts[0]


def test_completions_take_every_kind_of_prompt(client: openai.OpenAI, llm: LLM) -> None:
    text = "Once upon a time"
    ids = llm.tokens(text)
    plain = llm.generate(text, SamplingParams(temperature=0.0, max_tokens=8))[0].text
    for prompt in (text, [text, text], ids, [ids, ids]):
        r = client.completions.create(model="lab-8m", prompt=prompt, max_tokens=8, temperature=0)  # type: ignore[arg-type]
        assert {c.text for c in r.choices} == {plain}
    pieces = client.completions.create(model="lab-8m", prompt=text, max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in pieces) == plain


def test_many_at_once_are_answered_as_each_alone(client: openai.OpenAI, llm: LLM) -> None:
    def ask(i: int) -> str:
        r = client.completions.create(model="lab-8m", prompt=f"Item {i} is", max_tokens=24, seed=i, temperature=1)
        return r.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(32)))
    for i, text in enumerate(texts):
        assert (
            text
            == llm.generate(f"Item {i} is", llm.default_params().with_(max_tokens=24, seed=i, temperature=1))[0].text
        )


def test_a_killed_worker_is_not_noticed_by_a_stream(client: openai.OpenAI, server: Served) -> None:
    def stream(kill: bool) -> str:
        text = ""
        asked = client.completions.create(
            model="lab-8m",
            prompt="The little dog",
            max_tokens=120,
            seed=9,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for i, chunk in enumerate(asked):
            text += chunk.choices[0].text
            if kill and i == 10:
                os.kill(server.supervisor.pid, signal.SIGKILL)
        return text

    before = server.supervisor.n_restarts
    assert stream(kill=True) == stream(kill=False)
    assert server.supervisor.n_restarts == before + 1


def test_the_prefix_of_an_earlier_request_is_not_computed_again(client: openai.OpenAI) -> None:
    system = {"role": "system", "content": "You answer in one sentence. " * 20}
    ask: Any = {"model": "lab-8m", "messages": [system, *QUESTION], "max_tokens": 4}
    client.chat.completions.create(**ask)
    again = client.chat.completions.create(**ask)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 100


def test_a_receipt_tells_what_made_the_answer(server: Served) -> None:
    with server.client(headers={"x-paceline-receipt": "1"}) as c:
        r = c.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 4}).json()
        receipt = r["paceline"]
        assert receipt["plan"] == r["system_fingerprint"]
        assert receipt["first_token_s"] > 0
        plan = c.get(f"/plan/{receipt['plan']}").json()
        assert plan["model"]
        assert plan["fingerprint"] == receipt["plan"]
        assert c.get("/plan/pl-unknown").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/chat/completions", {"messages": QUESTION, "foo": 1, "temperature": "hot"}, ["foo", "temperature"]),
        ("/v1/chat/completions", {"messages": [], "n": 0}, ["messages"]),
        ("/v1/chat/completions", {"messages": QUESTION, "n": 5_000_000}, ["n"]),
        ("/v1/chat/completions", {"messages": QUESTION, "top_logprobs": 3}, ["top_logprobs"]),
        ("/v1/chat/completions", {"messages": QUESTION, "logprobs": True, "top_logprobs": 1000}, ["logprobs"]),
        ("/v1/chat/completions", {"messages": QUESTION, "functions": [{}]}, ["functions"]),
        ("/v1/chat/completions", {"messages": QUESTION, "stop": ["x"] * 500_000}, ["stop"]),
        ("/v1/chat/completions", {"messages": QUESTION, "logit_bias": {"999999": 1}}, ["logit_bias"]),
        ("/v1/chat/completions", {"messages": QUESTION, "chat_template": "{{ 7 }}"}, ["chat_template"]),
        ("/v1/chat/completions", {"messages": QUESTION, "chat_template_kwargs": {"messages": 1}}, ["messages"]),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["messages[0]"]),
        ("/v1/completions", {"prompt": [[1, "x"]]}, ["prompt"]),
        ("/v1/completions", {"prompt": [1 << 40]}, ["prompt"]),
        ("/v1/completions", {"prompt": [-1]}, ["prompt"]),
        ("/v1/completions", {"prompt": []}, ["prompt"]),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, ["suffix"]),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": [1 << 31]}, ["stop_token_ids"]),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}, ["max_tokens"]),
        ("/v1/completions", {}, ["prompt"]),
        ("/detokenize", {"tokens": [1 << 31]}, ["tokens"]),
        ("/tokenize", {}, ["prompt"]),
    ],
)
def test_what_is_wrong_is_400_and_named(server: Served, path: str, body: dict[str, Any], fields: list[str]) -> None:
    with server.client() as c:
        r = c.post(path, json=body)
    assert r.status_code == 400, r.text
    error = r.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert all(field in error["message"] for field in fields), error


def test_a_prompt_that_is_too_long_has_its_own_code(server: Served) -> None:
    with server.client() as c:
        r = c.post("/v1/completions", json={"prompt": "word " * 3000})
        assert (r.status_code, r.json()["error"]["code"]) == (400, "context_length_exceeded")
        cut = c.post("/v1/completions", json={"prompt": "word " * 3000, "truncate_prompt_tokens": 100, "max_tokens": 1})
        assert cut.json()["usage"]["prompt_tokens"] == 100


def test_bodies_that_are_no_json_are_refused(server: Served) -> None:
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with server.client(headers={"content-type": "application/json"}) as c:
        for body in (b"", b"{", b"null", b"[]", b"\xff\xfe", deep, b'{"prompt": "\\ud800"}'):
            r = c.post("/v1/completions", content=body)
            assert r.status_code == 400, (body[:40], r.text)
            assert r.json()["error"]["message"]


def test_leaving_in_every_phase_frees_what_was_taken(server: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}

    def idle() -> bool:
        s = server.supervisor
        return s.n_live == 0 and s.gauge.n_running == 0 and s.gauge.kv_used == 0

    with (
        server.client() as c,
        c.stream("POST", "/v1/completions", json={**body, "stream": True}) as r,
    ):  # in the middle of a stream
        next(r.iter_lines())
    eventually(idle)
    with pytest.raises(Exception, match="timed out"), server.client() as c:  # while waiting for a whole answer
        c.post("/v1/completions", json=body, timeout=0.2)
    eventually(idle)


def test_status_routes(server: Served) -> None:
    with server.client() as c:
        assert c.get("/health").json() == {"status": "ok"}
        assert c.get("/ready").status_code == 200
        assert [m["id"] for m in c.get("/v1/models").json()["data"]] == ["lab-8m"]
        assert c.get("/v1/models/lab-8m").json()["max_model_len"] == 1024
        assert c.get("/v1/models/other").status_code == 404
        assert c.get("/no/such/route").json()["error"]["type"] == "not_found_error"
        assert c.get("/v1/chat/completions").status_code == 405
        ids = c.post("/tokenize", json={"prompt": "Hello there"}).json()["tokens"]
        assert c.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("Hello there")
        info = c.get("/tokenizer_info").json()
        assert info["eos_token"] == "<|im_end|>"
        assert "<|im_start|>" in info["chat_template"]
        text = c.get("/metrics").text
        assert 'paceline_request_success_total{finished_reason="stop",model_name="lab-8m"}' in text
        document = c.get("/openapi.json").json()
        assert "/v1/chat/completions" in document["paths"]


def test_a_template_of_the_operators_is_not_told() -> None:
    with served(config=replace(CONFIG, chat_template="plain")) as s, s.client() as c:
        assert "chat_template" not in c.get("/tokenizer_info").json()


def test_the_metrics_have_vllms_names_on_request() -> None:
    with served(observe={"vllm_metrics": True}) as s, s.client() as c:
        c.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
        text = c.get("/metrics").text
    assert "vllm:time_to_first_token_seconds_count" in text
    assert "paceline_time_to_first_token_seconds_count" in text


def test_models_are_loaded_on_demand_within_the_memory_for_all() -> None:
    with served() as s:
        loaded = s.server.models.loaded
        plan = loaded["lab-8m"].front.plan
        from paceline.server.models import Offer

        s.server.models.offers["second"] = Offer(("second",), None, CONFIG)
        with s.client() as c:
            assert (
                c.post("/v1/completions", json={"model": "second", "prompt": "x", "max_tokens": 2}).status_code == 200
            )
            assert set(loaded) == {"lab-8m", "second"}
            s.server.models._memory = int(2.5 * plan.peak_bytes)
            s.server.models.offers["third"] = Offer(("third",), None, CONFIG)
            assert c.post("/v1/completions", json={"model": "third", "prompt": "x", "max_tokens": 2}).status_code == 200
            assert set(loaded) == {"second", "third"}


def test_reload_finishes_what_runs_on_the_old_model_and_serves_the_new_one() -> None:
    with served(life={"drain": 20.0}) as s, s.client() as c:
        ask = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
        whole = c.post("/v1/completions", json=ask).json()
        with ThreadPoolExecutor(1) as pool, s.client() as other:
            running = pool.submit(lambda: other.post("/v1/completions", json=ask).json())
            eventually(lambda: s.supervisor.n_live == 1)
            first = s.supervisor
            told = c.post("/admin/reload", json={"path": "lab-1m"})
            assert told.status_code == 200, told.text
            assert s.supervisor is not first
            new = c.post("/v1/completions", json={**ask, "max_tokens": 5}).json()
            assert running.result()["choices"] == whole["choices"]
            assert new["system_fingerprint"] == told.json()["fingerprint"] != whole["system_fingerprint"]
        eventually(lambda: first.pid is None)
        refused = c.post("/admin/reload", json={"path": "/no/such/model"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "path"
        assert c.post("/v1/completions", json={**ask, "max_tokens": 5}).json()["choices"] == new["choices"]
        assert c.post("/admin/unload", json={"model": "lab-8m"}).status_code == 200
        assert s.server.models.loaded == {}
        assert c.post("/v1/completions", json={**ask, "max_tokens": 5}).json()["choices"] == new["choices"]


def test_wishes_of_a_request_reach_the_engine(server: Served) -> None:
    seen: list[Any] = []
    submit = server.supervisor.submit

    def spy(request: Any, *more: Any) -> Any:
        seen.append(request)
        return submit(request, *more)

    server.supervisor.submit = spy
    try:
        with server.client() as c:
            body = {
                "prompt": "x",
                "max_tokens": 1,
                "priority": 3,
                "cache_salt": "s",
                "ttft_target": 0.5,
                "tpot_target": 0.1,
            }
            assert c.post("/v1/completions", json=body).status_code == 200
            assert c.post("/v1/completions", json={**body, "ttft_target": 0}).status_code == 400
            assert c.post("/v1/completions", json={**body, "priority": -1}).status_code == 400
    finally:
        del server.supervisor.submit
    (request,) = seen
    assert (request.priority, request.salt, request.ttft_target, request.tpot_target) == (-3, "/s", 0.5, 0.1)


def test_a_suffix_goes_where_code_models_expect_it() -> None:
    import asyncio
    from types import SimpleNamespace

    import tokenizers

    from paceline import lab
    from paceline.checkpoints.tokenizer import Tokenizer
    from paceline.checkpoints.vocab import Vocabulary
    from paceline.server.api.completions import _around

    backend = tokenizers.Tokenizer.from_file(str(lab.path() / "tokenizer.json"))
    backend.add_special_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    tokenizer = Tokenizer(Vocabulary(backend, {}, frozenset()))

    async def encode(text: str, **how: Any) -> list[int]:
        return tokenizer.encode(text, **how)

    model: Any = SimpleNamespace(tokenizer=tokenizer, prompt=encode)
    tokens = asyncio.run(_around(model, "def f(", "<|fim_middle|> return x"))
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert text == "<|fim_prefix|>def f(<|fim_suffix|><|fim_middle|> return x<|fim_middle|>"
    assert tokens.count(backend.token_to_id("<|fim_middle|>")) == 1  # a marker in the client's text is text


def test_prompts_are_logged_only_if_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "my secret text", "max_tokens": 3, "temperature": 0}
    with caplog.at_level("INFO", "paceline.server"):
        with served() as s, s.client() as c:
            said = c.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert "secret" not in caplog.text + str([vars(r) for r in caplog.records])
        with served(observe={"log_prompts": True}) as s, s.client() as c:
            c.post("/v1/completions", json=body)
    (told,) = [r for r in caplog.records if r.message == "prompt and answer"]
    assert told.prompts == ["my secret text"]  # type: ignore[attr-defined]
    assert told.answers == [said]  # type: ignore[attr-defined]
