"""From logits to tokens: penalties, bias, minimum length, the techniques' chain, then `ops.sample`.

Every random number is a function of (request seed, place in the sequence), see `rng`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from paceline.core import rng
from paceline.core.sequence import Draft, Sequence
from paceline.core.types import SamplingParams, TokenLogprob
from paceline.core.verify import Verdict, coupled

GREEDY_BELOW = 1e-5
_VERIFY_STREAM = 1 << 20


class LogitsPart(Protocol):
    """One link of the logits chain; its state lives in `seq.states`, `history` are all tokens before the one to choose: the committed
    ones and a path of the draft, every token of which was drawn from what `apply` gave.

    serves: the fields of SamplingParams that nothing else honours (so far: "constraint").
    """

    serves: frozenset[str]

    def why_not(self, params: SamplingParams) -> str | None:
        """Why requests of these parameters cannot be served; None where they can, or where this does not concern them."""

    def wants(self, seq: Sequence) -> bool:
        """Whether it changes logits of this sequence. The others cost nothing."""

    def apply(self, logits: np.ndarray, seq: Sequence, history: Seq[int]) -> np.ndarray:
        """float32 (n_vocab,) to float32 (n_vocab,); may write in place. Where no token is left, all are -inf and `seq.error` says why."""


class Drawn(NamedTuple):
    token: int  # -1: the logits were unusable
    logprob: TokenLogprob | None


def needs_adjusting(p: SamplingParams, n_output: int) -> bool:
    return p.adjusts or n_output < p.min_tokens


def penalise(logits: np.ndarray, p: SamplingParams, history: Seq[int], n_prompt: int) -> None:
    """In place. Repetition divides positive and multiplies negative logits of every token seen (arXiv:1909.05858, section 4.1);
    presence and frequency subtract once, and once per occurrence, for tokens of the output (OpenAI's definition)."""
    if p.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(history, np.int64))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        seen, counts = np.unique(np.asarray(history[n_prompt:], np.int64), return_counts=True)
        logits[seen] -= np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * counts.astype(np.float32)


class _Settings:
    """The parameters of a batch of draws as `ops.sample` takes them."""

    def __init__(self, params: list[SamplingParams]):
        self.params = params
        self.temperature = np.array([p.temperature for p in params], np.float32)
        self.top_k = np.array([p.top_k for p in params], np.int32)
        self.top_p = np.array([p.top_p for p in params], np.float32)
        self.min_p = np.array([p.min_p for p in params], np.float32)
        self.greedy = all(p.temperature < GREEDY_BELOW for p in params)
        self.zeros = np.zeros(len(params))


