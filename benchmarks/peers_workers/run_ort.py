"""ONNX Runtime GenAI, int4 in blocks of 32 with int8 arithmetic, by its own model builder.

python run_ort.py convert SOURCE TARGET BITS GROUP
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import serve


def convert(source: str, target: str, bits: str, group: str) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target, "-p", bits]
    options = ["int4_accuracy_level=4", "int4_block_size=32", "int4_is_symmetric=true"]
    subprocess.run([*builder, "-e", "cpu", "-c", target + "/cache", "--extra_options", *options], check=True)


class Ort:
    whole = False

    def __init__(self, options: dict[str, Any]):
        import onnxruntime_genai as genai

        self.genai, self.n_vocab = genai, options["n_vocab"]
        config = genai.Config(options["model"])
        session = {"intra_op_num_threads": options["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = genai.Model(config)
        self.generator: Any = None
        self.batch = 0

    def facts(self) -> dict[str, Any]:
        return {"kv_dtype": "float32"}

    def _start(self, prompts: list[serve.Prompt], room: int) -> None:
        """Prompts of one length; their first tokens are drawn."""
        params = self.genai.GeneratorParams(self.model)
        most = len(prompts[0]) + room + 2
        params.set_search_options(do_sample=False, max_length=most, min_length=most, batch_size=len(prompts))
        self.generator, self.batch = self.genai.Generator(self.model, params), len(prompts)
        tokens = np.array(prompts, np.int32)
        self.generator.append_tokens(tokens if len(prompts) > 1 else tokens[0])
        self.generator.generate_next_token()

    def prefill(self, prompt: serve.Prompt) -> float:
        start = time.perf_counter()
        self._start([prompt], 1)
        seconds = time.perf_counter() - start
        self.generator = None
        return seconds

    def begin(self, prompts: list[serve.Prompt], room: int) -> None:
        self._start(prompts, room)

    def step(self, n: int) -> tuple[float, int]:
        start = time.perf_counter()
        for _ in range(n):
            self.generator.generate_next_token()
        return time.perf_counter() - start, n * self.batch

    def end(self) -> None:
        self.generator = None

    def generate(self, prompts: list[serve.Prompt], n: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            self._start([prompt], n)
            self.step(n - 1)
            found.append([int(t) for t in self.generator.get_sequence(0)[len(prompt) :]])
        self.generator = None
        return found


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        serve.main(Ort)
