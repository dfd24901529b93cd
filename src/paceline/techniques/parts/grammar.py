"""Constraints as llguidance grammars: bounds, translation, trial, and compiled grammars kept for the next request.

llguidance (https://github.com/guidance-ai/llguidance) parses bytes with an Earley parser over lexemes whose automata are made as they are
needed, and walks the vocabulary's trie for a mask. It refuses JSON Schema keywords that it cannot keep to. It needs no model, so a process
that only takes requests can check them with its tokenizer alone.

Masks allow every tokenisation of an allowed text, not only the tokenizer's own ("no_forcing"): the model chooses.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from typing import Any, Literal

import llguidance
import numpy as np

from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core.errors import RequestError
from paceline.core.types import Constraint
from paceline.techniques.parts import json_schema
from paceline.techniques.parts.grammar_trial import Trial

MAX_REGEX = 8 << 10  # characters
MAX_GRAMMAR = 192 << 10  # 128 tools make about 95 KB
MAX_CHOICES = 4096
MAX_NESTING = 64  # brackets
MAX_KEPT = 128  # compiled grammars, and refusals

# Where JSON may have whitespace: one space, or a line's end with an indent. Models that may write any amount write nothing else for ever.
WHITESPACE = r"( |\r?\n[ \t]{0,20})"
_JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "lenient": False,
    "coerce_one_of": False,
}
_OPTIONS = '\n%llguidance {"no_forcing": true}'  # last, so that the lines of a client's grammar keep their numbers
_TOKEN_IDS = re.compile(r"<\[[0-9, -]{1,1000}\]>")  # for the trial's vocabulary of bytes they are all its end token
_WORDS = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/|%json\b|[()\[\]{}]')


def limits() -> llguidance.LLParserLimits:
    """What one matcher may use. Fuel bounds the time of compilation (about 20 ms) and of a mask (about 15 ms); a lexer state takes
    1 to 2 KB. Errors tell no parser states."""
    return llguidance.LLParserLimits(
        max_items_in_row=5_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def new_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Never raises for what is wrong with the grammar: see `is_error`."""
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits())


class Mask:
    """The tokens that may come next, a bit each: token t is bit t % 8 of byte t // 8.

    Of no meaning when the matcher `is_error` afterwards.
    """

    _ADDED = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
    _ADDED = _ADDED.astype(np.float32)  # what each byte adds to eight logits

    def __init__(self, matcher: llguidance.LLMatcher, n_vocab: int):
        self._bits = np.frombuffer(bytearray(matcher.compute_bitmask()), np.uint8)
        self._n = n_vocab

    def __contains__(self, token: int) -> bool:
        return bool(self._bits[token >> 3] >> (token & 7) & 1)

    def __bool__(self) -> bool:
        return bool(self._bits.any())

    def forbid(self, token: int) -> None:
        self._bits[token >> 3] &= ~(1 << (token & 7)) & 255

    def allow(self, token: int) -> None:
        self._bits[token >> 3] |= 1 << (token & 7)

    def tokens(self) -> np.ndarray:
        """int64 (n,): their ids."""
        return np.nonzero(np.unpackbits(self._bits, count=self._n, bitorder="little"))[0]

    def apply(self, logits: np.ndarray) -> None:
        """Make the logits (at least n_vocab) of all others -inf, in place."""
        logits[: self._n] += self._ADDED.take(self._bits, axis=0).reshape(-1)[: self._n]
        logits[self._n :] = -np.inf


class Grammar:
    """A compiled constraint; any number of sequences may follow it."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._start = matcher

    def matcher(self) -> llguidance.LLMatcher:
        """A matcher of one's own, at the beginning."""
        return self._start.deep_copy()


