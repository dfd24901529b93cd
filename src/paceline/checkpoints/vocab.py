"""Vocabularies as `tokenizers` pipelines: byte-level BPE from ranks, and what a GGUF file carries under
`tokenizer.ggml.*`.

A GGUF vocabulary of model "llama" is SentencePiece BPE: no merge list, but a score per token; of all adjacent pairs
whose concatenation is a token the one with the best score is merged next, the leftmost first among equals. `tokenizers`
orders merges by rank, so each way of composing a token becomes a merge, ranked by the token's score. Model "gpt2" is
byte-level BPE with explicit merges and a named pre-tokenizer. (Key names: github.com/ggml-org/ggml, docs/gguf.md;
SentencePiece: arXiv:1808.06226)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from paceline.checkpoints.pretokenize import PreTokenizer, pre_tokenizer
from paceline.core.errors import CheckpointError

MAX_TOKENS = 1 << 21
MAX_MERGES = 1 << 23
MAX_TOKEN_CHARS = 4096  # of one token; real ones stay below 256
MAX_SPLITS = 1 << 24  # ways of cutting all tokens in two: bounds the work of deriving merges
SPACE = "▁"  # U+2581, SentencePiece's visible space

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
}
# Texts that end a turn or a document in the families that exist; a file rarely names more than one of its own.
_ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT> "  # noqa: SIM905
    "<|end_of_text|> "
    "<end_of_utterance> <｜end▁of▁sentence｜>".split()
)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, the numbers of SentencePiece."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A pipeline and what a checkpoint says around it.

    special: names as in tokenizer_config.json ("bos_token") -> token text. ends: ids that end a generation.
    chat_template: one template, several by name, or None.
    """

    backend: Tokenizer
    special: dict[str, str]
    ends: frozenset[int]
    chat_template: str | dict[str, str] | None = None


