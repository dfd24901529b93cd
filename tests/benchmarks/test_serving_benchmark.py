"""The parts of benchmarks/serving.py that need no peer: load, answers, arithmetic, report; the client over a socket."""

from __future__ import annotations

import asyncio
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers_report
import serving
import serving_client as client
import serving_engines as engines
import serving_report as report

from paceline.analysis.traffic import Arrival

TRACE = [Arrival(10.0 * i + i % 3, 100 + i % 900, 5 + i % 7, (0, i + 1)) for i in range(2000)]
TARGETS = client.Targets(1.0, 0.1)


def done(at: float, first: float, each: float, n: int = 5) -> client.Answer:
    return client.Answer(Arrival(at, 10, n), [at + first + each * i for i in range(n)], n)


# ---- load


def test_a_window_has_its_rate_and_begins_at_zero() -> None:
    part = client.window(TRACE, 101, 4.0, turn=3)
    assert len(part) == 101
    assert part[0].at_s == 0
    assert part[-1].at_s == pytest.approx(100 / 4.0)
    assert [a.n_prompt for a in part] == [a.n_prompt for a in TRACE[3 * 997 % 1900 :][:101]]


def test_burstiness_is_kept() -> None:
    """Gaps keep their proportions."""
    part = client.window(TRACE, 50, 2.0, turn=0)
    ratio = part[1].at_s / TRACE[1].at_s
    assert [a.at_s for a in part] == pytest.approx([t.at_s * ratio for t in TRACE[:50]])


def test_turns_share_no_blocks_and_requests_of_a_turn_do() -> None:
    first, second = (client.window(TRACE, 20, 1.0, turn) for turn in (0, 1))
    assert not {i for a in first for i in a.hash_ids} & {i for a in second for i in a.hash_ids}
    assert len({a.hash_ids[0] for a in first}) == 1


def test_jobs_are_the_same_for_every_engine_but_for_its_fields() -> None:
    part = [Arrival(0.0, 7, 3), Arrival(1.0, 9, 4)]
    a, b = (
        [json.loads(j.body) for j in client.jobs(part, 1000, 5, fields)] for fields in ({}, {"samplers": ["top_k"]})
    )
    assert [x["prompt"] for x in a] == [x["prompt"] for x in b]
    assert [len(x["prompt"]) for x in a] == [7, 9]
    assert [x["max_tokens"] for x in a] == [3, 4]
    assert all(0 <= t < 1000 for x in a for t in x["prompt"])
    assert a[0]["ignore_eos"] is True
    assert b[0]["samplers"] == ["top_k"]
    assert [x["prompt"] for x in a] != [json.loads(j.body)["prompt"] for j in client.jobs(part, 1000, 6, {})]


# ---- answers


def test_events_across_pieces_and_line_endings() -> None:
    received = [(1.0, b": hello\n\nda"), (2.0, b"ta: one\r\n"), (3.0, b"\r\ndata:two\ndata: lines\n\nrest")]
    assert client.events(received) == [(3.0, "one"), (3.0, "two\nlines")]


def test_events_that_end_with_a_split_line_ending() -> None:
    assert client.events([(1.0, b"data: x\r\n\r"), (2.0, b"\ndata: y\n\n")]) == [(2.0, "x"), (2.0, "y")]