class Grammars:
    """Compiles constraints for one tokenizer and keeps the last MAX_KEPT. Safe to use from several threads; `compile` takes up to
    `grammar_trial.SECONDS` for a hostile text, so call it where waiting is no harm.

    eos: the model's end tokens; by default the tokenizer's. tried: what is to be compiled has passed `check` in another process, so that
    it need not be tried here again.
    """

    def __init__(self, tokenizer: Tokenizer, eos: frozenset[int] | None = None, tried: bool = False):
        self.tried = tried
        self.tokenizer = tokenizer
        self.n_vocab = tokenizer.n_vocab
        self.eos = sorted(t for t in (eos or tokenizer.ends) if t < self.n_vocab)
        special = tokenizer.backend.get_added_tokens_decoder()
        self._trial = Trial([token.content for token in special.values() if token.special])
        # What became of a constraint: compiled, why it is refused, or that it passed `check`.
        self._kept: OrderedDict[Constraint, Grammar | str | Literal[True]] = OrderedDict()
        self._ll: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()  # of the table
        self._work = threading.Lock()  # of compilation

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a constraint. Raises RequestError that names what is wrong with it, or cannot be kept to."""
        kept = self._look_up(constraint)
        if kept is None or kept is True:
            with self._work:
                kept = self._look_up(constraint)
                kept = self._keep(constraint) if kept is None or kept is True else kept
        if isinstance(kept, str):
            raise RequestError(kept)
        return kept

    def check(self, constraint: Constraint) -> None:
        """Raise RequestError as `compile` does, but for what only the vocabulary can show, which is not looked at here."""
        kept = self._look_up(constraint)
        if kept is None:
            try:
                self._translated(constraint, try_it=True)
            except RequestError as e:
                self._remember(constraint, str(e))
                raise
            self._remember(constraint, True)
        elif isinstance(kept, str):
            raise RequestError(kept)

    def passed(self, constraint: Constraint) -> bool:
        """Whether it is known to be usable; takes no time."""
        return isinstance(self._look_up(constraint), (Grammar, bool))

    def warm(self) -> None:
        """Make the vocabulary's trie now rather than at the first constraint."""
        with self._work:
            self._tokens()

    def close(self) -> None:
        """End the helper process."""
        self._trial.close()

    def _look_up(self, constraint: Constraint) -> Grammar | str | Literal[True] | None:
        with self._lock:
            if constraint in self._kept:
                self._kept.move_to_end(constraint)
            return self._kept.get(constraint)

    def _keep(self, constraint: Constraint) -> Grammar | str:
        """Compile for now and later; refusals are kept too, since a hostile text may come again."""
        found: Grammar | str
        try:
            found = self._compile(constraint)
        except RequestError as e:
            found = str(e)
        self._remember(constraint, found)
        return found

    def _remember(self, constraint: Constraint, found: Grammar | str | Literal[True]) -> None:
        with self._lock:
            self._kept[constraint] = found
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)

    def _translated(self, constraint: Constraint, *, try_it: bool) -> tuple[str, Any]:
        """The grammar, and its JSON Schema where it has one. Raises RequestError."""
        if not self.eos:
            raise RequestError("constraint: the model has no end token, so constrained output could not end")
        if not self.tokenizer.scheme.joins:
            raise RequestError(
                "constraint: text of this model's tokenizer is not its tokens' bytes joined; no constraint can be kept"
            )
        text, schema = translate(constraint)
        grammar = llguidance.LLMatcher.grammar_from_lark(text + _OPTIONS)
        problem = self._trial.why_not(_TOKEN_IDS.sub("<[256]>", grammar)) if try_it else None
        if problem is not None:
            raise RequestError(_say(constraint, problem, schema))
        return grammar, schema

    def _compile(self, constraint: Constraint) -> Grammar:
        grammar, schema = self._translated(constraint, try_it=not self.tried)
        found = Grammar(new_matcher(self._tokens(), grammar))
        first = found.matcher()
        Mask(first, self.n_vocab)
        if first.is_error():
            raise RequestError(_say(constraint, str(first.get_error()), schema))
        return found

    def _tokens(self) -> llguidance.LLTokenizer:
        """The vocabulary as a trie, made when first needed: half a second for 128k tokens."""
        if self._ll is None:
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(self.tokenizer, self.eos))
            self._ll = llguidance.LLTokenizer(wrapper, n_vocab=self.n_vocab, eos_token=self.eos)
        return self._ll


