"""Whole models without torch: an independent Llama in plain NumPy, a sorting GPT with golden logits, a story teller."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import backends, chunked, greedy, greedy_rows, make_ops, run
from test_model_loader import CONFIG, Memory, random_checkpoint

from paceline.checkpoints import open_checkpoint
from paceline.models.loader import FormatChoice, load


def plain_llama(w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Llama as its paper says it, in float64, one head at a time, no cache: logits (n, n_vocab)."""
    n_heads, n_kv, eps, theta = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], 1e-6, 10000.0
    x = w["model.embed_tokens.weight"][tokens].astype(np.float64)
    n, d = x.shape
    dim = d // n_heads

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        return y / np.sqrt((y**2).mean(axis=1, keepdims=True) + eps) * w[name]

    def turned(head: np.ndarray) -> np.ndarray:
        out = np.empty_like(head)
        for p in range(n):
            for i in range(dim // 2):
                angle = p * theta ** (-2 * i / dim)
                a, b = head[p, i], head[p, i + dim // 2]
                out[p, i] = a * np.cos(angle) - b * np.sin(angle)
                out[p, i + dim // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        y = norm(x, f"{name}.input_layernorm.weight")
        q, k, v = (y @ w[f"{name}.self_attn.{s}_proj.weight"].T for s in "qkv")
        heads = []
        for h in range(n_heads):
            kv = h // (n_heads // n_kv)
            part, shared = slice(h * dim, (h + 1) * dim), slice(kv * dim, (kv + 1) * dim)
            scores = turned(q[:, part]) @ turned(k[:, shared]).T / np.sqrt(dim)
            scores[np.triu_indices(n, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, axis=1) @ w[f"{name}.self_attn.o_proj.weight"].T
        y = norm(x, f"{name}.post_attention_layernorm.weight")
        gate, up = (y @ w[f"{name}.mlp.{s}_proj.weight"].T for s in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize("backend", backends())
def test_llama_equals_plain_numpy(backend: str) -> None:
    checkpoint: Memory = random_checkpoint()
    ops = make_ops(backend)
    model = load(checkpoint, ops, format=FormatChoice(), context=32)
    tokens = np.random.default_rng(1).integers(0, 50, 23).tolist()
    expected = plain_llama(checkpoint.weights, tokens)
    assert np.abs(expected).max() > 1
    for size in (1, 5, 23):
        np.testing.assert_allclose(run(model, ops, chunked(tokens, size)), expected, atol=2e-5)


@pytest.fixture(scope="module")
def sorter(shared: Path) -> Any:
    """backend -> gpt-nano-sort: three letters, six of them in, the same six sorted out."""
    folder = shared / "models" / "gpt-nano-sort"
    if not folder.is_dir():
        pytest.skip("needs the shared model gpt-nano-sort")

    def get(backend: str) -> tuple[Any, Any]:
        ops = make_ops(backend)
        return load(open_checkpoint(folder), ops, format=FormatChoice(), context=11), ops

    return get


@pytest.mark.parametrize("backend", backends())
def test_sorter_logits_equal_the_golden_ones(sorter: Any, shared: Path, backend: str) -> None:
    golden = json.loads((shared / "models/gpt-nano-sort/gpt-nano-sort-t0-partials.json").read_text())

    def tensor(name: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(golden[name]["data"]), np.float32).reshape(golden[name]["shape"])

    model, ops = sorter(backend)
    for tokens, expected in zip(tensor("idx").astype(int).tolist(), tensor("lm_head"), strict=True):
        for size in (1, 4, 11):
            np.testing.assert_allclose(run(model, ops, chunked(tokens, size)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", backends())
def test_sorter_sorts_everything(sorter: Any, backend: str) -> None:
    model, ops = sorter(backend)
    inputs = list(itertools.product(range(3), repeat=6))
    assert len(inputs) == 729
    answers = np.array(list(greedy_rows(model, ops, inputs, 6))).T
    np.testing.assert_array_equal(answers, np.sort(np.array(inputs), axis=1))


@pytest.mark.parametrize("backend", backends())
def test_stories(shared: Path, backend: str) -> None:
    """stories260K begins its story as everybody's copy of it does."""
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("needs the shared model stories260K")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ops = make_ops(backend)
    model = load(open_checkpoint(folder), ops, format=FormatChoice(), context=512)
    tokens = greedy(model, ops, [1], 80)
    text = words.decode(tokens)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
