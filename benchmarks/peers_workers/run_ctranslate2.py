"""CTranslate2, int8. Its generator runs whole; the times of decoding are those of its callback.

python run_ctranslate2.py convert SOURCE TARGET BITS GROUP
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import serve


def convert(source: str, target: str, bits: str, group: str) -> None:
    import ctranslate2.converters

    ctranslate2.converters.TransformersConverter(source, load_as_float16=False).convert(target, quantization=bits)


class CTranslate2:
    whole = True

    def __init__(self, options: dict[str, Any]):
        import ctranslate2

        self.n_vocab = options["n_vocab"]
        self.generator = ctranslate2.Generator(
            options["model"], device="cpu", compute_type=options["bits"], intra_threads=options["threads"]
        )
        self.names = json.loads((Path(options["model"]) / "vocabulary.json").read_text(encoding="utf-8"))
        self.prompts: list[serve.Prompt] = []

    def facts(self) -> dict[str, Any]:
        return {"kv_dtype": "float32"}

    def _run(self, prompts: list[serve.Prompt], n: int) -> tuple[list[list[int]], list[float]]:
        """Tokens of each prompt, and when the last sequence got its i-th token."""
        times = [0.0] * n

        def clock(result: Any) -> bool:
            times[min(result.step, n - 1)] = time.perf_counter()
            return False

        outputs = self.generator.generate_batch(
            [[self.names[t] for t in p] for p in prompts],
            max_length=n,
            min_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=clock,
        )
        return [o.sequences_ids[0] for o in outputs], times

    def prefill(self, prompt: serve.Prompt) -> float:
        start = time.perf_counter()
        self._run([prompt], 1)
        return time.perf_counter() - start

    def begin(self, prompts: list[serve.Prompt], room: int) -> None:
        self.prompts = prompts

    def step(self, n: int) -> tuple[float, int]:
        times = self._run(self.prompts, n + 1 + serve.WARM)[1]
        return times[-1] - times[serve.WARM], n * len(self.prompts)

    def end(self) -> None:
        self.prompts = []

    def generate(self, prompts: list[serve.Prompt], n: int) -> list[list[int]]:
        return self._run(prompts, n)[0]


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        serve.main(CTranslate2)
