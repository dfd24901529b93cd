"""The command line as a person and a program use it: output shapes, exit codes, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def paceline(
    *args: str, stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline", *args], input=stdin if stdin is not None else "", capture_output=True, text=True,
        timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}, check=False,
    )  # fmt: skip


def answer(*args: str, **options: Any) -> Any:
    done = paceline(*args, "--json", **options)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


SMALL = ("-m", "lab-1m", "-c", "512")


def test_run_prints_one_object() -> None:
    got = answer(
        "run", *SMALL, "--prompt", "def add(a, b):", "-n", "8", "--temperature", "0", "--ignore-eos", "--logprobs", "1"
    )
    assert {"prompt_token_ids", "token_ids", "text", "logprobs", "finish_reason", "usage", "timing"} <= set(got)
    assert len(got["token_ids"]) == len(got["logprobs"]) == got["usage"]["completion_tokens"] == 8
    assert all(lp <= 0 for lp in got["logprobs"])
    assert got["finish_reason"] == "length"
    assert got["usage"]["prompt_tokens"] == len(got["prompt_token_ids"])


def test_run_streams_the_same_text_and_reports_speed() -> None:
    args = ("run", *SMALL, "--prompt", "import os", "-n", "16", "--temperature", "0")
    done = paceline(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == answer(*args)["text"].rstrip("\n")
    for part in ("tokens/s", "first token", "memory"):
        assert part in done.stderr


def test_stdin_and_environment_and_seed() -> None:
    args = ("run", *SMALL, "-n", "8", "--seed", "3", "--temperature", "1.0")
    first = answer(*args, stdin="class Stack:")
    assert first == {
        **answer(*args, stdin="class Stack:"),
        "timing": first["timing"],
        "peak_memory_bytes": first["peak_memory_bytes"],
    }
    assert (
        answer("run", "-n", "2", "x", env={"PACELINE_MODEL": "lab-1m", "PACELINE_CONTEXT": "256"})["model"] == "lab-1m"
    )


def test_the_default_model_answers_in_chat() -> None:
    got = answer("run", "-c", "512", "What is the capital of France?", "--temperature", "0", "-n", "24")
    assert got["finish_reason"] == "stop"
    assert "Paris" in got["text"]


def test_chat_keeps_history_and_survives_errors(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    script = (
        f"What is 2 + 3?\n/nonsense\n/set temperature hot\n/save {file}\n/load {tmp_path / 'none'}\n/stats\n/exit\n"
    )
    done = paceline("chat", *SMALL, "--temperature", "0", "-n", "16", stdin=script)
    assert done.returncode == 0, done.stderr
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    assert "no such command" in done.stderr
    assert "temperature" in done.stderr
    assert "No such file" in done.stderr


def test_quantize_then_run(tmp_path: Path) -> None:
    out = tmp_path / "q"
    done = answer("quantize", "lab-1m", str(out), "--format", "int8")
    assert done["bits_per_weight"] < 9.5
    got = answer("run", "-m", str(out), "-c", "512", "--prompt", "def add(a, b):", "-n", "8", "--temperature", "0")
    direct = answer("run", *SMALL, "--format", "int8", "--prompt", "def add(a, b):", "-n", "8", "--temperature", "0")
    assert got["token_ids"] == direct["token_ids"]
    again = paceline("quantize", "lab-1m", str(out), "--format", "int8")
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_eval(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n\n" * 60)
    got = answer("eval", "perplexity", *SMALL, "--file", str(text), "--window", "128", "--stride", "64")
    assert got["perplexity"] > 1
    assert (got["context"], got["stride"]) == (128, 64)
    assert got["tokens"] > 300
    same = answer("eval", "kl", *SMALL, "--file", str(text), "--max-tokens", "300")
    assert same["mean_kl"] == 0.0
    assert same["top1_agreement"] == 1.0
    less = answer("eval", "kl", *SMALL, "--file", str(text), "--max-tokens", "300", "--format", "int4")
    assert 0 < less["mean_kl"] < 2
    found = answer("eval", "recall", *SMALL, "--file", str(text), "--distance", "128", "--n", "4")
    assert found[0]["asked"] == 4


def test_explain_reads_no_weights_and_names_every_problem() -> None:
    plan = answer("explain", "-c", "512")
    assert plan["context"] == 512
    assert plan["techniques"] == ["serving/radix", "serving/splitfuse", "output/llguidance"]
    args = ("--dtype", "fp7", "--isa", "mmx", "--use", "kvcache/nothing", "--format", "int5", "--max-rows", "0")
    bad = paceline("explain", *SMALL[:2], *args)
    assert bad.returncode == 2
    for part in ("dtype = 'fp7'", "isa = 'mmx'", "kvcache/nothing", "int5", "max_rows = 0"):
        assert part in bad.stderr
    assert "Traceback" not in bad.stderr


def test_bench_prints_one_flat_object() -> None:
    got = answer("bench", *SMALL, "--prompt", "40", "--batch", "2", "--tokens", "3", "--runs", "2", "--verify", "4")
    flat = ("prefill_tok_s", "decode_tok_s", "load_s", "peak_rss_bytes", "weight_bytes")
    assert all(got[name] > 0 for name in flat)
    assert (got["prompt"], got["batch"]) == (40, 2)
    assert [c["work"] for c in got["cells"]] == ["prefill 40", "decode b2"]
    assert got["cells"][1]["tokens_per_s"] == got["decode_tok_s"]
    assert got["verify"][0]["draft"] == 4
    assert {"isa", "formats", "threads", "kv_dtype"} <= set(got["kernels"])
    if got["kernels"]["backend"] == "native":
        assert got["bandwidth_share"] > 0
        assert got["peak_share"] > 0


@pytest.mark.parametrize("kind", ["models", "techniques", "formats", "machines"])
def test_lists(kind: str) -> None:
    rows = answer("list", kind)
    assert rows
    assert all("name" in r for r in rows)
    if kind == "techniques":
        assert {"name", "area", "seams", "paper", "needs", "breaks"} <= set(rows[0])


def test_doctor() -> None:
    found = answer("doctor")
    assert found["cores"]["used"] >= 1
    assert "chosen" in found["isa"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("run", "-m", "/nonexistent/model", "--prompt", "x"), "/nonexistent/model"),
        (("run", *SMALL, "--prompt", "x", "--temperature", "-1"), "temperature = -1"),
        (("run", *SMALL, "--prompt", "x", "--top-p", "7"), "top_p = 7"),
        (("run", *SMALL, "--prompt", "x", "-n", "0"), "max_tokens = 0"),
        (("run", *SMALL, "a", "--prompt", "b"), "given twice"),
        (("run", *SMALL, "--prompt", "x " * 2000), "exceed"),
        (("run", "-m", "lab-1m", "-c", "99999999", "--prompt", "x"), "context = 99999999"),
        (("run", *SMALL, "--prompt", "x", "--format", "int5"), "int5"),
        (("run", *SMALL, "--prompt", "x", "--kv-memory", "lots"), "kv_memory = 'lots'"),
        (("run", *SMALL, "--prompt", "x", "--chat-template", "/no/such.jinja", "--chat"), "/no/such.jinja"),
        (("eval", "perplexity", *SMALL, "--file", "/no/such/file"), "/no/such/file"),
        (("bench", "--shape", "gpt-9"), "gpt-9"),
        (("quantize", "lab-1m", "/proc/none/x"), "/proc/none"),
    ],
)
def test_mistakes_are_told_and_exit_2(args: tuple[str, ...], says: str) -> None:
    done = paceline(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    told = json.loads(paceline(*args, "--json").stdout)
    assert says in told["error"]["message"]
