"""Does speed cost quality? Divergence of our formats and of llama.cpp's from float32, for one model on one text.

    python benchmarks/quality.py --file book.txt [--model lab-8m] [--tokens 8000] [--context 1024] [--env-dir DIR]

KL(float32 || format) in nats per token, teacher forced in windows of `context` tokens. The float32 run is ours; llama.cpp reads the
same weights through a GGUF file that `benchmarks/peers_checkpoints.py` writes, and its bfloat16 line shows that the conversion
is right. llama.cpp comes from the environment that `benchmarks/peers.py --install --peers llama.cpp` made. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers_checkpoints import save_gguf, stored
from peers_environments import python

from paceline import LLM, lab
from paceline.analysis.quality import log_softmax

OURS = ("bf16", "int8", "int8:group=0", "int4", "int4g")
THEIRS = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}

WORKER = """
import ctypes, sys, numpy as np, llama_cpp as C
path, tokens_file, out, context, n_vocab = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
tokens = np.load(tokens_file)
silent = C.llama_log_callback(lambda *a: None)
C.llama_log_set(silent, ctypes.c_void_p())
C.llama_backend_init()
model = C.llama_model_load_from_file(path.encode(), C.llama_model_default_params())
p = C.llama_context_default_params()
p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = context, context, context, 2, 2
ctx = C.llama_init_from_model(model, p)
rows = np.empty((len(tokens), n_vocab), np.float32)
batch = C.llama_batch_init(context, 0, 1)
for begin in range(0, len(tokens), context):
    window = tokens[begin:begin + context]
    C.llama_memory_clear(C.llama_get_memory(ctx), True)
    batch.n_tokens = len(window)
    for i, t in enumerate(window):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(t), i, 1, True
        batch.seq_id[i][0] = 0
    if C.llama_decode(ctx, batch):
        raise SystemExit("llama_decode failed")
    for i in range(len(window)):
        rows[begin + i] = np.ctypeslib.as_array(C.llama_get_logits_ith(ctx, i), (n_vocab,))
np.save(out, rows)
"""


def divergence(reference: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """KL(reference || logits) per row (both log-probabilities or logits, (n, n_vocab)), and how often the best token is the same."""
    p, q = log_softmax(reference), log_softmax(logits)
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0)
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    return {"kl": float(kl.mean()), "stderr": float(kl.std() / math.sqrt(len(kl))), "top1": float(same)}


def our_logits(model: str, form: str, tokens: list[int], context: int) -> np.ndarray:
    llm = LLM(model, format=form, dtype="float32" if form == "f32" else "auto", context=context)
    return np.concatenate([llm.logits(tokens[i : i + context]) for i in range(0, len(tokens), context)])


def their_logits(interpreter: Path, folder: Path, bits: str, tokens: list[int], context: int) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as tmp:
        gguf, ids, out = Path(tmp, "model.gguf"), Path(tmp, "ids.npy"), Path(tmp, "logits.npy")
        save_gguf(gguf, config, stored(folder / "model.safetensors"), bits)
        np.save(ids, np.array(tokens, np.int32))
        subprocess.run([interpreter, "-c", WORKER, gguf, ids, out, str(context), str(config["vocab_size"])], check=True)
        return np.load(out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--file", type=Path, required=True)
    p.add_argument(
        "--model", default="lab-8m", help="an embedded model, or a Hugging Face folder of one safetensors file"
    )
    p.add_argument("--tokens", type=int, default=8000)
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--env-dir", type=Path, default=Path.home() / ".cache" / "paceline-peers")
    a = p.parse_args()
    text = a.file.read_text(errors="ignore")[: a.tokens * 12]
    tokens = LLM(a.model).tokens(text)[: a.tokens]
    reference = our_logits(a.model, "f32", tokens, a.context)
    results: dict[str, Any] = {}

    def add(name: str, logits: np.ndarray) -> None:
        r = results[name] = divergence(reference, logits)
        print(f"{name:24} KL {r['kl']:.6f} ± {r['stderr']:.6f}   same best token {100 * r['top1']:.2f} %", flush=True)

    for form in OURS:
        add(form, our_logits(a.model, form, tokens, a.context))
    interpreter = python(a.env_dir, "llama.cpp")
    folder = Path(lab.path(a.model) if a.model in lab.names() else a.model)
    if interpreter.exists():
        for bits, kind in THEIRS.items():
            add(f"llama.cpp {kind}", their_logits(interpreter, folder, bits, tokens, a.context))
    else:
        print("llama.cpp: not installed here; run benchmarks/peers.py --install --peers llama.cpp")
    print(
        json.dumps(
            {"benchmark": "quality", "model": a.model, "tokens": len(tokens), "context": a.context, "results": results}
        )
    )


if __name__ == "__main__":
    main()
