"""Paceline beside its peers: the same random weights, equal bits, equal threads, every round all engines in turns.

    python benchmarks/peers.py --install                          # the peers into environments of their own, once
    python benchmarks/peers.py --prepare --shapes smollm2-135m    # write and convert the checkpoints, once
    python benchmarks/peers.py --quick                            # a few minutes: the smallest shape
    python benchmarks/peers.py --json peers.json --write-readme   # everything; cells already in the file are replaced

How a cell is measured, and what is compared with what: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers_checkpoints as checkpoints
import peers_environments as environments
import peers_report as report
import psutil
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WORKERS = HERE / "peers_workers"
ANSWER_S = 900  # a worker that takes longer is given up
REFERENCE = "reference"


@dataclass(frozen=True)
class Peer:
    """environment: None for ours. models: bits -> (form of the checkpoint, its bits); forms that we do not write are
    converted by the peer's own script. variables: of the process. isas: the instruction sets it is measured for.
    compiles: when first loaded, for a minute."""

    environment: str | None
    script: str
    models: Mapping[str, tuple[str, str]]
    variables: Mapping[str, str] = field(default_factory=dict)
    isas: tuple[str, ...] = ("native",)
    compiles: bool = False


PER_ROW = "w8a8"
BITS = (*checkpoints.BITS, PER_ROW)
"""w8a8: 8 bits with one scale a row of weights and of activations, as vLLM's and CTranslate2's are; int8 is what our users get."""


def _same(form: str, *bits: str) -> dict[str, tuple[str, str]]:
    return {b: (form, b) for b in bits} | ({PER_ROW: (form, "int8")} if "int8" in bits else {})


PEERS: Mapping[str, Peer] = {
    report.OURS: Peer(None, "run_ours.py", dict.fromkeys(BITS, ("hf", "bf16")), isas=("native", "avx512_vnni", "avx2")),
    "vllm": Peer(
        "vllm",
        "run_vllm.py",
        {"bf16": ("hf", "bf16"), **_same("compressed-tensors", "int8", "int4")},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"},
        compiles=True,
    ),
    "llama.cpp": Peer("llama.cpp", "run_llamacpp.py", _same("gguf", *checkpoints.BITS)),
    "llama.cpp-no-amx": Peer(
        "llama.cpp-no-amx", "run_llamacpp.py", _same("gguf", *checkpoints.BITS), isas=("native", "avx512_vnni")
    ),
    "llama.cpp-avx2": Peer("llama.cpp-avx2", "run_llamacpp.py", _same("gguf", *checkpoints.BITS), isas=("avx2",)),
    "transformers": Peer("transformers", "run_transformers.py", _same("hf", "bf16")),
    "openvino": Peer("openvino", "run_openvino.py", _same("openvino", *checkpoints.BITS)),
    "ort-genai": Peer("ort-genai", "run_ort.py", _same("ort", "int4")),
    "ctranslate2": Peer("ctranslate2", "run_ctranslate2.py", _same("ctranslate2", "int8")),
}
_REFERENCE = Peer("transformers", "run_transformers.py", {"f32": ("hf", "bf16")})


@dataclass(frozen=True)
class Work:
    """prefill: context tokens of one prompt. decode: steps of `batch` sequences that have `context` tokens each."""

    kind: str
    batch: int
    context: int


WORKS: Mapping[str, Work] = {
    "prefill512": Work("prefill", 1, 512),
    "prefill2048": Work("prefill", 1, 2048),
    "decode1": Work("decode", 1, 512),
    "decode8": Work("decode", 8, 512),
    "decode32": Work("decode", 32, 512),
    "decode-8k": Work("decode", 1, 8192 - 256),
}
ROOM = {
    "max_context": 256 + max(w.context for w in WORKS.values()),
    "max_batch": max(w.batch for w in WORKS.values()),
    "max_tokens": max(w.batch * (w.context + 256) for w in WORKS.values()),
}
"""What every engine makes room for, whatever is measured: a cell's figure must not depend on what else was asked for."""
QUICK = ("prefill512", "decode1", "decode8")


