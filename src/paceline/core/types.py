"""What a client asks for and what it gets. Requests are immutable and checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from paceline.core.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_N = 128
MAX_LOGPROBS = 64
MAX_STOPS = 64
MAX_BIAS = 1024
MAX_CONSTRAINT = 256 << 10  # bytes of UTF-8

ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True)
class Constraint:
    """What the output must be, as plain data; the technique that keeps to it says what it can do (`output/llguidance`).

    text by kind: json_schema, a JSON Schema as JSON; json_object, nothing (any JSON object); regex, an expression that the whole output
    matches; choice, a JSON list of strings of which the output is one; grammar, a context-free grammar (Lark or GBNF).
    """

    kind: ConstraintKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            raise RequestError(
                f"constraint: kind = {self.kind!r}: must be one of {', '.join(get_args(ConstraintKind))}"
            )
        if not isinstance(self.text, str):
            raise RequestError(f"constraint: text must be a string, found {type(self.text).__name__}")
        if bool(self.text) == (self.kind == "json_object"):
            raise RequestError(f"constraint: {self.kind} {'takes no' if self.text else 'needs a'} text")
        try:
            n = len(self.text.encode("utf-8"))
        except UnicodeEncodeError as e:
            raise RequestError(f"constraint: is not valid Unicode text ({e}); remove unpaired surrogates") from e
        if n > MAX_CONSTRAINT:
            raise RequestError(
                f"constraint: {n:,} bytes, more than the {MAX_CONSTRAINT:,} that are accepted; shorten it"
            )


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Defaults: plain sampling at temperature 1, as OpenAI's API; temperature 0 is greedy.

    The order is: penalties, logit bias, min_tokens, technique logits chain, temperature, top_k, top_p, min_p. logprobs are those of the
    model's own distribution (before all of these). `seed` makes a request repeatable, alone or in any batch.

    Under a constraint an end token ends the output always: it comes only where the constraint is satisfied, and must come where nothing
    else may. min_tokens and ignore_eos then put the end off for as long as the constraint allows something else.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (CTRL, arXiv:1909.05858)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    max_tokens: int | None = None  # None: up to the context
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None  # how many alternatives with each chosen token; None: none, not even the chosen one's
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    constraint: Constraint | None = None
    show_special: Sequence[int] = ()  # ids that stay in the text all the same: markers that a parser looks for

    @cached_property
    def adjusts(self) -> bool:
        """Whether penalties or biases change the logits."""
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "show_special", tuple(self.show_special))
        problems = list(self._problems())
        if problems:
            raise RequestError("; ".join(problems))

    def _problems(self) -> Any:
        def number(name: str, low: float, high: float, *, integer: bool = False) -> Any:
            v = getattr(self, name)
            kind = int if integer else (int, float)
            if isinstance(v, bool) or not isinstance(v, kind) or not low <= v <= high:  # NaN is not, either
                yield f"{name} = {v!r}: must be {'an integer' if integer else 'a number'} from {low:g} to {high:g}"

        yield from number("temperature", 0.0, 100.0)
        yield from number("top_k", 0, 1 << 30, integer=True)
        yield from number("top_p", 0.0, 1.0)
        if not self.top_p > 0:
            yield f"top_p = {self.top_p!r}: must be greater than 0 (use temperature=0 for greedy decoding)"
        yield from number("min_p", 0.0, 1.0)
        yield from number("repetition_penalty", 1e-3, 1e3)
        yield from number("presence_penalty", -2.0, 2.0)
        yield from number("frequency_penalty", -2.0, 2.0)
        yield from number("min_tokens", 0, 1 << 30, integer=True)
        yield from number("n", 1, MAX_N, integer=True)
        for name in ("max_tokens", "seed"):
            if getattr(self, name) is not None:
                yield from number(name, 1 if name == "max_tokens" else -(1 << 63), (1 << 63) - 1, integer=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                yield from number(name, 0, MAX_LOGPROBS, integer=True)
        if len(self.stop) > MAX_STOPS or any(not isinstance(s, str) or not s or len(s) > 1024 for s in self.stop):
            yield f"stop: at most {MAX_STOPS} non-empty strings of at most 1024 characters"
        for name in ("stop_token_ids", "show_special"):
            ids = getattr(self, name)
            if len(ids) > MAX_STOPS or any(not isinstance(t, int) or t < 0 for t in ids):
                yield f"{name}: at most {MAX_STOPS} non-negative integers"
        if len(self.logit_bias) > MAX_BIAS or any(
            not isinstance(t, int) or t < 0 or not -100 <= b <= 100 for t, b in self.logit_bias.items()
        ):
            yield f"logit_bias: at most {MAX_BIAS} token ids with a bias from -100 to 100"
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            yield f"constraint: must be a Constraint, found {type(self.constraint).__name__}"
        if self.max_tokens is not None and isinstance(self.max_tokens, int) and self.min_tokens > self.max_tokens:
            yield f"min_tokens = {self.min_tokens}: must not exceed max_tokens = {self.max_tokens}"

    def with_(self, **changes: Any) -> SamplingParams:
        return replace(self, **changes)


GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Request:
    """What a client asked for; immutable. `tokens` is the tokenised prompt."""

    id: str
    tokens: tuple[int, ...]
    params: SamplingParams
    generate: bool = True  # False: only compute (scoring, embedding)
    pool: Literal["mean", "last", "logits"] | None = None  # collect final hidden states, or all logits
    park: bool = False  # keep the state when done, to be forked or continued
    priority: int = 0
    salt: str = ""  # prefixes are shared only between requests of equal salt
    arrival: float = 0.0  # seconds on the engine's clock
    owner: str = ""  # for whom; policies that share fairly count per owner
    ttft_target: float | None = (
        None  # seconds to the first token, for policies that heed deadlines; None: the policy's own
    )
    tpot_target: float | None = None  # seconds per further token, likewise
    adapter: str = ""  # the name of a loaded adapter; "": the plain model

    def __post_init__(self) -> None:
        """Raise RequestError for a target that no clock can meet, and for a salt that could be mistaken."""
        targets = {"ttft_target": self.ttft_target, "tpot_target": self.tpot_target}
        wrong = [f"{k} = {v!r}: must be a number of seconds above 0" for k, v in targets.items() if not _is_duration(v)]
        if "\0" in self.salt:  # behind one lies what an adapter computes (`Sequence.salt`)
            wrong.append("salt: must not contain NUL")
        if wrong:
            raise RequestError("; ".join(wrong))


def _is_duration(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and math.isfinite(value) and value > 0)


@dataclass(frozen=True)
class Resumed:
    """What one completion of a request had when the engine that served it was lost: its tokens, and how it had ended."""

    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability (natural log) of a chosen token and of the best alternatives, as (token id, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """One sequence's answer. `text` is the decoded output without the stop string (unless include_stop)."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Timing:
    """Seconds on the engine's clock. prompt = arrival to first token, without the time spent waiting in the queue."""

    queue: float = 0.0
    prompt: float = 0.0
    generation: float = 0.0
    first_token: float = 0.0  # since arrival


@dataclass
class Output:
    """The answer to one request."""

    id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    n_cached: int = 0  # prompt tokens whose state was reused
    n_preempted: int = 0
    timing: Timing = field(default_factory=Timing)
    error: str | None = None
    sequences: list[Any] = field(default_factory=list, repr=False)  # the engine's own; parked ones can be continued

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids


@dataclass(frozen=True)
class Delta:
    """A piece of a stream: new tokens and text of one completion; `finish_reason` with the last piece."""

    request: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
