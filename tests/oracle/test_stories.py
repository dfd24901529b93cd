"""A real trained model (stories260K) against Hugging Face transformers: tokens, perplexity, embeddings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.core.types import SamplingParams
from paceline.llm import LLM

PROMPTS = [
    "Once upon a time", "The little dog", "Lily and Tom went to the park", "One day, a bird", "Mom said",
    "There was a big red ball. It was", "\"Hello!\" said the cat.", "In the forest there lived an old bear who",
]  # fmt: skip
N = 300


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def oracle(folder: Path) -> tuple[Any, Any]:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def truth(oracle: tuple[Any, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt -> (its ids, 300 greedy ids) by transformers, ends of text ignored."""
    import torch

    model, tokenizer = oracle
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=N,
                max_new_tokens=N,
                pad_token_id=0,
                suppress_tokens=None,
            )
        found[prompt] = (ids[0].tolist(), out[0, ids.shape[1] :].tolist())
    return found


# min_new_tokens forbids the end token in transformers: the same rule here
GREEDY = SamplingParams(temperature=0.0, max_tokens=N, min_tokens=N)


@pytest.mark.parametrize("chunk", [1, 3, 17, None])
def test_greedy_text_alone_in_any_chunks(folder: Path, truth: dict[str, Any], chunk: int | None) -> None:
    with LLM(folder, dtype="float32", chunk=chunk) as llm:
        ids, want = truth[PROMPTS[0]]
        out = llm.generate(PROMPTS[0], GREEDY)[0]
        assert out.prompt_token_ids == ids
        assert out.token_ids == want


def test_greedy_text_in_a_batch_of_eight(folder: Path, truth: dict[str, Any]) -> None:
    with LLM(folder, dtype="float32") as llm:
        for out, prompt in zip(llm.generate(PROMPTS, GREEDY), PROMPTS, strict=True):
            assert out.token_ids == truth[prompt][1], prompt


def test_perplexity_agrees_within_a_tenth_of_a_percent(folder: Path, shared: Path, oracle: tuple[Any, Any]) -> None:
    import torch

    from paceline.analysis.quality import perplexity, windows

    model, tokenizer = oracle
    text = (shared / "data" / "text" / "tiny.utf8").read_text(encoding="utf-8")[:60_000]
    ids = tokenizer(text).input_ids
    total, count = 0.0, 0
    with torch.no_grad():
        for begin, end, first in windows(len(ids), 512, 256):
            window = torch.tensor([ids[begin:end]])
            logits = model(window).logits[0].double().log_softmax(-1)
            picked = logits[:-1].gather(1, window[0, 1:, None])[:, 0][first - begin - 1 :]
            total, count = total - float(picked.sum()), count + len(picked)
    with LLM(folder, dtype="float32") as llm:
        ours = perplexity(llm, llm.tokens(text), 512, 256)
    assert ours.tokens == count
    assert abs(ours.perplexity / math.exp(total / count) - 1) < 1e-3


def test_embeddings_are_the_final_hidden_states(folder: Path, oracle: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = oracle
    ids = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0].double().numpy()
    with LLM(folder, dtype="float32") as llm:
        assert np.allclose(llm.embed(PROMPTS[2])[0], hidden.mean(0), atol=1e-4)
        assert np.allclose(llm.embed(PROMPTS[2], pool="last")[0], hidden[-1], atol=1e-4)
