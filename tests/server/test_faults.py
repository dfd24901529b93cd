"""Faults around requests: clients who leave, processes that die, models that are replaced, numbers that overflow, signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import Served, eventually, served
from siege import growth, is_error, post, unshaken

from paceline import lab

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
LONG: dict[str, Any] = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
REGEX = {"structured_outputs": {"regex": "[a-z ]{400,900}"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as s, s.client() as c:
        assert post(c, TEXT, {"prompt": "x", "max_tokens": 2}).status_code == 200
        yield s


def quiet(s: Served) -> bool:
    return s.supervisor.n_live == 0 and s.supervisor.gauge.n_running == 0 and s.supervisor.gauge.kv_used == 0


# ---- clients who leave


def send(s: Served, path: str, body: dict[str, Any], cut: int | None = None) -> socket.socket:
    """A request on a socket of its own, cut off after so many bytes of its body."""
    sock = socket.create_connection(("127.0.0.1", int(s.url.rsplit(":", 1)[1])), timeout=60)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data[:cut])
    return sock


def leave(sock: socket.socket, rudely: bool) -> None:
    if rudely:  # with a reset instead of an end
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def leave_everywhere(s: Served) -> None:
    """One client in each phase: in the middle of sending, before the first token, while queued, in a stream, constrained, whole."""
    before = s.supervisor.n_live
    crowd = [send(s, TEXT, {**LONG, "n": 16}) for _ in range(5)]  # more than run at once
    gone = [
        send(s, TEXT, LONG, cut=10),
        send(s, TEXT, LONG),
        send(s, TEXT, {**LONG, "prompt": "word " * 600}),
        send(s, TEXT, {**LONG, **REGEX}),
        send(s, TEXT, {**LONG, "stream": False}),
        send(s, CHAT, {"messages": [{"role": "user", "content": "word " * 500}], "stream": True}),
    ]
    eventually(lambda: s.supervisor.n_live >= before + 5)
    for sock in crowd[:2]:
        sock.recv(200)
    for i, sock in enumerate([*gone, *reversed(crowd)]):
        leave(sock, rudely=i % 2 == 0)


def test_clients_may_leave_at_any_moment(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    ask = {"prompt": "The little dog", "max_tokens": 60, "ignore_eos": True, "seed": 3}
    with server.client() as c, ThreadPoolExecutor(1) as pool:
        want = post(c, TEXT, ask).json()["choices"]
        with unshaken(server):
            neighbour = pool.submit(lambda: post(c, TEXT, ask).json()["choices"])
            leave_everywhere(server)
            assert neighbour.result(120) == want
            eventually(lambda: quiet(server), 60)

        def again() -> None:
            leave_everywhere(server)
            eventually(lambda: quiet(server), 60)

        assert growth(server, again, times=6, warm=2) < 24 << 20
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == []


def test_leaving_while_the_worker_is_replaced_leaves_nothing(server: Served) -> None:
    stays = send(server, TEXT, {**LONG, "max_tokens": 100, "seed": 1})
    leaves = [send(server, TEXT, LONG) for _ in range(3)]
    eventually(lambda: server.supervisor.n_live == 4)
    os.kill(server.supervisor.pid, signal.SIGKILL)
    for sock in leaves:
        leave(sock, rudely=True)
    got = b""
    while b"[DONE]" not in got and (data := stays.recv(1 << 16)):
        got += data
    assert b"[DONE]" in got
    assert b'"error"' not in got
    stays.close()
    eventually(lambda: quiet(server))


# ---- processes


def test_only_the_front_listens(server: Served) -> None:
    """One listening socket in all; the worker has one end of a socket pair, the helper two pipes, and nobody a network connection."""
    with server.client() as c:
        assert (
            post(c, TEXT, {"prompt": "x", "max_tokens": 2, "structured_outputs": {"regex": "a{3}"}}).status_code == 200
        )
        port = int(server.url.rsplit(":", 1)[1])
        front = psutil.Process()
        ours = [k for k in front.net_connections("inet") if k.status == psutil.CONN_LISTEN and k.laddr.port == port]
        assert [k.laddr.ip for k in ours] == ["127.0.0.1"]
        below = front.children(recursive=True)
        assert server.supervisor.pid in {p.pid for p in below}
        assert len(below) >= 2  # the helper that tries grammars
        for process in below:
            assert process.net_connections("inet") == [], process.cmdline()
            assert not [k for k in process.net_connections("unix") if k.laddr], process.cmdline()  # none with a name


def test_a_lost_grammar_helper_is_replaced(server: Served) -> None:
    ask = {"prompt": "x", "max_tokens": 9, "structured_outputs": {"regex": "b{3}"}}
    with server.client() as c:
        assert post(c, TEXT, ask).json()["choices"][0]["text"] == "bbb"
        helpers = [p for p in psutil.Process().children(recursive=True) if "grammar_trial" in " ".join(p.cmdline())]
        assert helpers
        for p in helpers:
            p.kill()
        ask["structured_outputs"] = {"regex": "c{3}"}  # one that nobody has tried
        assert post(c, TEXT, ask).json()["choices"][0]["text"] == "ccc"


# ---- models that are replaced


def workers() -> list[int]:
    found = []
    for p in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it is just ending
            if "paceline.server.worker" in " ".join(p.cmdline()):
                found.append(p.pid)
    return found


def test_reload_and_unload_lose_no_request() -> None:
    """Twenty clients ask on and on while the model is replaced, taken out and loaded again: each gets its whole answer."""
    ask = {"prompt": "Once upon a time", "max_tokens": 30, "ignore_eos": True, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 30, "temperature": 0}
    with served(life={"drain": 60.0}) as s, s.client() as c, ThreadPoolExecutor(20) as pool:
        want = {path: post(c, path, body).json()["choices"] for path, body in ((TEXT, ask), (CHAT, chat))}
        ended: list[bool] = []
        n_workers = len(workers())

        wrong: list[Any] = []

        def on_and_on(i: int) -> list[int]:
            found = []
            with s.client() as own:
                while not ended:
                    path, body = ((TEXT, ask), (CHAT, chat))[i % 2]
                    r = post(own, path, body)
                    if r.status_code != 200 or r.json()["choices"] != want[path]:
                        wrong.append((path, r.status_code, r.text))
                    found.append(r.status_code)
            return found

        asking = [pool.submit(on_and_on, i) for i in range(20)]
        try:
            for path, body in (
                ("reload", {}),
                ("unload", {"model": "lab-8m"}),
                ("load", {"model": "lab-8m"}),
                ("reload", {}),
            ):
                r = post(c, f"/admin/{path}", body)
                assert r.status_code == 200, r.text
        finally:
            ended.append(True)
        answers = [a for f in asking for a in f.result(120)]
        assert len(answers) > 20
        assert wrong == []
        eventually(lambda: len(workers()) == n_workers, 60)


def test_a_request_in_preparation_holds_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is with the engine yet, but the call has begun."""
    from paceline.server.models import Model

    render = Model.render

    async def slow(self: Model, *given: Any, **more: Any) -> str:
        await asyncio.sleep(1.0)
        return await render(self, *given, **more)

    chat = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 5}
    with served(life={"drain": 60.0}) as s, s.client() as c, s.client() as other, ThreadPoolExecutor(1) as pool:
        model = s.server.models.loaded["lab-8m"]
        monkeypatch.setattr(Model, "render", slow)
        asking = pool.submit(post, other, CHAT, chat)
        eventually(lambda: model.n_calls == 1)
        assert post(c, "/admin/unload", {"model": "lab-8m"}).status_code == 200
        assert asking.result(60).status_code == 200
        assert (model.n_calls, model.supervisor.state) == (0, "stopping")


