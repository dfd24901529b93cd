"""Packs documents of all generators into rows of tokens with targets and loss weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lab.data import generators
from lab.data.base import END

SHARES = {"stdlib": 0.36, "recall": 0.24, "arithmetic": 0.14, "lists": 0.07, "records": 0.08, "chat": 0.11}
# Row lengths in tokens with their shares, by the progress (0 to 1) up to which they hold.
CURRICULUM = (
    (0.40, {512: 0.9, 2048: 0.1}),
    (0.70, {512: 0.45, 2048: 0.45, 4096: 0.1}),
    (1.01, {512: 0.3, 2048: 0.5, 4096: 0.2}),
)
Batch = tuple[Tensor, Tensor, Tensor]


def row_length(rng: random.Random, progress: float) -> int:
    """The row length of the next micro-batch."""
    for limit, lengths in CURRICULUM:
        if progress < limit:
            return rng.choices(list(lengths), list(lengths.values()))[0]
    return max(CURRICULUM[-1][1])


def parse_shares(text: str) -> dict[str, float]:
    """``SHARES`` with the entries of ``text`` (such as ``recall=0.4,chat=0.1``) replaced."""
    shares = dict(SHARES)
    for entry in filter(None, text.split(",")):
        name, _, share = entry.partition("=")
        if name not in shares:
            raise ValueError(f"unknown generator {name!r}; there are: {', '.join(shares)}")
        shares[name] = float(share)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


class Mixer:
    """An endless supply of rows; the generator furthest behind its share supplies the next document."""

    def __init__(self, tokenizer: Path, shares: dict[str, float], seed: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.end: int = self.tokenizer.encode(END).ids[0]
        self.generators = generators()
        self.shares = shares
        self.counts = dict.fromkeys(shares, 0)
        self.rng = random.Random(seed)

    def encode(self, name: str, room: int) -> tuple[list[int], np.ndarray]:
        """Token ids and loss weights ``[tokens]`` of a new document, its end marker included."""
        document = self.generators[name].document(self.rng, room)
        encoding = self.tokenizer.encode(document.text)
        weights = np.full(len(encoding.ids) + 1, document.base, dtype=np.float32)
        starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(encoding.ids))
        for start, end in document.answers:
            weights[: len(starts)][(starts >= start) & (starts < end)] = document.gain
        return [*encoding.ids, self.end], weights

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """``length + 1`` token ids and as many weights."""
        ids: list[int] = []
        weights: list[np.ndarray] = []
        while len(ids) <= length:
            total = sum(self.counts.values())
            name = max(self.shares, key=lambda each: self.shares[each] * (total + 1) - self.counts[each])
            new, weight = self.encode(name, max(64, length - len(ids)))
            self.counts[name] += min(len(new), length + 1 - len(ids))
            ids += new
            weights.append(weight)
        return np.asarray(ids[: length + 1], dtype=np.int64), np.concatenate(weights)[: length + 1]

    def batch(self, tokens: int, length: int) -> Batch:
        """Inputs, targets and weights of the targets, each ``[tokens // length, length]``."""
        rows = [self.row(length) for _ in range(max(1, tokens // length))]
        ids = torch.from_numpy(np.stack([row[0] for row in rows]))
        weights = torch.from_numpy(np.stack([row[1] for row in rows]))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()

    def batches(self, tokens: int, length: int) -> Iterator[Batch]:
        """Batches of one shape without end."""
        while True:
            yield self.batch(tokens, length)
