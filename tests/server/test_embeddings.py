"""Vectors, scores and ranks over HTTP: the same numbers as the library's, in the shapes that clients read."""

from __future__ import annotations

import base64
import json
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import ALICE, Running
from served import CONFIG

from paceline.checkpoints.pooling import read_pooling
from paceline.llm import LLM
from paceline.server.api import embeddings

TEXTS = ["def add(a, b): return a + b", "The quick brown fox", "def sum(x, y): return x + y"]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    llm = LLM(None, CONFIG)
    raw = {pool: llm.embed(TEXTS, pool) for pool in ("mean", "last")}
    return {pool: v / np.linalg.norm(v, axis=1, keepdims=True) for pool, v in raw.items()}


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_are_the_library_s(client: openai.OpenAI, expected: dict[str, np.ndarray], encoding: Any) -> None:
    answer = client.embeddings.create(model="lab-8m", input=TEXTS, encoding_format=encoding)
    rows = [
        np.frombuffer(base64.b64decode(d.embedding), "<f4") if encoding == "base64" else d.embedding  # type: ignore[arg-type]
        for d in answer.data
    ]
    assert [d.index for d in answer.data] == [0, 1, 2]
    np.testing.assert_allclose(rows, expected["mean"], atol=2e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(TEXTS)


def test_the_client_s_default_and_pooling(client: openai.OpenAI, expected: dict[str, np.ndarray]) -> None:
    """It asks for base64 and decodes it."""
    answer = client.embeddings.create(model="lab-8m", input=TEXTS[1], extra_body={"pooling": "last"})
    np.testing.assert_allclose(answer.data[0].embedding, expected["last"][1], atol=2e-6)


def test_token_ids(http: httpx.Client, expected: dict[str, np.ndarray]) -> None:
    ids = [http.post("/tokenize", json={"prompt": t}).json()["tokens"] for t in TEXTS]
    many = http.post("/v1/embeddings", json={"input": ids}).json()["data"]
    one = http.post("/v1/embeddings", json={"input": ids[0]}).json()["data"]
    np.testing.assert_allclose([d["embedding"] for d in many], expected["mean"], atol=2e-6)
    np.testing.assert_allclose(one[0]["embedding"], expected["mean"][0], atol=2e-6)


def test_more_inputs_than_the_queue_takes(server: Running, http: httpx.Client) -> None:
    """A large batch waits in its own call and comes back in order."""
    texts = [f"line {i % 7}" for i in range(embeddings.MAX_INPUTS)]
    assert len(texts) > server.server.settings.bounds.max_queue
    data = http.post("/v1/embeddings", json={"input": texts}).json()["data"]
    rows = np.array([d["embedding"] for d in data])
    assert rows.shape[0] == len(texts)
    np.testing.assert_allclose(rows, rows[np.arange(len(texts)) % 7], atol=2e-6)
    assert not np.allclose(rows[0], rows[1], atol=1e-3)
    assert server.model.supervisor.n_live == 0


def test_a_reader_who_leaves(server: Running) -> None:
    """Ends the work of a batch."""
    begun: list[str] = []
    supervisor = server.model.supervisor
    submit = supervisor.submit
    supervisor.submit = lambda r, queue: (begun.append(r.id), submit(r, queue))[1]
    try:
        body = json.dumps({"input": ["some text " * 20] * 2000})
        headers = {"authorization": f"Bearer {ALICE}", "content-type": "application/json"}
        connection = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/embeddings", body, headers)
        server.wait_for(lambda: bool(begun))
        connection.close()
        server.wait_for(lambda: not supervisor.n_live)
    finally:
        del supervisor.submit
    assert 0 < len(begun) < 2000


def test_score(http: httpx.Client, expected: dict[str, np.ndarray]) -> None:
    v = expected["mean"]
    one = http.post("/v1/score", json={"model": "lab-8m", "text_1": TEXTS[0], "text_2": TEXTS}).json()
    assert [d["object"] for d in one["data"]] == ["score"] * 3
    np.testing.assert_allclose([d["score"] for d in one["data"]], v @ v[0], atol=1e-5)
    pairs = http.post("/score", json={"queries": TEXTS, "documents": TEXTS[::-1]}).json()
    np.testing.assert_allclose([d["score"] for d in pairs["data"]], (v * v[::-1]).sum(1), atol=1e-5)


def test_rerank(http: httpx.Client, expected: dict[str, np.ndarray]) -> None:
    v = expected["mean"]
    body = {"query": TEXTS[0], "documents": [TEXTS[1], {"text": TEXTS[2]}]}
    for path in ("/v1/rerank", "/rerank"):
        answer = http.post(path, json=body).json()
        scores = v[1:] @ v[0]
        assert [r["index"] for r in answer["results"]] == np.argsort(-scores).tolist()
        np.testing.assert_allclose([r["relevance_score"] for r in answer["results"]], np.sort(scores)[::-1], atol=1e-5)
        assert answer["results"][0]["document"] == {"text": TEXTS[1 + answer["results"][0]["index"]]}
    short = http.post("/rerank", json={**body, "top_n": 1, "return_documents": False}).json()["results"]
    assert len(short) == 1
    assert "document" not in short[0]


WRONG = [
    ("/v1/embeddings", {}, ["input: is missing"]),
    ("/v1/embeddings", {"input": []}, ["input: must be a text"]),
    ("/v1/embeddings", {"input": ""}, ["input: is empty"]),
    ("/v1/embeddings", {"input": ["a", "", "b", ""]}, ["input[1]: is empty", "input[3]: is empty"]),
    ("/v1/embeddings", {"input": ["a", [1]]}, ["input[0]: must be"]),
    ("/v1/embeddings", {"input": [[1], "a", 3.5]}, ["input[1]: must be", "input[2]: must be"]),
    ("/v1/embeddings", {"input": [4096]}, ["4096", "vocabulary"]),
    ("/v1/embeddings", {"input": [-1]}, ["-1", "vocabulary"]),
    ("/v1/embeddings", {"input": [True]}, ["input[0]: must be"]),
    ("/v1/embeddings", {"input": ["a"] * 2049}, ["input: must be a text", "2048"]),
    ("/v1/embeddings", {"input": [[5] * 1000] * 301}, ["301000 tokens in all"]),
    ("/v1/embeddings", {"input": "a", "dimensions": 128}, ["dimensions = 128", "256"]),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, ["encoding_format"]),
    ("/v1/embeddings", {"input": "a", "pooling": "cls", "images": 1}, ["pooling", "images: is not supported"]),
    ("/score", {"text_1": "a"}, ["text_2: is missing"]),
    ("/score", {"text_1": "a", "queries": "b"}, ["text_1: give text_1 and text_2, or"]),
    ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, ["text_1: 2 texts for 3"]),
    ("/rerank", {"query": "a", "documents": []}, ["documents"]),
    ("/rerank", {"query": "a", "documents": ["b", ""]}, ["documents[1]: is empty"]),
    ("/rerank", {"query": "a", "documents": [{"text": "b", "image": "c"}]}, ["documents", "image"]),
    ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1, "rank_fields": []}, ["top_n", "rank_fields"]),
]


