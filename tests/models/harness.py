"""Runs a model without the engine: batches and pools built by hand, pages in no particular order."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from paceline.core.batch import Batch, GroupBatch
from paceline.core.kvcache import make_groups
from paceline.models.base import Model

PAGE = 8


def backends() -> list[Any]:
    """pytest parameters: the names of the backends to test."""
    native = all(importlib.util.find_spec(f"paceline.{m}") for m in ("_native", "ops.native"))
    skip = pytest.mark.skipif(not native, reason="the native core is not built")
    return ["reference", pytest.param("native", marks=skip)]


def make_ops(name: str) -> Any:
    if name == "native":
        from paceline.ops.native import NativeOps

        return NativeOps()
    from paceline.ops.reference import ReferenceOps

    return ReferenceOps()


def chunked(tokens: Sequence[int], size: int) -> list[Sequence[int]]:
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


class Pools:
    """The KV memory of `n_seqs` sequences of at most `length` tokens, all pages assigned from the start."""

    def __init__(self, model: Model, length: int, n_seqs: int = 1, dtype: str = "float32"):
        per_seq = -(-length // PAGE)
        order = np.random.default_rng(7).permutation(per_seq * n_seqs).astype(np.int32)
        self.table = order.reshape(n_seqs, per_seq)
        self.groups = make_groups(model.config.states, PAGE)
        self.k, self.v = [], []
        for g in self.groups:
            shape = (per_seq * n_seqs, len(g.heads), PAGE, g.spec.dim)
            self.k.append([model.ops.empty(shape, dtype) for _ in g.layers])
            self.v.append([model.ops.empty(shape, dtype) for _ in g.layers])
        self.of_layer = [[g.id for g in self.groups if i in g.layers] for i in range(model.config.n_layers)]
        self.lens = np.zeros(n_seqs, np.int32)

    def batch(self, pieces: Sequence[Sequence[int]], want: Sequence[int] | None = None) -> Batch:
        """The next tokens of every sequence; logits of all rows unless `want` says otherwise."""
        n = np.array([len(p) for p in pieces], np.int32)
        cu_rows = np.concatenate([[0], np.cumsum(n)]).astype(np.int32)
        positions = [np.arange(start, start + k) for start, k in zip(self.lens, n, strict=True)]
        slots = [self.table[s][p // PAGE].astype(np.int64) * PAGE + p % PAGE for s, p in enumerate(positions)]
        self.lens = (self.lens + n).astype(np.int32)
        groups = [
            GroupBatch(g, np.concatenate(slots), self.table, self.lens, k, v)
            for g, k, v in zip(self.groups, self.k, self.v, strict=True)
        ]
        return Batch(
            tokens=np.concatenate([np.asarray(p, np.int32) for p in pieces]),
            positions=np.concatenate(positions).astype(np.int32),
            cu_rows=cu_rows,
            want=np.arange(cu_rows[-1], dtype=np.int32) if want is None else np.asarray(want, np.int32),
            groups=groups,
            of_layer=self.of_layer,
        )


def run(model: Model, ops: Any, chunks: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits of every token of one sequence that arrives in chunks: float32 (n_tokens, n_vocab)."""
    pools = Pools(model, sum(len(c) for c in chunks))
    out = [ops.numpy(model.forward(ops.begin(pools.batch([c])))).copy() for c in chunks]
    return np.concatenate(out)


def greedy(model: Model, ops: Any, prompt: Sequence[int], n: int) -> list[int]:
    """n tokens by argmax."""
    pools = Pools(model, len(prompt) + n)
    tokens, piece = [], list(prompt)
    for _ in range(n):
        logits = ops.numpy(model.forward(ops.begin(pools.batch([piece], want=[len(piece) - 1]))))
        piece = [int(logits[0].argmax())]
        tokens += piece
    return tokens


def greedy_rows(model: Model, ops: Any, prompts: Sequence[Sequence[int]], n: int) -> Iterator[list[int]]:
    """n tokens by argmax for many prompts of one length, in one batch per step; gives the tokens of each step."""
    pools = Pools(model, len(prompts[0]) + n, len(prompts))
    pieces = [list(p) for p in prompts]
    for _ in range(n):
        last = np.cumsum([len(p) for p in pieces]) - 1
        logits = ops.numpy(model.forward(ops.begin(pools.batch(pieces, want=last))))
        tokens = [int(t) for t in logits.argmax(1)]
        pieces = [[t] for t in tokens]
        yield tokens
