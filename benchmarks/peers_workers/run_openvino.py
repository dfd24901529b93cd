"""OpenVINO GenAI: `LLMPipeline` for one sequence, `ContinuousBatchingPipeline` for more (loaded when first needed).

python run_openvino.py convert SOURCE TARGET BITS GROUP
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import serve


def convert(source: str, target: str, bits: str, group: str) -> None:
    weights = {"bf16": ["fp16"], "int8": ["int8"], "int4": ["int4", "--sym", "--ratio", "1.0", "--group-size", group]}
    tool = Path(sys.executable).with_name("optimum-cli")
    command = [str(tool), "export", "openvino", "--model", source, "--task", "text-generation-with-past"]
    subprocess.run([*command, "--weight-format", *weights[bits], target], check=True)


class OpenVino:
    whole = False

    def __init__(self, options: dict[str, Any]):
        import openvino_genai as genai

        self.options, self.n_vocab = options, options["n_vocab"]
        self.properties = {"INFERENCE_NUM_THREADS": options["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self.single = genai.LLMPipeline(options["model"], "CPU", **self.properties)
        self.many: Any = None
        self.one: serve.Prompt = []
        self.handles: list[Any] = []
        self.n_requests = 0

    def facts(self) -> dict[str, Any]:
        return {"kv_dtype": "the plugin's default", "properties": self.properties}

    def _config(self, n: int) -> Any:
        import openvino_genai as genai

        return genai.GenerationConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)

    def _generate(self, prompt: serve.Prompt, n: int) -> tuple[list[int], list[float]]:
        """Tokens, and the time of each."""
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        tokens: list[int] = []
        times: list[float] = []

        class Clock(genai.StreamerBase):
            def write(self, token: Any) -> Any:
                for t in token if isinstance(token, list) else [token]:
                    tokens.append(int(t))
                    times.append(time.perf_counter())
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        ids = np.array([prompt], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        self.single.generate(inputs, self._config(n), Clock())
        return tokens, times

    def prefill(self, prompt: serve.Prompt) -> float:
        start = time.perf_counter()
        return self._generate(prompt, 1)[1][0] - start

    # ---- one sequence: run whole, since the pipeline cannot be stepped; several: stepped

    def begin(self, prompts: list[serve.Prompt], room: int) -> None:
        self.one = prompts[0] if len(prompts) == 1 else []
        if not self.one:
            self._begin_many(prompts, room + 8)

    def step(self, n: int) -> tuple[float, int]:
        if not self.one:
            return self._step_many(n)
        if n == serve.WARM:
            return 0.0, 0
        times = self._generate(self.one, n + 1 + serve.WARM)[1]
        return times[-1] - times[serve.WARM], n

    def end(self) -> None:
        self.one = []
        if self.many is not None:
            for handle in self.handles:
                handle.stop()
            while self.many.has_non_finished_requests():
                self.many.step()
        self.handles = []

    def _begin_many(self, prompts: list[serve.Prompt], room: int) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        if self.many is None:
            scheduler = genai.SchedulerConfig()
            scheduler.max_num_seqs = max(self.options["max_batch"], 4)
            scheduler.max_num_batched_tokens = 2048
            scheduler.cache_size = 0
            scheduler.num_kv_blocks = 64 + self.options["max_tokens"] // 16
            scheduler.enable_prefix_caching = False
            self.many = genai.ContinuousBatchingPipeline(self.options["model"], scheduler, "CPU", self.properties)
        self.handles = []
        for prompt in prompts:
            self.n_requests += 1
            ids = ov.Tensor(np.array([prompt], np.int64))
            self.handles.append(self.many.add_request(self.n_requests, ids, self._config(room)))
        self.seen = [0] * len(prompts)
        while not all(self.seen):
            self.many.step()
            self._count()

    def _count(self) -> int:
        """Tokens that have come since the last call."""
        n = 0
        for i, handle in enumerate(self.handles):
            while handle.can_read():
                new = sum(len(o.generated_ids) for o in handle.read().values())
                self.seen[i] += new
                n += new
        return n

    def _step_many(self, n: int) -> tuple[float, int]:
        start = time.perf_counter()
        for _ in range(n):
            self.many.step()
        seconds = time.perf_counter() - start
        return seconds, self._count()

    def generate(self, prompts: list[serve.Prompt], n: int) -> list[list[int]]:
        return [self._generate(p, n)[0] for p in prompts]


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        serve.main(OpenVino)