class _Vocabulary:
    """The bytes of every token, as llguidance takes them: one account of them, whatever kind of tokenizer it is."""

    def __init__(self, tokenizer: Tokenizer, eos: list[int]):
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        self.special_token_ids = sorted(tokenizer.special_ids | set(eos))
        self.eos_token_id = eos[0]
        self.bos_token_id = tokenizer.bos

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


# --- translation ----------------------------------------------------------------------------------


def translate(constraint: Constraint) -> tuple[str, Any]:
    """A constraint as a Lark grammar, and its JSON Schema where it has one. Raises RequestError."""
    kind, text = constraint.kind, constraint.text
    if kind == "json_object":
        return "start: " + _embed({"type": "object"}), None
    if kind == "json_schema":
        schema = json_schema.parse(text, "schema")
        if schema is False:
            raise RequestError("schema: false allows nothing")
        json_schema.check(schema, "schema")
        return "start: " + _embed(schema), schema
    if kind == "regex":
        _bound("regex", text, MAX_REGEX)
        return f"start: WHOLE\nWHOLE: /{llguidance.regex_to_lark(text, 'd')}/", None
    if kind == "choice":
        return _choice(text), None
    _bound("grammar", text, MAX_GRAMMAR)
    return _grammar(text), None


def _embed(schema: Any) -> str:
    """A schema inside a grammar, with our options; booleans are schemas too."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_OPTIONS}, ensure_ascii=False)


def _choice(text: str) -> str:
    found = json_schema.parse(text, "choice")
    if not isinstance(found, list) or not all(isinstance(c, str) for c in found) or not 0 < len(found) <= MAX_CHOICES:
        raise RequestError(f"choice: must be a JSON list of 1 to {MAX_CHOICES:,} strings")
    try:
        written = [json.dumps(c, ensure_ascii=False) for c in dict.fromkeys(found) if c.encode("utf-8") is not None]
    except UnicodeEncodeError as e:
        raise RequestError(f"choice: is not valid Unicode text ({e}); remove unpaired surrogates") from e
    return "start: CHOICE\nCHOICE: " + " | ".join(written)


def _grammar(text: str) -> str:
    """Lark as it is, but for schemas within it, which get our options; GBNF translated."""
    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        _check_nesting(text)
        try:
            text = any_to_lark(text).replace("%llguidance {}", "")
        except Exception as e:  # a parser in Python that says what it expected where, or just runs off the end
            raise RequestError(f"grammar: is not valid GBNF ({str(e)[:300] or type(e).__name__})") from e
    _check_nesting(text)
    out, at = [], 0
    for word in _WORDS.finditer(text):
        if word[0] != "%json" or word.start() < at:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(text, len(text) - len(text[word.end() :].lstrip()))
        except (ValueError, RecursionError) as e:
            raise RequestError(f"grammar: what follows %json is not valid JSON ({str(e)[:200]})") from e
        schema = json_schema.parse(json.dumps(schema), "grammar: %json")
        json_schema.check(schema, "grammar: %json")
        out += [text[at : word.start()], _embed(schema)]
        at = end
    return "".join(out) + text[at:]


def _check_nesting(text: str) -> None:
    depth = 0
    for word in _WORDS.finditer(text):
        depth += (word[0] in "([{") - (word[0] in ")]}")
        if depth > MAX_NESTING:
            line = text.count("\n", 0, word.start()) + 1
            raise RequestError(f"grammar: line {line}: brackets are nested more than {MAX_NESTING} deep")


def _bound(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise RequestError(f"{name}: {len(text):,} characters, more than the {most:,} that are accepted; shorten it")


def _say(constraint: Constraint, problem: str, schema: Any) -> str:
    """What the compiler said, without the translation that the client did not write."""
    problem = problem.split("<non-verbose/>")[0].strip()
    if constraint.kind == "json_schema":
        problem = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", problem).split("\n   ")[0]
        return "schema: " + json_schema.explain(problem.strip()[:400], schema)
    name = constraint.kind
    if name != "grammar":  # no places in a text that the client has not seen
        problem = re.sub(r"^at \d+\(\d+\): | \(in regex\)", "", problem).split("\n   1 | ")[0]
    return f"{name}: {problem[:400]}"