@pytest.mark.parametrize(("path", "body", "words"), WRONG)
def test_refused(http: httpx.Client, path: str, body: dict[str, Any], words: list[str]) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    for word in words:
        assert word in answer.json()["error"]["message"]


def test_too_long(http: httpx.Client) -> None:
    error = http.post("/v1/embeddings", json={"input": [5] * 1025}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert http.post("/v1/embeddings", json={"input": [5] * 1024}).status_code == 200


def test_pooling_of_a_folder(tmp_path: Path) -> None:
    def written(modules: Any = None, **pooling: Any) -> Any:
        if modules is not None:
            (tmp_path / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return read_pooling(tmp_path)

    assert read_pooling(tmp_path).kind == "mean"
    assert written(pooling_mode_lasttoken=True, pooling_mode_mean_tokens=False).kind == "last"
    assert written(pooling_mode="lasttoken").kind == "last"
    assert written(pooling_mode_mean_tokens=True).kind == "mean"
    assert "pooling_mode_cls_token" in written(pooling_mode_cls_token=True).why_not
    both = written(pooling_mode_mean_tokens=True, pooling_mode_lasttoken=True)
    assert "not supported" in both.why_not
    base = "sentence_transformers.models."
    dense = [{"path": "", "type": f"{base}Transformer"}, {"path": "2_Dense", "type": f"{base}Dense"}]
    assert "'Dense'" in written(dense).why_not
    assert "no folder" in written([{"path": "../..", "type": f"{base}Pooling"}]).why_not
    assert "cannot be read" in written("{").why_not
    assert str(tmp_path) not in written("{").why_not
    (tmp_path / "modules.json").unlink()
    (tmp_path / "1_Pooling" / "config.json").write_text("[")
    assert read_pooling(tmp_path).why_not is not None
