"""Clients that people have, unchanged, against our server: lm-eval, GuideLLM, and vLLM's benchmark client.

    python benchmarks/clients.py --install    # the clients into environments of their own, once
    python benchmarks/clients.py              # start the embedded model, run every check, exit with 1 when one failed

The hub is not needed: tasks and documents are written here, and tokenizers are the embedded model's own folder. Each check runs the
client's own command; where it computes log-probabilities, they are compared with `LLM.score` of the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import peers_environments as environments
import serving_engines as engines
from rich.console import Console
from rich.table import Table

from paceline import LLM, lab

TOLERANCE = 1e-3  # of a sum of log-probabilities, natural
LIMIT_S = 600  # of one client
QUESTIONS = [
    {"question": "Tom had a red", "choices": [" ball.", " sky.", " because."], "answer": 0},
    {"question": "The little girl was very", "choices": [" happy.", " seventeen of.", " and and."], "answer": 0},
    {"question": "One day, a dog ran to the", "choices": [" park.", " sadly.", " of."], "answer": 0},
    {"question": "They went home and", "choices": [" slept.", " the the.", " blue."], "answer": 0},
]
_LOCAL = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
"""
_TASKS = {
    "local_choice": """\
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "local_rolling": """\
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}]
""",
    "local_generate": """\
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}
_KINDS = {
    "local_choice": "multiple_choice",
    "local_rolling": "loglikelihood_rolling",
    "local_generate": "generate_until",
}


class Failed(Exception):
    """Why a check did not pass."""


@dataclass(frozen=True)
class Bench:
    """Where the server is, and what the clients may use. work: a folder for this run."""

    port: int
    work: Path
    env_dir: Path
    llm: LLM

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, name: str, command: Sequence[str | Path], **variables: str) -> str:
        """What a client printed. Raises Failed with its last lines when it ends with an error."""
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OPENAI_API_KEY": "none"}
        env |= {"HF_HOME": str(self.work / "hf"), "TOKENIZERS_PARALLELISM": "false", **variables}
        log = self.work / f"{name.replace(' ', '-').replace('/', '-')}.log"
        with log.open("w", encoding="utf-8") as out:
            try:
                code = subprocess.run(
                    [str(c) for c in command], stdout=out, stderr=out, env=env, cwd=self.work, timeout=LIMIT_S
                ).returncode
            except subprocess.TimeoutExpired:
                raise Failed(f"still running after {LIMIT_S} s") from None
        text = log.read_text(encoding="utf-8", errors="replace")
        if code:
            lines = [x.strip() for x in text.splitlines() if x.strip()]
            raise Failed(f"status {code}: {' | '.join(lines[-3:])[-600:]}")
        return text


# ---- lm-eval


def write_tasks(folder: Path) -> None:
    """Our local tasks, one YAML file each, over one file of documents."""
    folder.mkdir()
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    for name, text in _TASKS.items():
        head = _LOCAL.format(name=name, data=data, kind=_KINDS[name])
        (folder / f"{name}.yaml").write_text(head + text, encoding="utf-8")


def lm_eval(
    bench: Bench, name: str, model: str, tasks: Sequence[str], options: Mapping[str, Any], *flags: str
) -> list[dict[str, Any]]:
    """The samples that an evaluation logged."""
    tool = environments.python(bench.env_dir, "clients").with_name("lm_eval")
    endpoint = "chat/completions" if "chat" in model else "completions"
    arguments = {"model": lab.DEFAULT, "base_url": f"{bench.url}/v1/{endpoint}", "num_concurrent": 2, **options}
    out = bench.work / name.replace(" ", "-")
    command = [tool, "--model", model, "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += [
        "--tasks",
        ",".join(tasks),
        "--include_path",
        bench.work / "tasks",
        "--output_path",
        out,
        "--log_samples",
        *flags,
    ]
    bench.run(name, command)
    samples = [json.loads(line) for f in sorted(out.rglob("samples_*.jsonl")) for line in f.read_text().splitlines()]
    if len(samples) != len(QUESTIONS) * len(tasks):
        raise Failed(f"{len(samples)} samples logged instead of {len(QUESTIONS) * len(tasks)}")
    return samples