# ---- numbers


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are finite and whose logits are not: its last norm multiplies by 2^127."""
    folder = tmp_path_factory.mktemp("nan") / "model"
    shutil.copytree(lab.path("lab-1m"), folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    (n,) = struct.unpack_from("<Q", data)
    first, last = json.loads(data[8 : 8 + n])["model.norm.weight"]["data_offsets"]
    data[8 + n + first : 8 + n + last] = struct.pack("<H", 0x7F00) * ((last - first) // 2)
    weights.write_bytes(data)
    return folder


def test_numbers_that_overflow_fail_the_request_and_nothing_else(overflowing: Path) -> None:
    with served(str(overflowing), names=("nan",)) as s, s.client() as c, unshaken(s):
        for _ in range(3):
            e = is_error(post(c, TEXT, {"prompt": "x", "max_tokens": 5}), 500)
            assert "not finite" in e["message"]
            assert str(overflowing) not in json.dumps(e)
            r = post(c, CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "stream": True})
            assert r.status_code == 200
            events = [line[6:] for line in r.text.split("\n") if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            assert set(json.loads(events[-2])["error"]) == {"message", "type", "param", "code"}
        assert s.supervisor.n_restarts == 0
        eventually(lambda: quiet(s))


# ---- the whole program


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "paceline", "serve", "--context", "1024", "--threads", "1", *flags]


@contextlib.contextmanager
def program(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`paceline serve` on a free port, ready; killed at the end if it still runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PACELINE_")}
    process = subprocess.Popen(command("--port", str(port), *flags), env=env, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/ready").status_code == 200
        return False

    try:
        eventually(ready, 120)
        yield process, url
    finally:
        process.kill()
        process.communicate(timeout=60)


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def start_helper(url: str) -> None:
    body = {"prompt": "x", "max_tokens": 2, "structured_outputs": {"regex": "a{2}"}}
    assert httpx.post(f"{url}{TEXT}", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_the_second_ends_at_once(number: int) -> None:
    with program("--drain", "120s") as (process, url):
        start_helper(url)
        others = below(process)
        assert len(others) >= 2
        with httpx.stream("POST", f"{url}{TEXT}", json={**LONG, "max_tokens": 500}, timeout=120) as r:
            lines = r.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert not any('"error"' in line for line in rest)
        assert process.wait(60) == 0
        eventually(lambda: all_gone(others), 30)
    with program("--drain", "600s") as (process, url):
        others = below(process)
        endless = {**LONG, "n": 16}
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", f"{url}{TEXT}", json=endless, timeout=120) as r,
        ):
            lines = r.iter_lines()
            next(lines)
            process.send_signal(number)
            eventually(lambda: not can_connect(url), 60)  # it no longer listens: the first was heeded
            assert process.poll() is None
            process.send_signal(number)
            process.wait(60)
            list(lines)
        assert process.poll() is not None
        eventually(lambda: all_gone(others), 30)


def can_connect(url: str) -> bool:
    with socket.socket() as sock:
        sock.settimeout(10)
        return sock.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0


def test_a_killed_front_leaves_nobody_behind() -> None:
    with program() as (process, url):
        start_helper(url)
        others = below(process)
        assert len(others) >= 2
        process.kill()
        eventually(lambda: all_gone(others), 30)


def test_a_signal_while_the_model_loads_ends_it_well() -> None:
    process = subprocess.Popen(command("--port", "0"), stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: bool(below(process)) or process.poll() is not None, 60)
        others = below(process)
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)
        eventually(lambda: all_gone(others), 30)
    finally:
        process.kill()
        process.communicate(timeout=60)


def refused(*flags: str, **env: str) -> str:
    """What a start that fails tells, which is no traceback."""
    done = subprocess.run(command(*flags), env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused("--port", str(port))
    assert f"port = {port}" in told
    assert "choose another" in told


def test_an_unknown_instruction_set_is_told() -> None:
    told = refused("--port", "0", PACELINE_ISA="sse9")
    assert "isa = 'sse9'" in told
    assert "generic" in told
