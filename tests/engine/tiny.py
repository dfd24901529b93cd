"""A tiny random llama, and engines around it, for tests that need a real model but no files."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.analysis.synthetic import RandomCheckpoint
from paceline.checkpoints.adapter import AdapterFolder
from paceline.core.adapters import Adapters
from paceline.core.engine import Engine, Serving
from paceline.core.kvcache import KVCache, make_groups
from paceline.core.runner import Parts
from paceline.core.scheduler import Limits
from paceline.core.tier import Tier
from paceline.core.tiers import Tiers
from paceline.core.types import Output, Request, SamplingParams
from paceline.models import loader
from paceline.models.adapters import load
from paceline.techniques.serving.radix import RadixIndex

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
WINDOWED = {**CONFIG, "model_type": "mistral", "sliding_window": 24}


class Tiny(RandomCheckpoint):
    """Weights large enough that the next token depends on the whole prompt."""

    def read(self, name: str) -> np.ndarray:
        w = super().read(name)
        if w.ndim == 1:
            return w
        rng = np.random.default_rng(len(name) * 1000 + sum(map(ord, name)))
        return (rng.standard_normal(w.shape) * (1.5 / np.sqrt(w.shape[1]))).astype(np.float32)


class Merged(Tiny):
    """The weights with an adapter merged into them."""

    def __init__(self, shape: str, adapter: Path):
        super().__init__(shape)
        self.adapter = AdapterFolder(adapter)

    def read(self, name: str) -> np.ndarray:
        w = super().read(name)
        transposed = next(p.transpose for p in self._params.values() if name in p.sources)
        for m in self.adapter.modules:
            if name == f"{m.module}.weight":
                a, b = (x.astype(np.float64) for x in self.adapter.read(m))
                w = (w + m.scale * ((b @ a).T if transposed else b @ a)).astype(np.float32)
        return w


def tiny_model(
    ops: Any, config: dict[str, Any] = CONFIG, format: str = "float32", context: int = 512, merged: Path | None = None
) -> Any:
    """merged: an adapter's folder, whose updates are added to the weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        checkpoint = Tiny(str(path)) if merged is None else Merged(str(path), merged)
    return loader.load(checkpoint, ops, format=loader.FormatChoice.parse(format), context=context)


def tiny_engine(
    model: Any,
    *,
    n_pages: int = 200,
    page_size: int = 4,
    max_rows: int = 64,
    chunk: int | None = None,
    max_seqs: int = 16,
    head_split: int | None = None,
    radix: bool = True,
    parts: Parts | None = None,
    kv_dtype: str = "float32",
    eos: frozenset[int] = frozenset(),
    tiers: Sequence[Tier] = (),
    identity: bytes = b"tiny",
    adapters: Mapping[str, Path] | None = None,
    adapter_memory: int = 1 << 30,
) -> Engine:
    cache = KVCache(make_groups(model.config.states, page_size, head_split), model.ops, kv_dtype, n_pages)
    parts = parts or Parts()
    if radix:
        parts.prefix = RadixIndex(cache)
    if tiers:
        parts.tiers = parts.prefix.watcher = Tiers(cache, tiers, identity)
    limits = Limits(max_rows, max_seqs, chunk or max_rows, 16)
    capacity = min(model.context, (n_pages - 1) * page_size)
    held = Adapters(functools.partial(load, config=model.config, ops=model.ops), adapter_memory)
    engine = Engine(model, cache, parts, limits, Serving(model.config.n_vocab, capacity, eos), adapters=held)
    for name, path in (adapters or {}).items():
        engine.load_adapter(name, path)
    return engine


def run_all(engine: Engine, requests: list[Request], at: list[int] | None = None) -> dict[str, Output]:
    """Serve requests to the end; at[i]: the step at which request i arrives (default: all before the first)."""
    due = sorted(zip(at or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0])
    outputs: dict[str, Output] = {}
    step = 0
    while engine.has_work or due:
        while due and due[0][0] <= step:
            engine.add(due.pop(0)[1])
        outputs.update({o.id: o for o in engine.step()[1]})
        step += 1
        assert step < 20_000, "the engine does not come to an end"
    return outputs


def request(name: str, tokens: list[int], *, adapter: str = "", **params: Any) -> Request:
    return Request(name, tuple(tokens), SamplingParams(**params), adapter=adapter)
