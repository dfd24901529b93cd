"""Output that keeps to a JSON Schema, a regular expression, a list of choices or a grammar (`core.types.Constraint`).

Before a token is chosen, the logits of all tokens after which the text could not be completed any more become -inf; what
the model prefers among the rest is untouched (locally constrained decoding; the masks are llguidance's, `parts.grammar`).
The matcher is a function of the sequence's own output tokens: it is made again after a preemption or on another branch,
and follows a draft forwards and back. End tokens are allowed where the text satisfies the constraint, and forced where
nothing else can follow. Whatever goes wrong ends the sequence with an error; the text is never continued freely.

Cost: nothing for sequences without a constraint. Measured (`python benchmarks/constrained_schemas.py --masks FOLDER`) with
a vocabulary of 128,000: 100 to 180 us per token for JSON, of which the matcher takes 10 to 50; 0.5 to 1 ms where nearly
every token is to be looked at, as in the middle of a word of a regular expression. 0.5 to 1.5 s, once, for the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core.errors import RequestError
from paceline.core.sequence import Sequence
from paceline.core.technique import Manifest, Technique
from paceline.core.types import SamplingParams
from paceline.techniques.parts.grammar import Grammar, Grammars, Mask

STATE = "output/llguidance"


class Follower:
    """A matcher that stands where one sequence does: after its output, or some way along a draft."""

    def __init__(self, grammar: Grammar):
        self._matcher = grammar.matcher()
        self._n_safe = 0  # output tokens taken in that were committed, and stay
        self._tail: list[int] = []  # tokens taken in after those
        self.error: str | None = None

    def move(self, output: Seq[int], n_committed: int) -> None:
        """Take the place after `output[n_safe:]`, given from the first token that may be new.

        output: the tokens after the safe ones; n_committed: how many of the whole output are committed.
        """
        n = 0
        while n < min(len(self._tail), len(output)) and self._tail[n] == output[n]:
            n += 1
        if n < len(self._tail):
            self._check(self._matcher.rollback(len(self._tail) - n))
        if n < len(output):
            self._check(self._matcher.consume_tokens(list(output[n:])))
        n_settled = n_committed - self._n_safe
        self._tail = list(output[n_settled:])
        self._n_safe = n_committed

    @property
    def n_safe(self) -> int:
        return self._n_safe

    def allowed(self, n_vocab: int) -> Mask:
        """The tokens that may come next, the end tokens among them."""
        found = Mask(self._matcher, n_vocab)
        self._check(not self._matcher.is_error())
        return found

    def _check(self, fine: bool) -> None:
        if not fine and self.error is None:
            said = str(self._matcher.get_error()).split("\n")[0][:300]
            self.error = f"the constraint could not be followed any further: {said or 'the matcher failed'}"


class Masks:
    """The `logits` part."""

    serves = frozenset({"constraint"})

    def __init__(self, tokenizer: Tokenizer | None, eos: frozenset[int]):
        self.grammars = None if tokenizer is None else Grammars(tokenizer, eos)
        self._ends = eos

    def trust(self) -> None:
        """Constraints come from a front that has checked them (`Grammars.check`): compile them without a trial. Makes the trie, too."""
        if self.grammars is not None:
            self.grammars.tried = True
            self.grammars.warm()

    def why_not(self, params: SamplingParams) -> str | None:
        """Compiles the constraint, so that `apply` finds it ready."""
        if params.constraint is None:
            return None
        if self.grammars is None:
            return "constraint: the model has no tokenizer, so nothing is known of the text of its tokens"
        try:
            self.grammars.compile(params.constraint)
        except RequestError as e:
            return str(e)
        return None

    def wants(self, seq: Sequence) -> bool:
        return seq.request.params.constraint is not None

    def apply(self, logits: np.ndarray, seq: Sequence, history: Seq[int]) -> np.ndarray:
        assert self.grammars is not None
        try:
            follower = self._follower(seq)
        except RequestError as e:  # it was compiled before, has been forgotten since, and now takes too long
            return _fail(logits, seq, str(e))
        output = history[seq.n_prompt + follower.n_safe :]
        eos = self.grammars.eos
        if any(t in self._ends for t in output):  # a draft that goes on after the end
            return _only(logits, eos)
        follower.move(output, len(seq.tokens) - seq.n_prompt)
        allowed = follower.allowed(self.grammars.n_vocab)
        if follower.error is not None:
            return _fail(logits, seq, follower.error)
        ends = [t for t in eos if t in allowed]
        for t in ends:
            allowed.forbid(t)
        goes_on = bool(allowed)
        if ends and not goes_on:
            return _only(logits, eos)
        if ends and not _put_off(seq, len(history) - seq.n_prompt):
            for t in ends:
                allowed.allow(t)
        elif not goes_on:
            return _fail(logits, seq, "the constraint could not be followed any further: it allows no token here")
        allowed.apply(logits)
        if seq.params.min_tokens and seq.params.stop_token_ids and logits.max() == -np.inf:
            return _fail(
                logits, seq, "the constraint allows only tokens of stop_token_ids here, which min_tokens forbids"
            )
        return logits

    def _follower(self, seq: Sequence) -> Follower:
        found = seq.states.get(STATE)
        if found is None:
            assert self.grammars is not None
            assert seq.params.constraint is not None
            found = seq.states[STATE] = Follower(self.grammars.compile(seq.params.constraint))
        return found


def _put_off(seq: Sequence, n_output: int) -> bool:
    """Whether the end is to come later, if the constraint allows something else."""
    return seq.params.ignore_eos or n_output < seq.params.min_tokens


def _only(logits: np.ndarray, eos: list[int]) -> np.ndarray:
    """Force an end token, also where min_tokens has ruled them out; which one remains the model's choice."""
    ends = logits[eos]
    logits[:] = -np.inf
    logits[eos] = np.where(np.isneginf(ends), 0.0, ends)
    return logits


def _fail(logits: np.ndarray, seq: Sequence, why: str) -> np.ndarray:
    seq.error = why
    logits[:] = -np.inf
    return logits


@dataclass(frozen=True)
class Llguidance(Technique):
    def manifest(self) -> Manifest:
        return Manifest(seams=frozenset({"logits"}), paper="https://github.com/guidance-ai/llguidance")

    def build(self, context: Any) -> Masks:
        return Masks(context.tokenizer, context.eos)