def add_ends(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode` put the token `bos` in front and `eos` behind (None: neither)."""
    if bos is None and eos is None:
        return
    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token is not None}
    single = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    pair = [*single, *[f"{piece}:1" if piece != "$A" else "$B:1" for piece in single]]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))


def byte_level_bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer) -> Tokenizer:
    """Byte-level BPE: token -> id, merges best first, and the rule that splits text into words.

    Raises CheckpointError for a merge whose parts or result are no tokens.
    """
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"merge {left[:80]!r} + {right[:80]!r} needs a token that the vocabulary lacks; vocabulary and merges "
                "belong to different models or one of them is corrupt"
            )
    backend = _backend(models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=pre.ignore_merges))
    normalizer = pre.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _backend(model: models.Model) -> Tokenizer:
    backend = Tokenizer(model)
    backend.encode_special_tokens = False
    return backend


# --- GGUF ----------------------------------------------------------------------------------------


def gguf_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a GGUF file's metadata (keys as in the file, arrays as lists).

    Raises CheckpointError for a kind of vocabulary not supported and for data that contradict themselves.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return _sentencepiece(_Fields(metadata, bos=1, eos=2, unknown=0))
    if kind == "gpt2":
        return _bpe(_Fields(metadata))
    if kind is None:
        raise CheckpointError(
            "tokenizer.ggml.model: missing; the file carries no vocabulary, put a tokenizer.json beside it"
        )
    raise CheckpointError(
        f'tokenizer.ggml.model: {str(kind)[:80]!r} is not supported (supported: "llama", "gpt2"); put the model\'s '
        "tokenizer.json beside the file"
    )


class _Fields:
    """The tokenizer keys of one file, checked: equal lengths, known types, finite scores, ids in range, no token
    twice."""

    def __init__(self, metadata: Mapping[str, Any], **defaults: int):
        self.metadata = metadata
        self.tokens = self._tokens()
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.special_ids = self._special_ids(defaults)
        self.types = self._types()

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def array(self, key: str, limit: int, n: int | None = None) -> list[Any] | None:
        value = self.get(key)
        if value is None:
            return None
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, list):
            raise CheckpointError(f"tokenizer.ggml.{key}: must be an array, found {type(value).__name__}")
        if len(value) > limit or (n is not None and len(value) != n):
            expected = f"{n}, one per token" if n is not None else f"at most {limit}"
            raise CheckpointError(
                f"tokenizer.ggml.{key}: {len(value)} entries, expected {expected}; the file is corrupt"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"tokenizer.ggml.{key}: must be a boolean, found {value!r:.80}")
        return value

    def _tokens(self) -> list[str]:
        tokens = self.array("tokens", MAX_TOKENS)
        if not tokens:
            raise CheckpointError("tokenizer.ggml.tokens: missing or empty; the file carries no vocabulary")
        out: list[str] = []
        seen: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if not isinstance(token, str) or len(token) > MAX_TOKEN_CHARS:
                raise CheckpointError(
                    f"tokenizer.ggml.tokens[{i}]: not a string of at most {MAX_TOKEN_CHARS} characters"
                )
            text = token or f"[EMPTY_{i}]"
            if seen.setdefault(text, i) != i:
                raise CheckpointError(
                    f"tokenizer.ggml.tokens: {text[:80]!r} occurs at {seen[text]} and {i}; the file is corrupt"
                )
            out.append(text)
        return out

    def _types(self) -> list[int]:
        types = self.array("token_type", MAX_TOKENS, len(self.tokens))
        if types is None:
            return self._guessed_types()
        for i, kind in enumerate(types):
            if type(kind) is not int or not 0 <= kind <= TokenType.BYTE:
                raise CheckpointError(
                    f"tokenizer.ggml.token_type[{i}]: {kind!r:.40} is no token type (0 to 6); the file is corrupt"
                )
        return types

    def _guessed_types(self) -> list[int]:
        """Without the key: bytes by their text, the named tokens as control, everything else normal."""
        named = set(self.special_ids.values())
        unknown = self.special_ids.get("unknown")
        return [
            TokenType.UNKNOWN if i == unknown
            else TokenType.CONTROL if i in named
            else TokenType.BYTE if _BYTE.fullmatch(token)
            else TokenType.NORMAL
            for i, token in enumerate(self.tokens)
        ]  # fmt: skip

    def _special_ids(self, defaults: Mapping[str, int]) -> dict[str, int]:
        found = {name: i for name, i in defaults.items() if i < len(self.tokens)}
        for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", "separator", "padding", "mask"):
            value = self.get(f"{name}_token_id")
            if value is None:
                continue
            if type(value) is not int or not 0 <= value < len(self.tokens):
                raise CheckpointError(
                    f"tokenizer.ggml.{name}_token_id: {value!r:.40} is not an id below {len(self.tokens)}, the "
                    f"vocabulary's size"
                )
            found[name] = value
        return found

    def special(self) -> dict[str, str]:
        """Named tokens as tokenizer_config.json calls them."""
        return {named: self.tokens[self.special_ids[key]] for key, named in _NAMED.items() if key in self.special_ids}

    def ends(self) -> frozenset[int]:
        named = {self.special_ids[key] for key in ("eos", "eot", "eom") if key in self.special_ids}
        return frozenset(named | {self.ids[text] for text in _ENDS if text in self.ids})

    def added(self) -> list[AddedToken]:
        """Tokens matched in the text before anything else: control ones as special, the author's own ones always."""
        ends, out = self.ends(), []
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or (kind == TokenType.NORMAL and i in ends)
            if special or kind == TokenType.USER_DEFINED:
                out.append(AddedToken(token, special=special, normalized=False))
        return out

    def finish(self, backend: Tokenizer, add_bos: bool, add_eos: bool) -> Vocabulary:
        """Special tokens, BOS/EOS and the chat template on top of a model."""
        backend.add_tokens(self.added())
        special = self.special()
        bos = special.get("bos_token") if self.flag("add_bos_token", add_bos) else None
        eos = special.get("eos_token") if self.flag("add_eos_token", add_eos) else None
        add_ends(backend, bos, eos)
        return Vocabulary(backend, special, self.ends(), _chat_template(self.metadata))


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    prefix = "tokenizer.chat_template"
    default = metadata.get(prefix)
    named = {k[len(prefix) + 1 :]: v for k, v in metadata.items() if k.startswith(prefix + ".")}
    for key, value in [(prefix, default), *named.items()]:
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{key}: a chat template must be a string, found {type(value).__name__}")
    if named:
        return {**({"default": default} if default is not None else {}), **named}
    return default


def _sentencepiece(fields: _Fields) -> Vocabulary:
    scores = fields.array("scores", MAX_TOKENS, len(fields.tokens))
    if scores is None:
        raise CheckpointError(
            "tokenizer.ggml.scores: missing; without scores the merge order of this vocabulary is unknown"
        )
    for i, score in enumerate(scores):
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise CheckpointError(
                f"tokenizer.ggml.scores[{i}]: {score!r:.40} is not a finite number; the file is corrupt"
            )
    has_bytes = _check_bytes(fields)
    unknown = fields.special_ids.get("unknown")
    backend = _backend(
        models.BPE(
            vocab=fields.ids,
            merges=derive_merges(fields, scores),
            unk_token=None if unknown is None else fields.tokens[unknown],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    prefix = fields.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return fields.finish(backend, add_bos=True, add_eos=False)


def _check_bytes(fields: _Fields) -> bool:
    """Whether there are byte tokens; each must be <0xNN> with two upper-case hexadecimal digits."""
    found = [i for i, kind in enumerate(fields.types) if kind == TokenType.BYTE]
    for i in found:
        if not _BYTE.fullmatch(fields.tokens[i]):
            raise CheckpointError(
                f"tokenizer.ggml.tokens[{i}]: {fields.tokens[i][:80]!r} is typed as a byte but is not <0x00> to <0xFF>"
            )
    return bool(found)


def derive_merges(fields: _Fields, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way of composing a normal token of two others, best score first.

    Control, unknown, byte and unused tokens take no part, as in SentencePiece. Among equal scores the longer token goes
    first, then the longer left part: that makes a run of one character grow from the left, as merging leftmost first
    does (Llama's tokens of 2 to 16 spaces all have one score).
    """
    normal = {
        t
        for t, kind in zip(fields.tokens, fields.types, strict=True)
        if kind in (TokenType.NORMAL, TokenType.UNDEFINED)
    }
    whole = [token for token in normal if len(token) > 1]
    if sum(map(len, whole)) > MAX_SPLITS:
        raise CheckpointError(
            f"tokenizer.ggml.tokens: more than {MAX_SPLITS} ways of splitting the tokens; the file is corrupt"
        )
    distinct = len({scores[fields.ids[token]] for token in whole})
    if len(whole) > 16 and distinct < len(whole) // 2:
        raise CheckpointError(
            f"tokenizer.ggml.scores: only {distinct} different scores for {len(whole)} tokens, which do not say in "
            "what order to merge; convert the model again from its tokenizer.model, or put its tokenizer.json beside "
            "the file"
        )
    ways = [
        (-scores[fields.ids[token]], -len(token), fields.ids[token], -cut, token)
        for token in whole
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    ways.sort()
    return [(token[:-cut], token[-cut:]) for *_, cut, token in ways]


def _bpe(fields: _Fields) -> Vocabulary:
    merges = fields.array("merges", MAX_MERGES)
    if merges is None:
        raise CheckpointError("tokenizer.ggml.merges: missing; a BPE vocabulary cannot be used without its merges")
    pairs = []
    for i, merge in enumerate(merges):
        # A token may itself begin with a space, so the separator is looked for from the second character on.
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 0 or cut == len(merge) - 1:
            raise CheckpointError(
                f"tokenizer.ggml.merges[{i}]: {merge!r:.80} is not two tokens with a space between them"
            )
        pairs.append((merge[:cut], merge[cut + 1 :]))
    name = fields.get("pre")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"tokenizer.ggml.pre: must be a string, found {name!r:.80}")
    pre = pre_tokenizer("default" if name is None else name)
    return fields.finish(byte_level_bpe(fields.ids, pairs, pre), add_bos=pre.add_bos, add_eos=False)