def check_loglikelihoods(bench: Bench, name: str, options: Mapping[str, Any], *flags: str) -> str:
    """Log-likelihoods of every choice, and of whole texts, against `LLM.score`."""
    fixed = {"max_length": 512, "custom_prefix_token_id": bench.llm.tokenizer.bos}
    samples = lm_eval(bench, name, "local-completions", ["local_choice", "local_rolling"], {**fixed, **options}, *flags)
    worst, n = 0.0, 0
    for sample in samples:
        for i, response in enumerate(sample["resps"]):
            given = sample["arguments"][f"gen_args_{i}"]
            rolling = "arg_1" not in given
            found = float(response[0] if rolling else response[0][0])
            worst, n = max(worst, abs(found - score(bench.llm, given["arg_0"], given.get("arg_1")))), n + 1
    if worst > TOLERANCE:
        raise Failed(f"log-likelihoods differ from LLM.score by up to {worst:.4f}")
    return f"{n} log-likelihoods within {worst:.1e} of LLM.score"


def score(llm: LLM, text: str, continuation: str | None) -> float:
    """Log-probability of what follows a text, tokenised as lm-eval does: both together, less the text alone. Without a
    continuation: of the whole text, after the token that begins texts."""
    if continuation is None:
        return float(llm.score([[llm.tokenizer.bos, *llm.tokens(text)]])[0].sum())
    whole, before = llm.tokens(text + continuation), llm.tokens(text)
    return float(llm.score([whole])[0][len(before) - 1 :].sum())


def check_generation(bench: Bench, name: str, model: str, options: Mapping[str, Any], *flags: str) -> str:
    samples = lm_eval(bench, name, model, ["local_generate"], options, *flags)
    texts = [s["resps"][0][0] for s in samples]
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise Failed(f"empty answers: {texts}")
    return f"{len(texts)} answers, such as {texts[0].strip()[:40]!r}"


# ---- load clients


def check_guidellm(bench: Bench, name: str, form: str) -> str:
    """Synthetic prompts; every request complete, with the asked number of tokens."""
    tool, out = environments.python(bench.env_dir, "clients").with_name("guidellm"), bench.work / f"{name}.json"
    n, n_output = 6, 16
    command = [tool, "run", "--backend", f"kind=openai_http,target={bench.url},request_format={form}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={lab.path()}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens=48,output_tokens={n_output}"]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={n}"]
    bench.run(name, [*command, "--output", f"kind=json,path={out}", "--disable-console-interactive"])
    (benchmark,) = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    requests = benchmark["requests"]
    failed = len(requests["errored"]) + len(requests["incomplete"])
    done = requests["successful"]
    tokens = [r["output_metrics"]["text_tokens"] for r in done]
    if failed or len(done) != n or any(t != n_output for t in tokens):
        raise Failed(f"{len(done)} of {n} requests, {failed} failed, output tokens {tokens}")
    return f"{n} requests of {n_output} tokens"


def check_vllm_bench(bench: Bench, name: str, backend: str, endpoint: str) -> str:
    python = environments.python(bench.env_dir, "vllm")
    n, n_output, out = 6, 16, f"{name.replace(' ', '-')}.json"
    options = {
        "backend": backend,
        "base-url": bench.url,
        "endpoint": endpoint,
        "model": lab.DEFAULT,
        "tokenizer": lab.path(),
    }
    options |= {"dataset-name": "random", "random-input-len": 48, "random-output-len": n_output, "num-prompts": n}
    options |= {"result-dir": bench.work, "result-filename": out, "percentile-metrics": "ttft,tpot,itl,e2el"}
    flags = [x for k, v in options.items() for x in (f"--{k}", str(v))]
    script = peers.WORKERS / "vllm_cli.py"
    bench.run(name, [python, script, "bench", "serve", *flags, "--ignore-eos", "--save-result", "--disable-tqdm"])
    found = json.loads((bench.work / out).read_text(encoding="utf-8"))
    if found["completed"] != n or found["total_output_tokens"] != n * n_output:
        raise Failed(f"{found['completed']} of {n} requests, {found['total_output_tokens']} of {n * n_output} tokens")
    return f"{n} requests of {n_output} tokens, TTFT {found['median_ttft_ms']:.0f} ms"