class Worker:
    """One peer's process. It is stopped whenever it has nothing to do, so that waiting threads take no processor from the others."""

    def __init__(self, name: str, peer: Peer, model: Path, bits: str, a: argparse.Namespace):
        self.log = (a.env_dir / "logs" / f"{name}-{model.parent.name}-{bits}.log").open("w", encoding="utf-8")
        options = {"model": str(model), "bits": bits, "threads": a.threads, **ROOM}
        options["n_vocab"] = checkpoints.config_of(model.parent.name)["vocab_size"]
        self.name, self.peak_rss, self.dead = name, 0, ""
        self.process = subprocess.Popen(
            [str(executable(a.env_dir, peer)), str(WORKERS / peer.script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=variables(a, peer, options),
            preexec_fn=os.setpgrp,  # stopped and continued with its children
        )
        answer = self._read()
        self.ready: dict[str, Any] = answer.get("ready", {})
        if "error" in answer:
            self.dead = answer["error"]
        self._signal(signal.SIGSTOP)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, or {"error": why}."""
        if self.dead:
            return {"error": self.dead}
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        answer = self._read()
        self.peak_rss = max(self.peak_rss, answer.get("peak_rss_bytes", 0))
        self._signal(signal.SIGSTOP)
        return answer

    def _read(self) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], ANSWER_S)[0]:
            self._signal(signal.SIGKILL)
            self.dead = f"no answer within {ANSWER_S} s"
            return {"error": self.dead}
        line = stdout.readline()
        if not line:
            self.dead = f"the process ended with status {self.process.wait()}"
            return {"error": self.dead}
        return dict(json.loads(line))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


def executable(root: Path, peer: Peer) -> Path:
    return environments.python(root, peer.environment) if peer.environment else Path(sys.executable)


def variables(a: argparse.Namespace, peer: Peer, options: Mapping[str, Any]) -> dict[str, str]:
    """The process environment of a worker."""
    out = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if peer.environment is None:
        out["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
        if a.isa != "native":
            out["PACELINE_ISA"] = a.isa
        return out
    out.pop("PYTHONPATH", None)
    home = a.env_dir / peer.environment
    out["PATH"] = f"{home / 'bin'}{os.pathsep}{out['PATH']}"
    if peer.environment == "vllm":
        cpus = sorted(os.sched_getaffinity(0))[: a.threads]
        config = checkpoints.config_of(Path(options["model"]).parent.name)
        per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        out["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
        out["VLLM_CPU_KVCACHE_SPACE"] = str(1 + int(1.1 * per_token * options["max_tokens"] / 2**30))
        out["VLLM_CACHE_ROOT"] = str(a.env_dir / "vllm-cache")
        out["TORCHINDUCTOR_CACHE_DIR"] = str(a.env_dir / "vllm-cache" / "inductor")
        preload = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), home / "lib" / "libiomp5.so"]
        out["LD_PRELOAD"] = ":".join(str(p) for p in preload if p.exists())
    return {**out, **peer.variables}


def model_of(a: argparse.Namespace, shape: str, peer: Peer, bits: str, convert: bool) -> Path:
    """Path of the checkpoint a peer reads; raises RuntimeError when it cannot be made."""
    form, form_bits = peer.models[bits]
    root = a.env_dir / "checkpoints"
    if form in ("hf", "compressed-tensors", "gguf"):
        return checkpoints.ensure(root, shape, form, form_bits)
    path = root / shape / f"{form}-{form_bits}"
    if not path.exists() and convert:
        source = checkpoints.ensure(root, shape, "hf", "bf16")
        log = a.env_dir / "logs" / f"convert-{form}-{shape}-{bits}.log"
        partial = path.with_name(path.name + ".partial")
        command = [executable(a.env_dir, peer), WORKERS / peer.script, "convert", source, partial, bits]
        group = checkpoints.group_of(checkpoints.config_of(shape))
        with log.open("w", encoding="utf-8") as out:
            code = subprocess.call(
                [*map(str, command), str(group)], stdout=out, stderr=out, env=variables(a, peer, {"model": str(source)})
            )
        if code:
            raise RuntimeError(f"conversion failed with status {code}; see {log}")
        partial.rename(path)
    if not path.exists():
        raise RuntimeError("its checkpoint is not prepared; run with --prepare")
    return path


Say = Callable[[str], None]
Rows = list[dict[str, Any]]


def chosen(a: argparse.Namespace, bits: str) -> dict[str, Peer]:
    """The engines of a group of cells; ours is always among them."""
    wanted = a.peers or [p for p in PEERS if p != "paceline"]
    names = [report.OURS, *(p for p in wanted if p != report.OURS)]
    return {n: PEERS[n] for n in names if bits in PEERS[n].models and a.isa in PEERS[n].isas}


@contextlib.contextmanager
def workers(
    a: argparse.Namespace, shape: str, bits: str, failed: dict[str, str], say: Say
) -> Iterator[dict[str, Worker]]:
    """The engines of a group, all loaded; why others are not goes to `failed`."""
    alive: dict[str, Worker] = {}
    try:
        for name, peer in chosen(a, bits).items():
            reason = a.missing.get(peer.environment)
            if reason:
                failed[name] = reason
                continue
            start = time.perf_counter()
            try:
                model = model_of(a, shape, peer, bits, convert=True)
            except RuntimeError as e:
                failed[name] = str(e)
                continue
            worker = Worker(name, peer, model, peer.models[bits][1] if peer.environment else bits, a)
            if worker.dead:
                failed[name] = worker.dead
                worker.close()
            else:
                alive[name] = worker
                say(f"{shape} {bits}: {name} ready after {time.perf_counter() - start:.0f} s")
        yield alive
    finally:
        for worker in alive.values():
            worker.close()


def measure(a: argparse.Namespace, shape: str, bits: str, say: Say) -> tuple[Rows, Rows, dict[str, Any]]:
    """All cells of a shape at some bits: cells, workers, and what each engine generated for the check.

    The machine's limits are measured again for every cell, since those of shared machines wander.
    """
    failed: dict[str, str] = {}
    key = {"isa": a.isa, "shape": shape, "bits": bits}
    prompts = check_prompts(checkpoints.config_of(shape)["vocab_size"])
    with workers(a, shape, bits, failed, say) as alive:
        generated = {n: w.ask({"do": "generate", "prompts": prompts, "n": 8}) for n, w in alive.items()}
        ours = alive.get(report.OURS)
        cells = []
        for name in a.work:
            say(f"{shape} {bits}: {name}")
            limits = ours.ask({"do": "limits"}) if ours else {}
            results: dict[str, Any] = {n: {"error": why} for n, why in failed.items()}
            results |= rounds(a, alive, WORKS[name])
            bound = ours.ask(bound_request(a, WORKS[name])) if ours else {}
            cell = {**key, "work": name, "results": results, "bound_tokens_per_s": bound.get("tokens_per_s")}
            cells.append({**cell, "bandwidth": limits.get("bandwidth"), "peaks": limits.get("peaks", {})})
        loaded = [{**key, "peer": n, **w.ready, "peak_rss_bytes": w.peak_rss} for n, w in alive.items()]
    return cells, loaded, generated


def rounds(a: argparse.Namespace, alive: Mapping[str, Worker], work: Work) -> dict[str, Any]:
    """Every engine once per round, each round beginning with another; one round more than counts, to warm up."""
    names = list(alive)
    found: dict[str, Rows] = {n: [] for n in names}
    failed: dict[str, str] = {}
    for i in range(a.rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name in failed:
                continue
            if work.kind == "prefill":
                request = {"do": "prefill", "n": work.context, "seed": 100 * work.context + i}
            else:
                request = {"do": "decode", "batch": work.batch, "context": work.context, "n": a.steps}
                request |= {"room": a.steps * (a.rounds + 1), "seed": work.batch + work.context}
            answer = alive[name].ask(request)
            if "error" in answer:
                failed[name] = answer["error"]
            elif i:
                found[name].append(answer)
    return {n: {"error": failed[n]} if n in failed else report.summary(runs) for n, runs in found.items()}


def bound_request(a: argparse.Namespace, work: Work) -> dict[str, Any]:
    """The cell in the middle of its counted rounds."""
    context = work.context + 2 + a.steps * (a.rounds + 2) // 2
    return {"do": "bound", "work": work.kind, "n": work.context, "batch": work.batch, "context": context}


def check_prompts(n_vocab: int) -> list[list[int]]:
    """4 prompts of 48 tokens."""
    return [[256 + (7919 * (61 * i + j + 1) ** 2) % (n_vocab - 512) for j in range(48)] for i in range(4)]


def check(a: argparse.Namespace, shape: str, made: Mapping[tuple[str, str], dict[str, Any]], say: Say) -> Rows:
    """Every engine's tokens under the float32 reference; the control scores them after other prompts with the same last token."""
    prompts = check_prompts(checkpoints.config_of(shape)["vocab_size"])
    others = [[*b[:-1], p[-1]] for p, b in zip(prompts, [*prompts[1:], prompts[0]], strict=True)]
    reason, worker = a.missing.get(_REFERENCE.environment, ""), None
    if not reason:
        say(f"{shape}: checking outputs")
        worker = Worker(REFERENCE, _REFERENCE, model_of(a, shape, _REFERENCE, "f32", False), "f32", a)
    rows: Rows = []
    for (bits, peer), answer in made.items():
        row = {"isa": a.isa, "shape": shape, "bits": bits, "peer": peer}
        if worker is None or "error" in answer:
            rows.append({**row, "error": reason or answer["error"]})
            continue
        pair = [worker.ask({"do": "score", "prompts": p, "tokens": answer["tokens"]}) for p in (prompts, others)]
        error = next((x["error"] for x in pair if "error" in x), None)
        rows.append({**row, **({"error": error} if error else report.judged(*(x["regrets"] for x in pair)))})
    if worker:
        worker.close()
    return rows


def machine(a: argparse.Namespace, loaded: Rows) -> dict[str, Any]:
    isa = next((r["facts"]["isa"] for r in loaded if r["peer"] == report.OURS), "?")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": a.threads,
        "isa": isa,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run(a: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Measure what was asked for; results are saved after every group, so an interrupted run keeps what it has."""
    results = json.loads(a.json.read_text(encoding="utf-8")) if a.json and a.json.exists() else {}
    for shape in a.shapes:
        made: dict[tuple[str, str], dict[str, Any]] = {}
        for bits in a.bits:
            cells, loaded, generated = measure(a, shape, bits, say)
            made |= {(bits, peer): answer for peer, answer in generated.items()}
            new = {"cells": cells, "workers": loaded, "environments": facts(a)}
            if a.isa == "native" or "machine" not in results:
                new["machine"] = machine(a, loaded)
            results = report.merge(results, new)
            save(a, results)
        results = report.merge(results, {"checks": check(a, shape, made, say)})
        save(a, results)
    return results


def facts(a: argparse.Namespace) -> dict[str, Any]:
    """What is installed, or why not."""
    out = {}
    for name in environments.ENVIRONMENTS:
        found = environments.installed(a.env_dir, name)
        out[name] = {"error": a.missing[name]} if name in a.missing else dict(found or {})
    return out


def save(a: argparse.Namespace, results: Mapping[str, Any]) -> None:
    if a.json:
        a.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def show(results: Mapping[str, Any], console: Console) -> None:
    for title, (header, body) in (
        ("tokens/s", report.rows(results["cells"])),
        ("outputs against transformers, float32", report.check_rows(results["checks"])),
    ):
        table = Table(title=title)
        for name in header:
            table.add_column(name)
        for row in body:
            table.add_row(*row)
        console.print(table)
    for problem in report.problems(results):
        console.print(f"no figure: {problem}", highlight=False, markup=False)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--install", action="store_true", help="install the peers, nothing else")
    p.add_argument("--prepare", action="store_true", help="install, write and convert the checkpoints, nothing else")
    p.add_argument("--report", action="store_true", help="show (and --write-readme) what is in --json; measure nothing")
    p.add_argument(
        "--quick", action="store_true", help="smollm2-135m, short works, two rounds, where not said otherwise"
    )
    p.add_argument("--shapes", nargs="+", choices=["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b"])
    p.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    p.add_argument("--work", nargs="+", choices=list(WORKS))
    p.add_argument("--peers", nargs="+", choices=list(PEERS), help="default: all")
    p.add_argument(
        "--isa",
        choices=("native", "avx512_vnni", "avx2"),
        default="native",
        help="ours so limited, against builds that go no further (llama.cpp-no-amx, llama.cpp-avx2)",
    )
    p.add_argument("--rounds", type=int, help="counted rounds (3)")
    p.add_argument("--steps", type=int, default=32, help="decoding steps of a round")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--env-dir", type=Path, default=Path.home() / ".cache" / "paceline-peers")
    p.add_argument("--json", type=Path, help="results are merged into this file, cell by cell")
    p.add_argument("--write-readme", action="store_true", help="replace the results in benchmarks/README.md")
    a = p.parse_args()
    a.shapes = a.shapes or (["smollm2-135m"] if a.quick else ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b"])
    a.work = a.work or (list(QUICK) if a.quick else list(WORKS))
    a.rounds = a.rounds or (2 if a.quick else 3)
    a.env_dir = a.env_dir.expanduser().resolve()
    if a.rounds < 1 or a.steps < 1 or a.threads < 1 or a.steps * (a.rounds + 1) > 240:
        p.error("--rounds, --steps and --threads must be positive, and steps * (rounds + 1) at most 240")
    return a


def prepare(a: argparse.Namespace, say: Say) -> None:
    """Write and convert every checkpoint that the chosen cells need; what fails is said again when it is measured."""
    for shape in a.shapes:
        for bits in a.bits:
            for name, peer in chosen(a, bits).items():
                if peer.environment in a.missing:
                    continue
                say(f"{shape} {bits}: checkpoint of {name}")
                try:
                    model = model_of(a, shape, peer, bits, convert=True)
                except RuntimeError as e:
                    say(f"{shape} {bits} {name}: {e}")
                    continue
                if peer.compiles:
                    Worker(name, peer, model, bits, a).close()


def main() -> None:
    a = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended
    console = Console(width=None if sys.stdout.isatty() else 220)
    say: Say = lambda text: Console(stderr=True).print(text, highlight=False, markup=False)  # noqa: E731
    if a.report:
        results = json.loads(a.json.read_text(encoding="utf-8"))
    else:
        (a.env_dir / "logs").mkdir(parents=True, exist_ok=True)
        names = {p.environment for b in a.bits for p in chosen(a, b).values() if p.environment} | {"transformers"}
        reasons = {n: environments.install(a.env_dir, n, say) for n in environments.ENVIRONMENTS if n in names}
        a.missing = {n: why for n, why in reasons.items() if why}
        for name, why in a.missing.items():
            say(f"{name}: {why}")
        if a.install:
            return
        if a.prepare:
            prepare(a, say)
            return
        results = run(a, say)
    show(results, console)
    if a.write_readme:
        report.write_between(HERE / "README.md", report.report(results))


if __name__ == "__main__":
    main()
