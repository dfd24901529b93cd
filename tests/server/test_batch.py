"""`paceline batch`: every request answered once, also after an interruption, and equal ones computed once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.core.errors import RequestError
from paceline.server import batch

SYSTEM = {"role": "system", "content": "Answer briefly and in order. " * 12}


def line(i: int, **body: Any) -> dict[str, Any]:
    given = {
        "model": "lab-8m",
        "messages": [SYSTEM, {"role": "user", "content": f"What is {i} + {i}?"}],
        "max_tokens": 8,
        **body,
    }
    return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": given}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return path


def run(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "paceline",
        "batch",
        str(path),
        "--json",
        "--threads",
        "1",
        "--context",
        "512",
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}


def answers(path: Path) -> dict[str, Any]:
    found = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
    assert len({a["custom_id"] for a in found}) == len(found)
    return {a["custom_id"]: a for a in found}


def test_a_file_is_answered_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    lines = [line(i, seed=i) for i in range(8)]
    path, out = write(tmp_path / "all.jsonl", lines), tmp_path / "all.out.jsonl"
    code, told = run(path)
    assert (code, told["requests"], told["failed"]) == (0, 8, 0)
    assert told["cached_tokens"] > 0
    whole = answers(out)
    kept = out.read_bytes().splitlines(keepends=True)[:3]
    out.write_bytes(b"".join(kept) + b'{"id": "batch_req_half')  # killed in the middle of the fourth
    code, told = run(path)
    assert (code, told["requests"], told["skipped"]) == (0, 5, 3)
    again = answers(out)
    assert set(again) == set(whole)
    for id, a in again.items():
        assert a["response"]["body"]["choices"] == whole[id]["response"]["body"]["choices"]
    assert run(path)[1]["requests"] == 0


def test_equal_requests_are_computed_once_if_their_answer_is_certain(tmp_path: Path) -> None:
    same = [{**line(1, temperature=0), "custom_id": f"same{i}"} for i in range(4)]
    free = [{**line(1), "custom_id": f"free{i}"} for i in range(2)]
    code, told = run(write(tmp_path / "x.jsonl", same + free))
    assert (code, told["requests"], told["computed_once"]) == (0, 6, 3)
    found = answers(tmp_path / "x.out.jsonl")
    assert len({found[f"same{i}"]["response"]["body"]["id"] for i in range(4)}) == 1
    assert len({found[f"free{i}"]["response"]["body"]["id"] for i in range(2)}) == 2


def test_a_request_that_fails_is_told_and_the_others_are_answered(tmp_path: Path) -> None:
    code, told = run(write(tmp_path / "x.jsonl", [line(1), line(2, temperature="hot")]))
    assert (code, told["failed"]) == (1, 1)
    bad = answers(tmp_path / "x.out.jsonl")["r2"]
    assert bad["response"]["status_code"] == 400
    assert "temperature" in bad["error"]["message"]


def test_files_that_are_wrong_are_refused_with_every_line(tmp_path: Path) -> None:
    lines = [line(1), line(1), {"custom_id": "x"}, {**line(3), "url": "/admin"}, line(4, stream=True)]
    with pytest.raises(RequestError) as e:
        batch.read(write(tmp_path / "x.jsonl", lines))
    for text in ("line 2", "twice", "line 3", "line 4", "/admin", "line 5", "stream"):
        assert text in str(e.value)
    with pytest.raises(RequestError, match="no requests"):
        batch.read(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(RequestError, match="cannot be read"):
        batch.read(tmp_path / "missing.jsonl")
    (tmp_path / "other.txt").write_text("hello\n")
    with pytest.raises(RequestError, match="no batch output"):
        batch.done_before(tmp_path / "other.txt")


def test_common_beginnings_lie_together() -> None:
    kinds = [batch.Line(str(i), batch.URLS[1], {"prompt": f"{'ab'[i % 2]} text {i}"}) for i in range(10)]
    order = [t.line.body["prompt"][0] for t in batch.tasks(kinds)]
    assert order == sorted(order)