# ---- all of them

CHECKS: Mapping[str, Callable[[Bench, str], str]] = {
    "lm-eval completions, token ids": lambda b, n: check_loglikelihoods(
        b, n, {"tokenizer": lab.path(), "tokenizer_backend": "huggingface", "tokenized_requests": True}
    ),
    "lm-eval completions, text": lambda b, n: check_loglikelihoods(
        b, n, {"tokenizer": lab.path(), "tokenizer_backend": "huggingface", "tokenized_requests": False}
    ),
    "lm-eval completions, batches": lambda b, n: check_loglikelihoods(
        b, n, {"tokenizer": lab.path(), "tokenizer_backend": "huggingface"}, "--batch_size", "4"
    ),
    "lm-eval completions, server's tokenizer": lambda b, n: check_loglikelihoods(
        b, n, {"tokenizer_backend": "remote", "tokenized_requests": True}
    ),
    "lm-eval completions, generate": lambda b, n: check_generation(
        b, n, "local-completions", {"tokenizer": lab.path(), "tokenizer_backend": "huggingface"}
    ),
    "lm-eval chat, generate": lambda b, n: check_generation(
        b, n, "local-chat-completions", {}, "--apply_chat_template"
    ),
    "guidellm completions": lambda b, n: check_guidellm(b, n, "/v1/completions"),
    "guidellm chat": lambda b, n: check_guidellm(b, n, "/v1/chat/completions"),
    "vllm bench openai": lambda b, n: check_vllm_bench(b, n, "openai", "/v1/completions"),
    "vllm bench openai-chat": lambda b, n: check_vllm_bench(b, n, "openai-chat", "/v1/chat/completions"),
}


def start_server(work: Path) -> engines.Server:
    port = engines.free_port()
    source = str(peers.HERE.parent / "src")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "paceline", "serve", "--port", str(port), "--offline"]
    server = engines.Server(command, variables, port, work / "server.log")
    server.wait("/ready")
    return server


def run(bench: Bench, names: Sequence[str], console: Console) -> bool:
    table = Table(title="clients, unchanged, against our server")
    for head in ("client", "result", "seconds", ""):
        table.add_column(head, overflow="fold")
    ok = True
    for name in names:
        start = time.perf_counter()
        try:
            result, detail = "passed", CHECKS[name](bench, name)
        except Failed as e:
            result, detail, ok = "FAILED", str(e), False
        except (KeyError, ValueError, OSError, IndexError) as e:
            result, detail, ok = (
                "FAILED",
                f"its results have another form than expected: {type(e).__name__}: {e}",
                False,
            )
        table.add_row(name, result, f"{time.perf_counter() - start:.0f}", detail)
        print(f"{name}: {result}: {detail}", file=sys.stderr, flush=True)
    console.print(table, markup=False)
    return ok


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--install", action="store_true", help="install the clients, nothing else")
    p.add_argument("--only", nargs="+", choices=list(CHECKS), help="default: all")
    p.add_argument("--env-dir", type=Path, default=Path.home() / ".cache" / "paceline-peers")
    p.add_argument("--keep", type=Path, help="a new folder for logs and results; default: dropped at the end")
    a = p.parse_args()
    a.env_dir = a.env_dir.expanduser().resolve()
    names = a.only or list(CHECKS)
    needed = {"vllm" if n.startswith("vllm") else "clients" for n in names}
    for environment in sorted(needed):
        reason = environments.install(a.env_dir, environment, lambda text: print(text, file=sys.stderr))
        if reason:
            sys.exit(f"{environment}: {reason}")
    if a.install:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended
    with tempfile.TemporaryDirectory() as temporary:
        work = a.keep or Path(temporary)
        work.mkdir(exist_ok=True)
        work = work.resolve()
        write_tasks(work / "tasks")
        server = start_server(work)
        try:
            with LLM(lab.DEFAULT, offline=True) as llm:
                ok = run(Bench(server.port, work, a.env_dir, llm), names, Console())
        finally:
            server.close()
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