class Sampler:
    """Chooses tokens for rows of logits."""

    def __init__(self, ops: Any, chain: Seq[LogitsPart] = (), eos: frozenset[int] = frozenset()):
        self.ops, self.chain, self.eos = ops, tuple(chain), eos
        self._settings = _Settings([])

    def adjusts(self, seq: Sequence, history: Seq[int]) -> bool:
        """Whether anything precedes temperature for the token after `history`."""
        return needs_adjusting(seq.params, len(history) - seq.n_prompt) or any(part.wants(seq) for part in self.chain)

    def why_not(self, params: SamplingParams) -> list[str]:
        """Everything the chain, or the lack of one, has against these parameters."""
        problems = [why for part in self.chain if (why := part.why_not(params)) is not None]
        if params.constraint is not None and not any("constraint" in part.serves for part in self.chain):
            problems.append(
                "constraint: the technique that keeps to it is switched off; leave it on, or the constraint out"
            )
        return problems

    def adjusted(self, seq: Sequence, logits: np.ndarray, history: Seq[int]) -> np.ndarray:
        """A copy of the row with everything that precedes temperature applied."""
        p = seq.params
        n_output = len(history) - seq.n_prompt
        row = logits.astype(np.float32, copy=True)
        penalise(row, p, history, seq.n_prompt)
        for token, bias in p.logit_bias.items():
            row[token] += bias
        if n_output < p.min_tokens:
            row[[t for t in (*self.eos, *p.stop_token_ids) if t < row.shape[0]]] = -np.inf
        for part in self.chain:
            if part.wants(seq):
                row = part.apply(row, seq, history)
        return row

    def draw(self, seqs: Seq[Sequence], logits: np.ndarray) -> list[Drawn]:
        """One token for each sequence from its row of logits (n, n_vocab)."""
        rows = logits
        for i, seq in enumerate(seqs):
            if self.adjusts(seq, seq.tokens):
                if rows is logits:
                    rows = logits.copy()
                rows[i] = self.adjusted(seq, logits[i], seq.tokens)
        tokens = self._sample(seqs, rows, [len(s.tokens) for s in seqs])
        return self._with_logprobs(seqs, logits, tokens)

    def _sample(self, seqs: Seq[Sequence], rows: np.ndarray, places: Seq[int]) -> np.ndarray:
        params = [s.request.params for s in seqs]
        settings = self._settings
        if settings.params != params:  # by identity first; the same requests usually decode together for many steps
            settings = self._settings = _Settings(params)
        u = settings.zeros
        if not settings.greedy:
            u = np.array([rng.uniform(s.seed, at) for s, at in zip(seqs, places, strict=True)], np.float64)
        return self.ops.sample(rows, settings.temperature, settings.top_k, settings.top_p, settings.min_p, u)

    def _with_logprobs(self, seqs: Seq[Sequence], logits: np.ndarray, tokens: np.ndarray) -> list[Drawn]:
        out = [Drawn(t, None) for t in tokens.tolist()]
        wanting = [i for i, s in enumerate(seqs) if s.request.params.logprobs is not None and out[i].token >= 0]
        if wanting:
            n_top = max(int(seqs[i].params.logprobs or 0) for i in wanting)
            found = self.logprobs(logits[wanting], tokens[wanting], n_top)
            for i, lp in zip(wanting, found, strict=True):
                n = int(seqs[i].params.logprobs or 0)
                out[i] = Drawn(lp.token, TokenLogprob(lp.token, lp.logprob, lp.top[:n]))
        return out

    def logprobs(self, logits: np.ndarray, tokens: np.ndarray, n_top: int) -> list[TokenLogprob]:
        """Log-probabilities of `tokens` (n,) under logits (n, n_vocab), with the n_top most likely alternatives."""
        n_top = min(n_top, logits.shape[1])
        own, ids, values = self.ops.logprobs(
            np.ascontiguousarray(logits, np.float32), np.asarray(tokens, np.int64), n_top
        )
        return [
            TokenLogprob(int(t), float(lp), tuple((int(a), float(b)) for a, b in zip(ids[i], values[i], strict=True)))
            for i, (t, lp) in enumerate(zip(tokens, own, strict=True))
        ]

    def verify(
        self, seq: Sequence, draft: Draft, logits: np.ndarray, acceptor: Callable[..., Verdict] = coupled
    ) -> tuple[Verdict, list[Drawn]]:
        """Judge a draft: logits (1 + len(draft), n_vocab), row 0 after the last real token, row 1 + i after node i.

        Returns the verdict and the new tokens (accepted ones and the bonus) with their log-probabilities.
        """
        verdict = acceptor(draft, _Target(self, seq, draft, logits))
        tokens = np.array([*(draft.tokens[i] for i in verdict.path), verdict.bonus], np.int64)
        rows = logits[[0, *(1 + i for i in verdict.path)]]
        return verdict, self._with_logprobs([seq] * len(tokens), rows, tokens)


@dataclass
class _Target:
    """The plain model's choice at the nodes of one sequence's draft (see `verify.Target`)."""

    sampler: Sampler
    seq: Sequence
    draft: Draft
    logits: np.ndarray

    def _row(self, node: int, path: tuple[int, ...]) -> np.ndarray:
        history = self.seq.tokens + [int(self.draft.tokens[i]) for i in path]
        row = self.logits[node + 1]
        return self.sampler.adjusted(self.seq, row, history) if self.sampler.adjusts(self.seq, history) else row

    def draw(self, node: int, path: tuple[int, ...]) -> int:
        place = len(self.seq.tokens) + len(path)
        return int(self.sampler._sample([self.seq], self._row(node, path)[None], [place])[0])

    def probs(self, node: int, path: tuple[int, ...]) -> np.ndarray:
        return warp(self._row(node, path), self.seq.params)

    def uniform(self, path: tuple[int, ...], k: int) -> float:
        return rng.uniform(self.seq.seed, len(self.seq.tokens) + len(path), _VERIFY_STREAM + k)


def warp(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """float64 (n_vocab,): the distribution `ops.sample` draws from, in full; zeros where it gives -1."""
    x = logits.astype(np.float64)
    if not np.isfinite(x.max()):
        return np.zeros_like(x)
    order = np.argsort(-x, kind="stable")
    if p.temperature < GREEDY_BELOW:
        out = np.zeros_like(x)
        out[order[0]] = 1.0
        return out
    sorted_p = np.exp((x[order] - x[order[0]]) / p.temperature)
    if p.top_k:
        sorted_p[p.top_k :] = 0.0
    sorted_p /= sorted_p.sum()
    if p.top_p < 1.0:
        before = np.cumsum(sorted_p) - sorted_p
        sorted_p[before >= p.top_p] = 0.0
    sorted_p[sorted_p < p.min_p * sorted_p[0]] = 0.0
    out = np.zeros_like(x)
    out[order] = sorted_p / sorted_p.sum()
    return out
