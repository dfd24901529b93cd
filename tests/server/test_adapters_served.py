"""Adapters behind the server: named as models, loaded at run time, kept through deaths of the worker."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import CONFIG, eventually, served

from paceline import lab
from paceline.analysis.synthetic import random_adapter
from paceline.core.config import EngineConfig
from paceline.core.types import SamplingParams
from paceline.llm import LLM

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = json.loads((lab.path() / "config.json").read_text())
    made = tmp_path_factory.mktemp("adapters")
    return [random_adapter(made / str(i), config, 4, seed=i) for i in range(2)]


def expected(folders: list[Path]) -> dict[str, str]:
    config = replace(CONFIG, adapters=tuple(f"a{i}={p}" for i, p in enumerate(folders)))
    with LLM(None, config) as llm:
        return {name: _answer(llm, name) for name in ("", "a0", "a1")}


def _answer(llm: LLM, adapter: str) -> str:
    return llm.generate(PROMPT, GREEDY, adapter=adapter)[0].text


def ask(c: Any, model: str) -> Any:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    r = c.post("/v1/completions", json=body)
    assert r.status_code == 200, r.text
    return r.json()


def test_adapters_are_models_of_their_own(folders: list[Path]) -> None:
    want = expected(folders)
    assert len(set(want.values())) == 3
    config: EngineConfig = replace(CONFIG, adapters=(f"a0={folders[0]}",), adapter_memory=64 << 20)
    with served(config=config) as s, s.client() as c:
        assert {m["id"]: m["parent"] for m in c.get("/v1/models").json()["data"]} == {"lab-8m": None, "a0": "lab-8m"}
        plain, first = ask(c, "lab-8m"), ask(c, "a0")
        assert (plain["choices"][0]["text"], first["choices"][0]["text"]) == (want[""], want["a0"])
        assert plain["system_fingerprint"] != first["system_fingerprint"]
        assert c.get(f"/plan/{first['system_fingerprint']}").json()["adapter"] == "a0"
        load = {"lora_name": "a1", "lora_path": str(folders[1])}
        assert c.post("/v1/load_lora_adapter", json=load).status_code == 200
        assert c.post("/v1/load_lora_adapter", json=load).status_code == 400
        assert c.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/no/such"}).status_code == 400
        assert ask(c, "a1")["choices"][0]["text"] == want["a1"]
        os.kill(s.supervisor.pid, signal.SIGKILL)
        eventually(lambda: s.supervisor.state == "ready" and s.supervisor.n_restarts == 1)
        assert [ask(c, m)["choices"][0]["text"] for m in ("lab-8m", "a0", "a1")] == [want[""], want["a0"], want["a1"]]
        assert c.post("/v1/unload_lora_adapter", json={"lora_name": "a0"}).status_code == 200
        assert c.post("/v1/completions", json={"model": "a0", "prompt": "x"}).status_code == 404
        assert c.post("/v1/unload_lora_adapter", json={"lora_name": "a0"}).status_code == 404
