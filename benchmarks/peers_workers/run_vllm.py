"""vLLM's CPU build, in this process, so that a step can be timed."""

from __future__ import annotations

import os
import time
from typing import Any

import serve

GIB = 1 << 30


class Vllm:
    whole = False

    def __init__(self, options: dict[str, Any]):
        from vllm import LLM

        self.n_vocab = options["n_vocab"]
        self.llm = LLM(
            options["model"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=options["max_context"],
            max_num_seqs=max(options["max_batch"], 4),
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
        )
        self.engine = self.llm.llm_engine
        self.n_requests = 0
        self.ids: list[str] = []
        self.sizes: dict[str, int] = {}

    def facts(self) -> dict[str, Any]:
        return {"kv_dtype": "bfloat16", "preload": os.environ.get("LD_PRELOAD", "")}

    def _submit(self, prompt: serve.Prompt, n: int) -> str:
        from vllm import SamplingParams

        self.n_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        request_id = str(self.n_requests)
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        self.sizes[request_id] = 0
        return request_id

    def _step(self) -> None:
        for output in self.engine.step():
            self.sizes[output.request_id] = len(output.outputs[0].token_ids)

    def prefill(self, prompt: serve.Prompt) -> float:
        start = time.perf_counter()
        request_id = self._submit(prompt, 1)
        while not self.sizes[request_id]:
            self._step()
        return time.perf_counter() - start

    def begin(self, prompts: list[serve.Prompt], room: int) -> None:
        self.ids = [self._submit(p, room + 8) for p in prompts]
        while not all(self.sizes[i] for i in self.ids):
            self._step()

    def _count(self) -> int:
        return sum(self.sizes[i] for i in self.ids)

    def step(self, n: int) -> tuple[float, int]:
        before, start = self._count(), time.perf_counter()
        for _ in range(n):
            self._step()
        return time.perf_counter() - start, self._count() - before

    def end(self) -> None:
        self.engine.abort_request(self.ids)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def generate(self, prompts: list[serve.Prompt], n: int) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


if __name__ == "__main__":
    serve.main(Vllm)
