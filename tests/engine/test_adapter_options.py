"""Adapters by the options of a model: names, memory and what the plan says; the Python interface and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline import lab
from paceline.analysis.synthetic import random_adapter
from paceline.core.errors import CheckpointError, ConfigError, RequestError
from paceline.core.types import GREEDY
from paceline.llm import LLM

OPTIONS: dict[str, Any] = {"context": 256, "kv_memory": 8 << 20}
PARAMS = GREEDY.with_(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((lab.path("lab-1m") / "config.json").read_text())
    return random_adapter(tmp_path_factory.mktemp("adapter"), config, 4, seed=1, lora_alpha=64)


def test_loaded_at_start(folder: Path) -> None:
    with LLM("lab-1m", **OPTIONS) as plain, LLM("lab-1m", adapters=[f"a={folder}"], **OPTIONS) as llm:
        assert llm.plan.adapter_bytes == llm.engine.adapters.n_bytes > 0
        assert llm.plan.describe()["adapter_bytes"] == llm.plan.adapter_bytes
        assert llm.plan.peak_bytes - plain.plan.peak_bytes == llm.plan.adapter_bytes
        (want,) = plain.generate(["def f("], PARAMS)
        assert llm.generate(["def f("], PARAMS)[0].token_ids == want.token_ids
        adapted = llm.generate(["def f("], PARAMS, adapter="a")[0].token_ids
        assert adapted != want.token_ids
        streamed = [t for d in llm.stream("def f(", PARAMS, adapter="a") for t in d.token_ids]
        assert streamed == adapted
        tokens = llm.tokens("def f(x):")
        assert abs(llm.score([tokens])[0] - llm.score([tokens], adapter="a")[0]).max() > 1e-3
        with pytest.raises(RequestError, match="'b': is not loaded; loaded are: a"):
            llm.generate(["x"], PARAMS, adapter="b")
        with pytest.raises(RequestError, match="larger adapter_memory"):
            llm.load_adapter("b", folder)


def test_loaded_later(folder: Path) -> None:
    with LLM("lab-1m", adapter_memory=1 << 20, adapter_dtype="bfloat16", **OPTIONS) as llm:
        assert llm.plan.adapter_bytes == 1 << 20
        llm.load_adapter("a", folder)
        first = llm.generate(["def f("], PARAMS, adapter="a")[0].token_ids
        llm.unload_adapter("a")
        with pytest.raises(RequestError, match="loaded are: none"):
            llm.generate(["def f("], PARAMS, adapter="a")
        llm.load_adapter("b", folder)
        assert llm.generate(["def f("], PARAMS, adapter="b")[0].token_ids == first
    with LLM("lab-1m", **OPTIONS) as llm, pytest.raises(RequestError, match=r"0\.0 MB are free for adapters"):
        llm.load_adapter("a", folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapters": ("a",)}, "adapters = 'a': must be name=path"),
        ({"adapters": ("a=",)}, "must be name=path"),
        ({"adapters": ("=x",)}, "name = '': must be 1 to 128 printable"),
        ({"adapters": ("a=x", "a=y")}, "'a' is given more than once"),
        ({"adapter_dtype": "int8"}, "adapter_dtype = 'int8': must be auto, float32, bfloat16"),
        ({"adapter_memory": -1}, "adapter_memory = -1"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LLM("lab-1m", **OPTIONS, **options)


def test_what_cannot_be_loaded_is_refused_before_a_weight_is_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        LLM("lab-1m", adapters=(f"a={tmp_path / 'none'}",), **OPTIONS)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        LLM("lab-8m", adapters=(f"a={folder}",), **OPTIONS)
    with pytest.raises(ConfigError, match="adapter_memory = 1000: the adapters to be loaded take"):
        LLM("lab-1m", adapters=(f"a={folder}",), adapter_memory=1000, **OPTIONS)


def test_the_command_line_uses_the_first(folder: Path) -> None:
    def run(*more: str) -> list[int]:
        command = [
            sys.executable,
            "-m",
            "paceline",
            "run",
            "-m",
            "lab-1m",
            "-c",
            "256",
            "--prompt",
            "def f(",
            "-n",
            "6",
            "--temperature",
            "0",
            "--ignore-eos",
            "--raw",
            "--json",
            *more,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ}, check=True)
        return list(json.loads(done.stdout)["token_ids"])

    with LLM("lab-1m", adapters=(f"a={folder}",), **OPTIONS) as llm:
        want = [llm.generate(["def f("], PARAMS, adapter=name)[0].token_ids for name in ("", "a")]
    assert [run(), run("--adapter", f"a={folder}")] == want
