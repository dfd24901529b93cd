"""Calls and what happens to the server while they are in hand: replacement of the model, clients that leave, numbers that no type holds."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import Served, eventually, served

from paceline.server import wire
from paceline.server.metrics import Metrics

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def summary(registry: Any) -> dict[str, float]:
    """Every sample by name and labels."""
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in s.labels.items())}}}": s.value
        for family in registry.collect()
        for s in family.samples
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(life={"drain": 20.0}) as s:
        yield s


def model(server: Served) -> Any:
    return next(iter(server.server.models.loaded.values()))


def test_a_call_that_nothing_was_computed_for_yet_survives_a_reload(server: Served) -> None:
    old, began, go = model(server), threading.Event(), threading.Event()
    check = old.check_constraint

    async def slow(params: Any) -> None:
        import asyncio

        began.set()
        await asyncio.to_thread(go.wait, 20)
        await check(params)

    old.check_constraint = slow
    with server.client() as http, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(http.post, COMPLETIONS, json={"prompt": "print", "max_tokens": 4, "temperature": 0})
        assert began.wait(10)
        assert http.post("/admin/reload", json={}).status_code == 200
        assert model(server) is not old
        assert old.n_calls == 1
        go.set()
        answer = asked.result(30)
        assert answer.status_code == 200, answer.text
        eventually(lambda: old.supervisor.state == "stopping" and old.n_calls == 0)
        again = http.post(COMPLETIONS, json={"prompt": "print", "max_tokens": 4, "temperature": 0}).json()
    assert answer.json()["choices"] == again["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_way_a_call_ends_takes_the_model_out_of_its_hand(server: Served, stream: bool) -> None:
    with server.client() as http:
        assert http.post(CHAT, json={"messages": QUESTION, "max_tokens": 3, "stream": stream}).status_code == 200
        assert http.post(COMPLETIONS, json={"prompt": "a", "n": 99, "stream": stream}).status_code == 400
        with http.stream(
            "POST", COMPLETIONS, json={"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
        ):
            assert model(server).n_calls == 1
    eventually(lambda: model(server).n_calls == 0 and model(server).supervisor.n_live == 0)


def test_calls_may_have_the_same_id(server: Served) -> None:
    body = {"prompt": "print", "max_tokens": 200, "ignore_eos": True, "seed": 1}
    with server.client(headers={"x-request-id": "same"}) as http, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: http.post(COMPLETIONS, json=body), range(3)))
    assert [a.status_code for a in answers] == [200] * 3
    assert len({json.dumps(a.json()["choices"]) for a in answers}) == 1


def test_a_client_that_leaves_is_no_fault(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with server.client() as http, http.stream("GET", "/health"):
        pass
    body = json.dumps({"prompt": "print", "max_tokens": 900, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as s:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        s.sendall(head.encode() + b"\r\n\r\n" + body)
        eventually(lambda: server.supervisor.n_live == 1)
    eventually(lambda: server.supervisor.n_live == 0 and model(server).n_calls == 0)
    eventually(lambda: any(getattr(r, "status", None) == 499 for r in caplog.records))
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", "9" * 400),
        ("seed", "9" * 400),
        ("n", "-" + "9" * 400),
        ("top_k", "9" * 6000),
        ("priority", "9" * 30),
        ("max_tokens", "9" * 400),
        ("logit_bias", '{"5": 1e400}'),
        ("prompt", "[" + "9" * 30 + "]"),
    ],
)
def test_numbers_beyond_every_type_are_the_clients_mistake(server: Served, field: str, value: str) -> None:
    body = {"prompt": '"a"', field: value}
    text = "{" + ", ".join(f'"{k}": {v}' for k, v in body.items()) + "}"
    with server.client() as http:
        found = http.post(COMPLETIONS, content=text, headers={"content-type": "application/json"})
    assert found.status_code == 400, found.text
    assert field in found.json()["error"]["message"]


def test_problems_of_other_fields_do_not_make_a_bias_wrong(server: Served) -> None:
    with server.client() as http:
        found = http.post(COMPLETIONS, json={"prompt": "a", "logit_bias": {"5": 1}, "top_k": "x"})
    assert found.status_code == 400
    assert "logit_bias" not in found.json()["error"]["message"]


def test_a_streams_token_ids_are_all_there_although_text_is_held_back(server: Served) -> None:
    body = {
        "messages": QUESTION, "max_tokens": 60, "ignore_eos": True, "seed": 7, "temperature": 1.3, "return_token_ids": True,
        "logit_bias": {str(i): 10 for i in range(130, 230)}, "stop": ["never this"],
    }  # fmt: skip
    with server.client() as http:
        whole = http.post(CHAT, json=body).json()["choices"][0]
        lines = http.post(CHAT, json={**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [c for chunk in chunks for c in chunk["choices"]]
    assert [t for c in choices for t in c.get("token_ids", [])] == whole["token_ids"]
    assert "".join(c["delta"].get("content") or "" for c in choices) == whole["message"]["content"]
    assert any(not c["delta"] for c in choices[:-1]), "no text was held back"


def test_hostile_constraints_wait_among_themselves(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    grammars = model(server).front.grammars
    monkeypatch.setattr(grammars, "check", lambda constraint: go.wait(30))
    with server.client() as http, ThreadPoolExecutor(50) as pool:
        bodies = [{"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": f"a{i}"}} for i in range(50)]
        asked = [pool.submit(http.post, COMPLETIONS, json=b) for b in bodies]
        eventually(lambda: model(server).n_calls == 50)
        assert http.post(CHAT, json={"messages": QUESTION, "max_tokens": 3}).status_code == 200  # renders in a thread
        assert not any(a.done() for a in asked)
        go.set()
        assert {a.result(30).status_code for a in asked} == {200}


def test_constraints_that_passed_are_not_tried_again(server: Served) -> None:
    body = {"prompt": "a", "max_tokens": 5, "structured_outputs": {"regex": "[a-c]{3}"}}
    with server.client() as http:
        assert http.post(COMPLETIONS, json=body).status_code == 200
        model(server).front.grammars._trial.why_not = None  # would raise
        try:
            assert http.post(COMPLETIONS, json=body).status_code == 200
        finally:
            del model(server).front.grammars._trial.why_not


def test_totals_of_a_model_that_is_being_replaced_are_counted_once() -> None:
    metrics = Metrics()
    for old, new in ((100, 5), (101, 9), (102, 12)):
        for source, steps in ((0, old), (1, new)):
            metrics.stepped("m", wire.Gauge(0, 0, 0.0, {"steps": steps}), source)
    assert summary(metrics.registry)["paceline_engine_steps_total{model_name=m}"] == 102 + 12


@pytest.mark.parametrize(("path", "status"), [("/v1/nowhere", 404), ("/health", 405)])
def test_a_body_that_nobody_wants_does_not_cost_the_client_the_answer(server: Served, path: str, status: int) -> None:
    """The body comes after the head: were the connection closed between them, the client would get a reset instead of the answer."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as s:
        s.settimeout(10)
        for _ in range(2):  # and the connection lives on
            s.sendall(head)
            time.sleep(0.1)
            s.sendall(b'{"a": 12}')
            answer = b""
            while not answer.endswith(b"}}"):  # head and body may come apart
                answer += s.recv(1 << 16)
            assert answer.startswith(f"HTTP/1.1 {status}".encode())
            assert b"connection: close" not in answer.lower()


@pytest.mark.parametrize(
    "body", [{"prompt": "word " * 200_000}, {"messages": [{"role": "user", "content": "word " * 200_000}]}]
)
def test_a_text_that_cannot_fit_is_refused_after_its_beginning(server: Served, body: dict[str, Any]) -> None:
    tokenizer, encoded = model(server).tokenizer, []
    encode = tokenizer.encode

    def counting(text: str, **how: Any) -> list[int]:
        encoded.append(len(text))
        return list(encode(text, **how))

    tokenizer.encode = counting
    try:
        with server.client() as http:
            found = http.post(CHAT if "messages" in body else COMPLETIONS, json=body)
    finally:
        del tokenizer.encode
    assert found.status_code == 400, found.text
    assert found.json()["error"]["code"] == "context_length_exceeded"
    assert sum(encoded) < 50_000