def sse(*values: Any) -> bytes:
    return b"".join(b"data: " + (v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n\n" for v in values)


def test_an_answer_counts_text_and_the_servers_tokens() -> None:
    pieces = [(1.0, sse({"choices": [{"text": "a"}]})), (2.0, sse({"choices": [{"text": ""}]}))]
    pieces += [
        (3.0, sse({"choices": [{"text": "b"}]})),
        (4.0, sse({"choices": [], "usage": {"completion_tokens": 3}}, b"[DONE]")),
    ]
    a = client.read_answer(client.Answer(Arrival(0.5, 1, 3)), 200, pieces)
    assert (a.times, a.n_tokens, a.error) == ([1.0, 3.0], 3, "")
    assert (a.ttft, a.tpot, a.e2e, a.gaps) == (0.5, 1.0, 2.5, [2.0])


@pytest.mark.parametrize(
    ("status", "received", "said"),
    [
        (
            200,
            sse({"choices": [{"text": "a"}]}, {"choices": [], "usage": {"completion_tokens": 1}}),
            "1 tokens instead of 3",
        ),
        (503, b'{"error": "busy"}', "HTTP 503"),
        (200, sse({"error": {"message": "broken"}}), "broken"),
        (200, b"", "0 tokens"),
    ],
)
def test_what_is_no_answer_is_an_error(status: int, received: bytes, said: str) -> None:
    a = client.read_answer(client.Answer(Arrival(0.0, 1, 3)), status, [(1.0, received)])
    assert said in a.error
    assert not client.Targets(9, 9).met(a)


# ---- figures


def test_goodput_counts_what_met_both_targets_per_second_of_load() -> None:
    answers = [done(0, 0.5, 0.05), done(1, 1.5, 0.05), done(2, 0.5, 0.2), done(3, 0.9, 0.1)]
    failed = client.Answer(Arrival(4.0, 1, 5), error="gone")
    found = client.summary([client.Run([*answers, failed], 5.0, 0.1)], TARGETS)
    assert found["goodput"] == pytest.approx(2 / 5)
    assert found["met"] == pytest.approx(2 / 5)
    assert (found["requests"], found["errors"], found["first_error"]) == (5, 1, "gone")
    assert found["ttft_p50"] == pytest.approx(0.7)
    assert found["tokens_per_s"] == pytest.approx(20 / max(a.times[-1] for a in answers))


def test_rounds_are_pooled() -> None:
    one, two = client.Run([done(0, 0.5, 0.05)], 1.0, 0.1), client.Run([done(0, 5.0, 0.05)], 1.0, 0.3)
    found = client.summary([one, two], TARGETS)
    assert found["goodput_rounds"] == [1.0, 0.0]
    assert (found["goodput"], found["client_cpu"]) == (0.5, 0.3)


def test_nothing_done_has_no_percentiles() -> None:
    found = client.summary([client.Run([client.Answer(Arrival(0.0, 1, 1), error="x")], 1.0, 0.0)], TARGETS)
    assert found["goodput"] == 0
    assert found["ttft_p99"] is None


def test_percentiles() -> None:
    assert client.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert client.percentile([1.0], 99) == 1.0
    assert client.percentile([], 50) is None


def test_capacity_is_of_bursts_without_failures() -> None:
    assert client.capacity(client.Run([done(0, 1.0, 0.25), done(0, 2.0, 0.5)], 0.0, 0.0)) == 0.5
    with pytest.raises(RuntimeError, match="gone"):
        client.capacity(client.Run([client.Answer(Arrival(0.0, 1, 1), error="gone")], 0.0, 0.0))


# ---- the client over a socket


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Tokens one by one, in chunks; a request for 9 tokens is never answered."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = json.loads(await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0])))
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    n = body["max_tokens"]
    if n == 9:
        await reader.read()
    for _ in range(n):
        data = sse({"choices": [{"text": "x"}]})
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()
    data = sse({"choices": [], "usage": {"completion_tokens": n}}, b"[DONE]")
    writer.write(f"{len(data):x};note\r\n".encode() + data + b"\r\n0\r\n\r\n")
    writer.close()


def test_load_is_open_and_what_does_not_finish_is_given_up() -> None:
    async def whole() -> client.Run:
        server = await asyncio.start_server(_serve, "127.0.0.1", 0)
        arrivals = [Arrival(0.0, 4, 9), Arrival(0.01, 4, 2), Arrival(0.02, 4, 3)]
        async with server:
            return await client.offer(server.sockets[0].getsockname()[1], client.jobs(arrivals, 100, 0, {}), 2.0)

    run = asyncio.run(whole())
    assert [a.error for a in run.answers] == ["not finished in time", "", ""]
    assert [a.n_tokens for a in run.answers] == [0, 2, 3]
    assert run.window_s == pytest.approx(0.03)
    assert all(a.late_s >= -1e-3 for a in run.answers)


def test_a_server_that_is_not_there_is_an_error() -> None:
    run = asyncio.run(client.offer(engines.free_port(), client.jobs([Arrival(0.0, 1, 1)], 100, 0, {}), 1.0))
    assert "ConnectionRefused" in run.answers[0].error


# ---- engines and report


@pytest.mark.parametrize("bits", ["bf16", "w8a8", "int4"])
def test_every_engine_has_a_command_for_the_model_and_the_port(bits: str) -> None:
    start = engines.Start(Path("/e/bin/python"), Path("/m/model"), bits, 8123, 2, 1 << 30)
    for engine in engines.ENGINES.values():
        for command in engine.commands(start).values():
            assert "/m/model" in command
            assert "8123" in command


def cells() -> list[dict[str, Any]]:
    fast, slow = (
        client.summary([client.Run([done(0, t, 0.05), done(1, 0.5, 0.05)], 2.0, 0.05)], TARGETS) for t in (0.5, 3.0)
    )
    key = {"shape": "tiny", "bits": "int8", "trace": "azure", "targets": {"ttft": 1.0, "tpot": 0.1}}
    results = {"paceline": fast, "vllm": slow, "openvino": {"error": "not here"}}
    return [{**key, "load": load, "rate": 2 * load, "results": results} for load in (1.0, 0.5)]


def test_the_highest_goodput_and_ours_over_the_best_peers() -> None:
    header, (row,) = report.best_rows({"cells": cells()})
    assert header[4:6] == ["paceline", "vllm"]
    assert row == ["tiny", "int8", "azure", "1 s, 100 ms", "1.00", "0.50", "2.00"]


def test_cells_are_replaced_whole() -> None:
    old = {"cells": cells(), "machine": {"cpu": "x"}}
    new = {**cells()[0], "results": {}}
    merged = report.merge(report.merge({}, old), {"cells": [new]})
    assert {c["load"]: len(c["results"]) for c in merged["cells"]} == {1.0: 0, 0.5: 3}
    assert merged["machine"] == {"cpu": "x"}


def test_the_plot_is_one_well_formed_file_of_its_own() -> None:
    text = report.svg(cells())
    root = ET.fromstring(text)
    assert root.tag.endswith("svg")
    assert "href" not in text
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 3  # what was offered, ours, vLLM
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 4


def test_report_of_a_whole_result() -> None:
    machine = {"date": "2026-01-01", "cpu": "C", "cores": 2, "memory_bytes": 8 << 30, "threads": 2, "system": "Linux"}
    facts = {"paceline": {"capacity": 3.0, "variant": ""}, "vllm": {"error": "does not start"}}
    group = {"shape": "tiny", "bits": "int8", "trace": "azure", "engines": facts}
    text = report.report({"machine": machine, "cells": cells(), "groups": [group]}, "serving.svg")
    assert "tiny int8 azure: paceline 3.00/s." in text
    assert "- vllm (tiny int8 azure): does not start" in text
    assert "| tiny | int8 | azure | 1.00 | vllm | 0.50 | 50 % |" in text


def test_the_readme_has_its_markers(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((serving.HERE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    peers_report.write_between(copy, "x", report.BEGIN, report.END)
