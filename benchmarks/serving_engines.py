"""The servers that serving.py drives: how each is had, started, told to wait, and ended.

All get the same model in the same bits, threads, KV memory (`KV_TOKENS`), longest sequence and prompt tokens per step; besides, what
somebody who knows the engine would set. Where that is not plain, there are variants, and the one that serves a burst fastest stays.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
import peers_checkpoints as checkpoints
import peers_environments as environments

CONTEXT = 1792  # tokens of the longest sequence
STEP = 512  # tokens computed in one step
SEQS = 32  # sequences at once
KV_TOKENS = 16 * CONTEXT
READY_S = 1200  # vLLM compiles for minutes at its first start
FORMATS = {"bf16": "auto", "int8": "int8", "w8a8": "int8:group=0", "int4": "int4"}


@dataclass(frozen=True)
class Start:
    """What a command is made from. executable: Python of the engine's environment; kv_bytes: of a 16-bit KV cache."""

    executable: Path
    model: Path
    bits: str
    port: int
    threads: int
    kv_bytes: int


@dataclass(frozen=True)
class Engine:
    """peer: whose environment and checkpoints (peers.PEERS) it uses. commands: one per variant. ready: answers 200 when it serves.
    fields: of the request's body. note: for the report."""

    peer: str
    commands: Callable[[Start], Mapping[str, Sequence[str]]]
    ready: str = "/health"
    fields: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def _ours(s: Start) -> dict[str, list[str]]:
    options = {
        "format": FORMATS[s.bits],
        "context": CONTEXT,
        "max-rows": STEP,
        "max-seqs": SEQS,
        "kv-memory": s.kv_bytes,
    }
    options |= {"threads": s.threads, "port": s.port, "served-name": "m", "log-level": "warning"}
    if s.bits == "bf16":
        options["dtype"] = "bfloat16"
    flags = [x for k, v in options.items() for x in (f"--{k}", str(v))]
    return {"": [str(s.executable), "-m", "paceline", "serve", str(s.model), "--offline", *flags]}


def _vllm(s: Start) -> dict[str, list[str]]:
    options = {"max-model-len": CONTEXT, "max-num-batched-tokens": STEP, "max-num-seqs": SEQS, "dtype": "bfloat16"}
    options |= {"port": s.port, "host": "127.0.0.1", "served-model-name": "m", "uvicorn-log-level": "warning"}
    flags = [x for k, v in options.items() for x in (f"--{k}", str(v))]
    script = str(peers.WORKERS / "vllm_cli.py")
    return {"": [str(s.executable), script, "serve", str(s.model), "--disable-log-stats", *flags]}


