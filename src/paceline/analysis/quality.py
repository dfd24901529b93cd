"""How good a model's answers are: perplexity on text, divergence from another precision, recall at a distance."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from paceline.core.errors import RequestError
from paceline.core.types import SamplingParams
from paceline.llm import LLM

Progress = Callable[[int, int, str], None] | None


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over `tokens` scored tokens; `stderr` is its standard error."""

    perplexity: float
    stderr: float
    tokens: int
    context: int
    stride: int

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def windows(n: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored) of windows of `context` tokens that advance by `stride`; every token after the first is scored once,
    except the first of each window that no earlier window covers."""
    scored_to = 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        yield begin, end, max(scored_to, begin + 1)
        scored_to = end
        if end == n:
            break


def perplexity(
    llm: LLM, tokens: Sequence[int], context: int | None = None, stride: int | None = None, progress: Progress = None
) -> Perplexity:
    """Sliding-window perplexity of a text. context: window length (default: the engine's, at most 2048); stride: default context.

    Raises RequestError when there are fewer than two tokens or the sizes make no sense.
    """
    context = min(llm.plan.context, 2048) if context is None else context
    stride = context if stride is None else stride
    if not 2 <= context <= llm.plan.context:
        raise RequestError(f"context = {context}: must be from 2 to {llm.plan.context}")
    if not 1 <= stride <= context:
        raise RequestError(f"stride = {stride}: must be from 1 to context = {context}")
    if len(tokens) < 2:
        raise RequestError(f"text: {len(tokens)} tokens; perplexity needs at least 2")
    total, squares, count = 0.0, 0.0, 0
    for begin, end, first in windows(len(tokens), context, stride):
        if end > first:
            scores = -llm.score([list(tokens[begin:end])])[0][first - begin - 1 :]
            total, squares, count = total + float(scores.sum()), squares + float((scores**2).sum()), count + len(scores)
        if progress:
            progress(end, len(tokens), "scoring")
    mean = total / count
    spread = math.sqrt(max(0.0, squares / count - mean * mean) / count)
    return Perplexity(math.exp(mean), math.exp(mean) * spread, count, context, stride)


@dataclass(frozen=True)
class Divergence:
    """KL(reference || candidate) in nats per token, with its spread, and how often the most likely token is the same."""

    mean_kl: float
    stderr: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    perplexity_reference: float
    perplexity: float
    tokens: int

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def divergence(
    reference: LLM, candidate: LLM, tokens: Sequence[int], context: int = 256, progress: Progress = None
) -> Divergence:
    """Compare two models of one vocabulary on the same text, in windows of `context` tokens."""
    if reference.plan.model.n_vocab != candidate.plan.model.n_vocab:
        raise RequestError(
            f"against: its vocabulary has {reference.plan.model.n_vocab} tokens, the model's {candidate.plan.model.n_vocab}; "
            "compare two precisions of one model"
        )
    if len(tokens) < 2:
        raise RequestError(f"text: {len(tokens)} tokens; a comparison needs at least 2")
    context = min(context, reference.plan.context, candidate.plan.context)
    kl, same, nll_ref, nll = [], [], [], []
    for begin in range(0, len(tokens), context):
        window = list(tokens[begin : begin + context])
        p, q = log_softmax(reference.logits(window)), log_softmax(candidate.logits(window))
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        at = np.arange(len(window) - 1), np.array(window[1:], np.int64)
        nll_ref.append(-p[:-1][at])
        nll.append(-q[:-1][at])
        if progress:
            progress(begin + len(window), len(tokens), "comparing")
    k = np.maximum(np.concatenate(kl), 0.0)
    return Divergence(
        float(k.mean()), float(k.std() / math.sqrt(len(k))), float(np.median(k)), float(np.quantile(k, 0.99)), float(k.max()),
        float(np.concatenate(same).mean()), float(np.exp(np.concatenate(nll_ref).mean())),
        float(np.exp(np.concatenate(nll).mean())), len(k),
    )  # fmt: skip


@dataclass(frozen=True)
class Recall:
    """How many of `asked` facts came back, at a distance of `tokens` between fact and question."""

    tokens: int
    asked: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy": self.accuracy}


def recall(
    llm: LLM, filler: str, distances: Sequence[int], n: int = 50, seed: int = 0, progress: Progress = None
) -> list[Recall]:
    """Key-value recall: `name = number` lines scattered in running text, and one of them asked for, at each distance in tokens.

    The asked line stands `distance` tokens before the question, at most; the prompt holds five other pairs as distractors.
    """
    if llm.tokenizer is None:
        raise RequestError("recall: this model has no tokenizer")
    text = llm.tokenizer.encode(filler, add_special_tokens=False)
    longest = max(distances)
    if longest + 64 > llm.plan.context:
        raise RequestError(f"distance = {longest}: with the question it exceeds the context of {llm.plan.context}")
    if len(text) < longest:
        raise RequestError(f"text: {len(text)} tokens are too few to fill a distance of {longest}")
    found = []
    for distance in distances:
        rng = random.Random(seed * 1_000_003 + distance)
        cases = [_case(llm, text, distance, rng) for _ in range(n)]
        params = SamplingParams(temperature=0.0, max_tokens=12)
        correct = 0
        for i in range(0, n, 8):
            outputs = llm.generate([prompt for prompt, _ in cases[i : i + 8]], params)
            correct += sum(
                o.text.split("\n")[0].strip() == want for o, (_, want) in zip(outputs, cases[i : i + 8], strict=True)
            )
            if progress:
                progress(i, n, f"recall at {distance}")
        found.append(Recall(distance, n, correct))
    return found


def _case(llm: LLM, text: Sequence[int], distance: int, rng: random.Random) -> tuple[list[int], str]:
    """A prompt (token ids) and the value it asks for; the asked pair comes first, then filler with other pairs in it."""
    assert llm.tokenizer is not None

    def encode(s: str) -> list[int]:
        return llm.tokenizer.encode(s, add_special_tokens=False)  # type: ignore[union-attr]

    names = rng.sample(
        [
            a + b
            for a in ("ba", "ko", "mi", "su", "tra", "lo", "ze", "ni")
            for b in ("vo", "da", "ru", "pel", "ga", "to")
        ],
        6,
    )
    values = [str(rng.randrange(100, 9999)) for _ in names]
    lines = [encode(f"\n{k} = {v}\n") for k, v in zip(names, values, strict=True)]
    question = encode(f"\n{names[0]} =")
    room = distance - sum(map(len, lines)) - len(question)
    start = rng.randrange(max(1, len(text) - room))
    filler = list(text[start : start + max(0, room)])
    cuts = sorted(rng.randrange(len(filler) + 1) for _ in lines[1:])
    prompt, last = list(lines[0]), 0
    for cut, line in zip(cuts, lines[1:], strict=True):
        prompt += filler[last:cut] + line
        last = cut
    bos = [llm.tokenizer.bos] if llm.tokenizer.bos is not None else []
    return bos + prompt + filler[last:] + question, values[0]
