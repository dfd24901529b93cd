"""The guard behind a real socket: what uvicorn makes of requests that never end, and mutual TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from paceline.server import errors
from paceline.server.access import Gate
from paceline.server.guard import Guard, Rules
from paceline.server.settings import Bounds, Listen, ServeSettings, tls_context


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"n": len(await request.body())})


APP = Starlette(
    routes=[Route("/health", echo), Route("/v1/echo", echo, methods=["POST"])], exception_handlers=errors.handlers()
)


@contextmanager
def served(s: ServeSettings) -> Iterator[int]:
    """The port of a server with these settings."""
    config = uvicorn.Config(
        Guard(APP, Gate.of(s), Rules.of(s)), port=0, http="h11", ws="none", lifespan="off", log_level="error",
        h11_max_incomplete_event_size=s.bounds.max_header_bytes, timeout_graceful_shutdown=1,
    )  # fmt: skip
    config.load()
    config.ssl = tls_context(s.listen)
    server = uvicorn.Server(config)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(ServeSettings(bounds=Bounds(max_body=4096, max_header_bytes=8192, body_timeout=0.5))) as found:
        yield found


def talk(port: int, head: bytes, piece: bytes, pieces: int) -> tuple[bytes, int]:
    """What comes back until the server closes, and how many pieces it took before."""
    sent, got = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        try:
            s.sendall(head)
            while sent < pieces:
                s.sendall(piece)
                sent += 1
        except OSError:
            pass
        try:
            while data := s.recv(65536):
                got += data
        except OSError:
            pass
    return got, sent


def alive(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200


HEAD = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_chunked_body_without_end_is_cut(port: int) -> None:
    got, sent = talk(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b"x" * 1024 + b"\r\n", 10**6)
    assert sent < 10**6
    assert got.startswith(b"HTTP/1.1 413 ") or not got  # a reset may overtake the answer
    assert alive(port)


def test_a_long_body_is_refused_by_its_length(port: int) -> None:
    got, _ = talk(port, HEAD + b"Content-Length: 4097\r\nExpect: 100-continue\r\n\r\n", b"", 0)
    assert got.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in got
    assert b"100 Continue" not in got


def test_a_body_that_never_comes_is_given_up(port: int) -> None:
    got, _ = talk(port, HEAD + b"Content-Length: 10\r\n\r\n", b"", 0)
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in got


@pytest.mark.parametrize("piece", [b"X-A: " + b"y" * 1000 + b"\r\n", b"y" * 1000])
def test_headers_without_end_are_cut(port: int, piece: bytes) -> None:
    got, sent = talk(port, HEAD, piece, 10**6)
    assert sent < 10**6
    assert not got or got.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert alive(port)


LENGTHS = [
    b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
    b"Content-Length: 2\r\nContent-Length: 3\r\n",
    b"Content-Length: +2\r\n",
]


@pytest.mark.parametrize("lines", LENGTHS)
def test_two_readings_of_a_length_are_not_served(port: int, lines: bytes) -> None:
    got, _ = talk(port, HEAD + lines + b"Connection: close\r\n\r\n", b"{}", 1)
    assert b" 200 " not in got.split(b"\r\n")[0]
    assert alive(port)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and server and client certificates that it signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make certificates")
    at = tmp_path_factory.mktemp("pki")

    def run(*args: str) -> None:
        subprocess.run([str(openssl), *args], cwd=at, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    run("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test ca")
    (at / "ext").write_text("subjectAltName=DNS:localhost\n")
    for name in ("server", "client"):
        run("req", *new[:-2], "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "ext")
        run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    return at


def test_mutual_tls_lets_in_who_has_a_certificate(pki: Path) -> None:
    listen = Listen(
        tls_cert=str(pki / "server.pem"),
        tls_key=str(pki / "server.key"),
        tls_ca=str(pki / "ca.pem"),
        tls_min_version="1.3",
    )
    assert listen.problems() == []
    with served(ServeSettings(listen=listen)) as port:
        trusting = ssl.create_default_context(cafile=str(pki / "ca.pem"))
        url = f"https://localhost:{port}/health"
        with pytest.raises(httpx.TransportError), httpx.Client(verify=trusting) as client:
            client.get(url)
        trusting.load_cert_chain(pki / "client.pem", pki / "client.key")
        with httpx.Client(verify=trusting) as client:
            assert client.get(url).status_code == 200
        trusting.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(httpx.TransportError), httpx.Client(verify=trusting) as client:
            client.get(url)