def _llama_server(s: Start) -> dict[str, list[str]]:
    """Streams: 16 sequences with equal parts of the KV cache; unified: all of them share it."""
    binary = str(s.executable.with_name("llama-server"))
    options = {
        "-m": s.model,
        "--port": s.port,
        "-t": s.threads,
        "-tb": s.threads,
        "-c": KV_TOKENS,
        "-b": STEP,
        "-ub": STEP,
    }
    base = [binary, *(str(x) for pair in options.items() for x in pair), "--no-webui", "--cache-ram", "1024", "-a", "m"]
    streams = ["-np", str(KV_TOKENS // CONTEXT), "--no-kv-unified"]
    return {
        "streams, -fa on": [*base, *streams, "-fa", "on"],
        "streams, -fa off": [*base, *streams, "-fa", "off"],
        "unified, -fa on": [*base, "-np", str(SEQS), "--kv-unified", "-fa", "on"],
    }


def _openvino(s: Start) -> dict[str, list[str]]:
    script = str(peers.WORKERS / "serve_openvino.py")
    numbers = (s.port, s.threads, KV_TOKENS, STEP, SEQS)
    return {"": [str(s.executable), script, str(s.model), *map(str, numbers)]}


ENGINES: Mapping[str, Engine] = {
    "paceline": Engine("paceline", _ours, "/ready"),
    "vllm": Engine("vllm", _vllm, variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
    "llama-server": Engine(
        "llama.cpp", _llama_server, fields={"samplers": ["top_k"], "top_k": 1, "cache_prompt": True}
    ),
    "openvino": Engine(
        "openvino",
        _openvino,
        note="its ContinuousBatchingPipeline behind a minimal front of ours that does not detokenise",
    ),
}


class Server:
    """A started server. It is stopped (SIGSTOP) when it is not its turn."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], port: int, log: Path):
        self.port, self.log = port, log
        with log.open("a", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(variables),
                preexec_fn=os.setpgrp,
            )

    def wait(self, path: str) -> None:
        """Until it is ready. Raises RuntimeError when it ends or takes longer than READY_S."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended with status {self.process.returncode} at start; see {self.log}")
            address = f"http://127.0.0.1:{self.port}{path}"
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.25)
        raise RuntimeError(f"not ready after {READY_S} s; see {self.log}")

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def starts(a: argparse.Namespace, name: str, shape: str, bits: str) -> dict[str, Callable[[], Server]]:
    """By variant: what starts the engine and waits until it serves. Raises RuntimeError when its checkpoint cannot be had."""
    engine = ENGINES[name]
    peer = peers.PEERS[engine.peer]
    model = peers.model_of(a, shape, peer, bits, convert=True)
    config = checkpoints.config_of(shape)
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    variables = {**peers.variables(a, peer, {"model": str(model), "max_tokens": KV_TOKENS}), **engine.variables}
    if engine.peer == "llama.cpp":
        variables["LD_LIBRARY_PATH"] = str(_libraries(a.env_dir))
    log = a.env_dir / "logs" / f"serving-{name}-{shape}-{bits}.log"
    log.unlink(missing_ok=True)

    def start(variant: str) -> Server:
        port = free_port()
        at = Start(peers.executable(a.env_dir, peer), model, bits, port, a.threads, per_token * KV_TOKENS)
        server = Server(engine.commands(at)[variant], variables, port, log)
        try:
            server.wait(engine.ready)
        except BaseException:
            server.close()
            raise
        return server

    named = engine.commands(Start(Path("x"), model, bits, 0, a.threads, 0))
    return {variant: lambda v=variant: start(v) for variant in named}  # type: ignore[misc]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def install(a: argparse.Namespace, name: str, say: Callable[[str], None]) -> str | None:
    """None, or why an engine cannot be had here."""
    environment = peers.PEERS[ENGINES[name].peer].environment
    if environment is None:
        return None
    return environments.install(a.env_dir, environment, say) or (
        build_llama_server(a, say) if environment == "llama.cpp" else None
    )


def _libraries(root: Path) -> Path:
    return next((root / "llama.cpp" / "lib").glob("python3*/site-packages/lib"))


def build_llama_server(a: argparse.Namespace, say: Callable[[str], None]) -> str | None:
    """The server of the llama.cpp that the environment holds, from the same sources; None, or why it failed."""
    root: Path = a.env_dir
    binary = environments.python(root, "llama.cpp").with_name("llama-server")
    if binary.exists():
        return None
    say("building llama-server: 5 minutes")
    work, log = root / "llama-server-build", root / "logs" / "install-llama-server.log"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    c, cxx = environments.compiler()
    pip = [str(environments.python(root, "llama.cpp")), "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    with log.open("w", encoding="utf-8") as out:

        def run(*command: str) -> int:
            return subprocess.call(command, stdout=out, stderr=out)

        if run(*pip, "--dest", str(work), environments.LLAMA_CPP):
            return f"its sources cannot be had; see {log}"
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(work.glob("*/vendor/llama.cpp"))
        definitions = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_C_COMPILER": c, "CMAKE_CXX_COMPILER": cxx}
        definitions |= {"SOURCE": str(source), "LIBRARIES": str(_libraries(root))}
        flags = [f"-D{k}={v}" for k, v in definitions.items()]
        made = work / "made"
        failed = run("cmake", "-S", str(peers.WORKERS / "llama_server"), "-B", str(made), "-G", "Ninja", *flags)
        failed = failed or run("cmake", "--build", str(made), "--target", "llama-server")
    if failed:
        return f"llama-server could not be built; see {log}"
    shutil.copy2(made / "server" / "llama-server", binary)
    shutil.rmtree(work)
    return None
