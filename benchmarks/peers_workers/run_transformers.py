"""transformers, eager; with bits "f32" it is the reference that the others' tokens are held against."""

from __future__ import annotations

import time
from typing import Any

import serve
import torch
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers:
    whole = False

    def __init__(self, options: dict[str, Any]):
        torch.set_num_threads(options["threads"])
        torch.set_grad_enabled(False)
        self.n_vocab = options["n_vocab"]
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[options["bits"]]
        self.model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval()
        self.cache: DynamicCache | None = None
        self.last = torch.zeros(0, 1, dtype=torch.long)

    def facts(self) -> dict[str, Any]:
        return {"kv_dtype": str(self.model.dtype), "attention": self.model.config._attn_implementation}

    def _forward(self, tokens: torch.Tensor) -> None:
        """tokens (batch, n) go on where the cache ends; the most likely next ones are kept."""
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = out.logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self, prompt: serve.Prompt) -> float:
        self.cache = DynamicCache()
        start = time.perf_counter()
        self._forward(torch.tensor([prompt]))
        return time.perf_counter() - start

    def begin(self, prompts: list[serve.Prompt], room: int) -> None:
        self.cache = DynamicCache()
        self._forward(torch.tensor(prompts))

    def step(self, n: int) -> tuple[float, int]:
        start = time.perf_counter()
        for _ in range(n):
            self._forward(self.last)
        return time.perf_counter() - start, n * len(self.last)

    def end(self) -> None:
        self.cache = None

    def generate(self, prompts: list[serve.Prompt], n: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            self.begin([prompt], n)
            tokens = [self.last.item()]
            for _ in range(n - 1):
                self._forward(self.last)
                tokens.append(self.last.item())
            found.append(tokens)
        return found

    def regrets(self, prompt: serve.Prompt, tokens: list[int]) -> list[float]:
        """How far below the best logit each token's is, given all before it, in standard deviations of the logits."""
        rows = self.model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].float()
        chosen = rows.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        return ((rows.amax(-1) - chosen) / rows.std(-1)).tolist()


class Server(serve.Server):
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"do": "score", "prompts": [...], "tokens": [...]} -> {"regrets": [[...], ...]}"""
        if request["do"] != "score":
            return super().answer(request)
        pairs = zip(request["prompts"], request["tokens"], strict=True)
        return {"regrets": [self.peer.regrets(p, t) for p, t in pairs]}


if __name__ == "__main__":
    serve.main(Transformers, Server)
