"""llama.cpp through its C interface. Flash attention is tried off and on for every kind of work, and the faster setting stays."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as C
import numpy as np
import serve

UBATCH = 512
FLASH = {False: 0, True: 1}  # llama_flash_attn_type: disabled, enabled


class Context:
    """Sequences of one batch, each in a stream of its own of the KV cache (float16)."""

    def __init__(self, peer: LlamaCpp, n_seqs: int, n_tokens: int, flash: bool):
        p = C.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n_seqs * (-(-n_tokens // 256) * 256), 2048, UBATCH, n_seqs
        p.n_threads = p.n_threads_batch = peer.threads
        p.flash_attn_type, p.no_perf, p.kv_unified = FLASH[flash], True, False
        self.ctx = C.llama_init_from_model(peer.model, p)
        if not self.ctx:
            raise MemoryError(f"no context for {n_seqs} sequences of {n_tokens} tokens")
        self.batch = C.llama_batch_init(2048, 0, 1)
        self.n_vocab, self.flash = peer.n_vocab, flash
        self.last = np.zeros(n_seqs, np.int32)
        self.at = np.zeros(n_seqs, np.int64)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: token, position, sequence, wanted."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, at, seq, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, at, 1, wanted
            b.seq_id[i][0] = seq
        code = C.llama_decode(self.ctx, b)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")

    def _best(self, i: int) -> int:
        logits = np.ctypeslib.as_array(C.llama_get_logits_ith(self.ctx, i), (self.n_vocab,))
        return int(logits.argmax())

    def prompt(self, seq: int, tokens: serve.Prompt) -> None:
        last = len(tokens) - 1
        for start in range(0, len(tokens), 2048):
            piece = tokens[start : start + 2048]
            self._decode([(t, start + i, seq, start + i == last) for i, t in enumerate(piece)])
        self.last[seq], self.at[seq] = self._best(-1), len(tokens)

    def step(self) -> None:
        self._decode([(int(t), int(p), s, True) for s, (t, p) in enumerate(zip(self.last, self.at, strict=True))])
        self.last[:] = [self._best(i) for i in range(len(self.last))]
        self.at += 1

    def clear(self) -> None:
        C.llama_memory_clear(C.llama_get_memory(self.ctx), True)

    def close(self) -> None:
        C.llama_batch_free(self.batch)
        C.llama_free(self.ctx)


class LlamaCpp:
    whole = False

    def __init__(self, options: dict[str, Any]):
        self.silent = C.llama_log_callback(lambda *_: None)
        C.llama_log_set(self.silent, ctypes.c_void_p())
        C.llama_backend_init()
        self.n_vocab, self.threads = options["n_vocab"], options["threads"]
        p = C.llama_model_default_params()
        p.use_mmap = False
        self.model = C.llama_model_load_from_file(options["model"].encode(), p)
        if not self.model:
            raise RuntimeError("the model was refused")
        self.context: Context | None = None
        self.flash: dict[Any, bool] = {}

    def facts(self) -> dict[str, Any]:
        system = C.llama_print_system_info().decode()
        used = [part.strip().removesuffix(" = 1") for part in system.split("|") if part.strip().endswith("= 1")]
        return {"system": used, "kv_dtype": "float16", "flash_attention": self.flash}

    def prefill(self, prompt: serve.Prompt) -> float:
        if "prefill" not in self.flash:
            seconds = {flash: min(self._prefill(prompt, flash) for _ in range(2)) for flash in (False, True)}
            self.flash["prefill"] = seconds[True] < seconds[False]
        return self._prefill(prompt, self.flash["prefill"])

    def _prefill(self, prompt: serve.Prompt, flash: bool) -> float:
        context = Context(self, 1, len(prompt) + 1, flash)
        context.prompt(0, prompt[:8])  # buffers are allocated at the first step
        context.clear()
        start = time.perf_counter()
        context.prompt(0, prompt)
        seconds = time.perf_counter() - start
        context.close()
        return seconds

    def begin(self, prompts: list[serve.Prompt], room: int) -> None:
        key = f"decode b{len(prompts)} c{len(prompts[0])}"
        tries = [self.flash[key]] if key in self.flash else [False, True]
        best: tuple[float, Context] | None = None
        for flash in tries:
            context = Context(self, len(prompts), len(prompts[0]) + room + 12, flash)
            for seq, prompt in enumerate(prompts):
                context.prompt(seq, prompt)
            seconds = self._steps(context, 2) and self._steps(context, 8)
            if best is None or seconds < best[0]:
                if best:
                    best[1].close()
                best = seconds, context
            else:
                context.close()
        assert best
        self.context = best[1]
        self.flash[key] = self.context.flash

    @staticmethod
    def _steps(context: Context, n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            context.step()
        return time.perf_counter() - start

    def step(self, n: int) -> tuple[float, int]:
        return self._steps(self.context, n), n * len(self.context.last)

    def end(self) -> None:
        self.context.close()

    def generate(self, prompts: list[serve.Prompt], n: int) -> list[list[int]]:
        context = Context(self, len(prompts), max(map(len, prompts)) + n, False)
        for seq, prompt in enumerate(prompts):
            context.prompt(seq, prompt)
        tokens = [context.last.tolist()]
        for _ in range(n - 1):
            context.step()
            tokens.append(context.last.tolist())
        context.close()
        return [list(row) for row in zip(*tokens, strict=True)]


if __name__ == "__main__":
    serve.main(LlamaCpp)
