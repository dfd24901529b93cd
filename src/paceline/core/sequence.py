"""One token stream in the engine: the only mutable per-request object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.core.adapters import Adapter
from paceline.core.types import FinishReason, Request, SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Draft:
    """Provisional tail tokens, invisible outside. Node i follows node `parents[i]` (< i), or the last real token when -1.

    tokens, parents: int32 (n,). q: optional (n, n_vocab) float32 proposal distributions that node i was drawn from (for rejection
    sampling); None when the drafter proposes without probabilities.
    """

    tokens: np.ndarray
    parents: np.ndarray
    q: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        return len(self.parents) == 0 or bool(np.array_equal(self.parents, np.arange(-1, len(self) - 1)))

    def depths(self) -> np.ndarray:
        """Distance of every node from the last real token, from 1."""
        depth = np.ones(len(self), np.int32)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                depth[i] = depth[parent] + 1
        return depth

    def cut(self, n: int) -> Draft:
        """The first n nodes (parents precede their children, so this is a tree again)."""
        return Draft(self.tokens[:n], self.parents[:n], None if self.q is None else self.q[:n])


NO_DRAFT = Draft(np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are committed, `draft` is provisional, the state of the first `n_computed` of them is in the cache.

    Chunked prefill, prefix hits, speculation, preemption and replay are all the same: a step computes some of what is pending.
    """

    id: int
    request: Request
    index: int  # which of the request's n completions
    tokens: list[int]
    n_prompt: int
    seed: int
    max_len: int  # tokens, the prompt included, at which it finishes by length
    kv: Any = None  # SeqKV, once admitted
    draft: Draft = NO_DRAFT
    n_computed: int = 0
    n_cached: int = 0
    n_preempted: int = 0
    siblings: list[Sequence] = field(default_factory=list)  # wait for this one's prompt, then fork it
    states: dict[str, Any] = field(default_factory=dict)  # per part, keyed by technique name
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    pooled: np.ndarray | None = None  # float64 running sum (mean) or last hidden state (last)
    rows: list[np.ndarray] = field(default_factory=list)  # collected logits, (n, n_vocab) each
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    leader: tuple[Sequence, int] | None = None  # while it waits: who is computing its first so many tokens
    plain: bool = False  # only its next tokens are asked for: no pooling, no logprobs of the prompt
    adapter: Adapter | None = None
    salt: str = field(init=False)  # the request's, and what the adapter computes: states are shared within it

    def __post_init__(self) -> None:
        request = self.request
        self.salt = f"{self.adapter.digest}\0{request.salt}" if self.adapter else request.salt
        self.plain = request.generate and request.pool is None and request.params.prompt_logprobs is None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def pending(self) -> int:
        return len(self.tokens) + len(self.draft) - self.n_computed

    @property
    def output(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def rewind(self) -> None:
        """Forget all computed state (preemption); the tokens stay, so nothing is lost."""
        self.kv = None
        self.draft = NO_DRAFT
        self.n_computed = 0
        self.n_preempted += 1
        self.states.clear()
        self.pooled = None
        self.rows.clear()
