"""Text to token ids and back, over the `tokenizers` library, from a model folder or from GGUF metadata.

tokenizer.json is authoritative: its post-processor alone decides whether BOS and EOS are added, as in transformers 5;
`add_bos_token` of tokenizer_config.json counts only for folders that have no tokenizer.json.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

# batches of one gain nothing by threads, and the library warns when a process that has used them forks
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import AddedToken, models

from paceline.checkpoints.detokenize import Scheme, scheme_of
from paceline.checkpoints.files import AtomicFile, is_count, open_regular, read_json
from paceline.checkpoints.pretokenize import pre_tokenizer
from paceline.checkpoints.vocab import Vocabulary, add_ends, byte_level_bpe, gguf_vocabulary
from paceline.core.errors import CheckpointError, RequestError

MAX_FILE = 256 << 20  # bytes of tokenizer.json, vocab.json or merges.txt; the largest in use is about 35 MB
MAX_TEMPLATE = 4 << 20
MAX_CHARS = 64 << 20  # of one text to encode

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_PRE_OF_MODEL = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen2_moe": "qwen2", "qwen3": "qwen2", "qwen3_moe": "qwen2",
                 "llama": "llama-bpe", "starcoder2": "starcoder", "falcon": "falcon", "olmo": "olmo"}  # fmt: skip


class Tokenizer:
    """Encodes and decodes; safe to use from several threads.

    special_tokens: "bos_token" and the like -> text, as chat templates see them. ends: ids that end a generation.
    chat_template: Jinja source, several of them by name, or None.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.backend = vocabulary.backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens = dict(vocabulary.special)
        self.chat_template = vocabulary.chat_template
        self.bos = self._named("bos_token")
        self.eos = self._named("eos_token")
        self.ends = vocabulary.ends | ({self.eos} if self.eos is not None else frozenset())
        self._lock = threading.Lock()  # encode_special_tokens is a setting of the backend, not of a call

    @classmethod
    def from_folder(cls, path: str | Path, pre: str | None = None) -> Tokenizer:
        """Load tokenizer.json, or a byte-level BPE vocabulary with its merges.

        pre: for folders without tokenizer.json, the name of the rule that splits text into words (`pretokenize`); by
        default it follows from config.json, and is GPT-2's for a vocabulary that has GPT-2's <|endoftext|>.
        Raises CheckpointError for missing, corrupt or contradictory files.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is not a folder; give the folder that holds tokenizer.json")
        config = _config(folder)
        full = folder / "tokenizer.json"
        if full.is_file():
            backend = _parse(_read(full, MAX_FILE), full)
            _add_tokens(backend, folder, config)
            special = _special(config)
        else:
            backend, special = _from_bpe_files(folder, config, pre)
        ends = config.get("eog_token_ids", [])
        if not isinstance(ends, list) or not all(is_count(i) for i in ends):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: eog_token_ids must be a list of token ids")
        return cls(Vocabulary(backend, special, frozenset(ends), _templates(folder, config)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The vocabulary a GGUF file carries; metadata is keyed as in the file. Raises CheckpointError."""
        return cls(gguf_vocabulary(metadata))

    # --- text and ids ---

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: add BOS/EOS as the checkpoint wants (False for a rendered chat template, which has its own).
        parse_special: special tokens written in the text become those tokens; False for text that is not trusted.
        Raises RequestError for text too long or not encodable.
        """
        if not isinstance(text, str):
            raise RequestError(f"prompt: must be a string, found {type(text).__name__}")
        if len(text) > MAX_CHARS:
            raise RequestError(
                f"prompt: {len(text):,} characters, more than the {MAX_CHARS:,} that are accepted; shorten it"
            )
        try:
            with self._lock:
                self.backend.encode_special_tokens = not parse_special
                # a batch of one: unlike `encode` it lets other threads run meanwhile, and keeps no offsets
                return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeError, TypeError) as e:
            raise RequestError(f"prompt: is not valid Unicode text ({e}); remove unpaired surrogates") from e
        except Exception as e:  # the library raises bare Exception for what its model cannot express
            raise RequestError(f"prompt: cannot be tokenized ({str(e)[:300]})") from e

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing. Raises
        RequestError."""
        try:
            # left out here and not by the library, which goes by text and misses special tokens marked as normalized
            left_out = self.special_ids if skip_special_tokens else frozenset()
            kept = [int(i) for i in ids if i not in left_out]
            return self.backend.decode_batch([kept], skip_special_tokens=False)[0]  # lets other threads run meanwhile
        except (OverflowError, TypeError, ValueError) as e:
            raise RequestError(f"token ids: must be integers from 0 to 2^32-1 ({e})") from e

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary writes it; None for an id it does not have."""
        return self.backend.id_to_token(token) if 0 <= token < 1 << 32 else None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for inside a text, without regard to its neighbours; b"" for an id without a
        token.

        Raises RequestError for a negative id.
        """
        if token < 0:
            raise RequestError(f"token id {token}: must not be negative")
        piece = self.piece(token)
        return b"" if piece is None else self.scheme.bytes_of(piece)

    @cached_property
    def scheme(self) -> Scheme:
        """How tokens become text, one at a time (for `Detokenizer`)."""
        decoder = self.backend.decoder
        if decoder is None:
            return scheme_of(None, None)
        # The library shows a decoder's settings only in the JSON of a whole pipeline; an empty one is quick to write.
        empty = tokenizers.Tokenizer(models.BPE())
        empty.decoder = decoder
        return scheme_of(json.loads(empty.to_str())["decoder"], decoder)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def n_vocab(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def check(self, n_vocab_model: int) -> None:
        """Raises CheckpointError when the tokenizer has ids that the model's embedding of n_vocab_model rows lacks."""
        if self.n_vocab > n_vocab_model:
            raise CheckpointError(
                f"the tokenizer has {self.n_vocab} token ids and the model {n_vocab_model} embeddings: they belong to "
                "different models, or tokens were added without resizing the model"
            )

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    # --- writing ---

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template, so that the folder needs no other file.

        Raises CheckpointError when it cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CheckpointError(f"{folder}: cannot be created ({e})") from e
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.ends:
            config["eog_token_ids"] = sorted(self.ends)
        if isinstance(self.chat_template, dict):
            config["chat_template"] = [{"name": k, "template": v} for k, v in self.chat_template.items()]
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with self._lock:
            self.backend.encode_special_tokens = False
            _write(folder / "tokenizer.json", self.backend.to_str(pretty=False))
        _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1))


def _write(path: Path, text: str) -> None:
    with AtomicFile(path) as f:
        f.write(text.encode("utf-8"))


# --- folders -------------------------------------------------------------------------------------


def _read(path: Path, limit: int) -> str:
    with open_regular(path) as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path}: larger than {limit >> 20} MiB, which no such file is")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}); download it again") from e


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library panics on some contradictions, which is no Exception
        raise CheckpointError(f"{path}: is not a usable tokenizer ({str(e)[:300]}); download it again") from e


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by special_tokens_map.json as older folders have it."""
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if (folder / "special_tokens_map.json").is_file():
        for name, token in read_json(folder / "special_tokens_map.json").items():
            config.setdefault(name, token)
    return config


def _content(token: Any, where: str) -> str | None:
    """A token as the configuration files write it: text, or an object with its text under "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise CheckpointError(f"{where}: a token must be text or an object with a content, found {token!r:.80}")
    return text


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    named = {name: _content(config.get(name), f"tokenizer_config.json, {name}") for name in NAMED_TOKENS}
    return {name: text for name, text in named.items() if text}


def _added(fields: Mapping[str, Any], where: str) -> AddedToken:
    text = _content(fields, where)
    if not text:
        raise CheckpointError(f"{where}: has no content")
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(text, **{n: bool(fields[n]) for n in names if n in fields})


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Tokens that tokenizer_config.json or added_tokens.json know and tokenizer.json lacks; then the named ones as
    special."""
    wanted: list[tuple[int, AddedToken]] = []
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be an object")
    for key, fields in table.items():
        where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder[{key[:40]!r}]"
        if not key.isdecimal() or not isinstance(fields, dict):
            raise CheckpointError(f"{where}: must map an id to an object")
        wanted.append((int(key), _added(fields, where)))
    if (folder / "added_tokens.json").is_file():
        known = {token.content for _, token in wanted}
        for text, i in read_json(folder / "added_tokens.json").items():
            if not is_count(i):
                raise CheckpointError(
                    f"{folder / 'added_tokens.json'}: {text[:80]!r} has the id {i!r:.40}, which is none"
                )
            if text not in known:
                wanted.append((i, AddedToken(text, special=False)))
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(wanted, key=lambda pair: pair[0]):
        if token.content not in present:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise CheckpointError(
                f"{folder}: token {token.content[:80]!r} should have the id {i} and gets "
                f"{backend.token_to_id(token.content)}; tokenizer.json and the added tokens belong to different models"
            )
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in dict.fromkeys(_special(config).values()) if text not in special]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _from_bpe_files(
    folder: Path, config: dict[str, Any], pre: str | None
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    for vocab_name, merges_name in _BPE_FILES:
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            vocab, merges = _bpe_files(folder / vocab_name, folder / merges_name)
            break
    else:
        raise CheckpointError(_no_tokenizer(folder))
    rule = pre_tokenizer(pre or _pre_of(folder, vocab))
    special = _special(config)
    if "<|endoftext|>" in vocab:
        special = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), **special}
    backend = byte_level_bpe(vocab, merges, rule)
    _add_tokens(backend, folder, {**config, **special})
    bos = special.get("bos_token") if config.get("add_bos_token", rule.add_bos) else None
    add_ends(backend, bos, special.get("eos_token") if config.get("add_eos_token", False) else None)
    return backend, special


def _no_tokenizer(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder}: has only a SentencePiece tokenizer.model; make a tokenizer.json once, with transformers and "
            f"sentencepiece "
            'installed: python -c "from transformers import AutoTokenizer as T; '
            "T.from_pretrained('FOLDER').save_pretrained('FOLDER')\""
        )
    return f"{folder}: has no tokenizer.json (nor vocab.json with merges.txt); copy it from the model's original folder"


def _pre_of(folder: Path, vocab: Mapping[str, int]) -> str:
    if (folder / "config.json").is_file():
        found = _PRE_OF_MODEL.get(str(read_json(folder / "config.json").get("model_type")))
        if found is not None:
            return found
    if "<|endoftext|>" in vocab:
        return "gpt-2"
    raise CheckpointError(
        f"{folder}: has a BPE vocabulary but nothing that says how text is split into words; add the model's "
        "tokenizer.json, or name the rule (pre='llama-bpe', 'qwen2', ...)"
    )


def _bpe_files(vocab_path: Path, merges_path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = read_json(vocab_path)
    if (
        not vocab
        or not all(is_count(i) and i < 1 << 31 for i in vocab.values())
        or len(set(vocab.values())) != len(vocab)
    ):
        raise CheckpointError(f"{vocab_path}: must map each token to an id of its own")
    merges = []
    lines = _read(merges_path, MAX_FILE).split("\n")
    for n, line in enumerate(lines, 1):
        if (n == 1 and line.startswith("#version")) or not line.strip("\r"):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise CheckpointError(f"{merges_path}:{n}: {line[:80]!r} is not two tokens with a space between them")
        merges.append((parts[0], parts[1]))
    return vocab, merges


def _templates(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """chat_template.jinja and additional_chat_templates/*.jinja, else the entry of tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        files.update((f.stem, f) for f in sorted(extra.glob("*.jinja"))[:100])
    found = {name: _read(f, MAX_TEMPLATE) for name, f in files.items() if f.is_file()}
    if found:
        return found["default"] if list(found) == ["default"] else found
    value = config.get("chat_template")
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    if isinstance(value, list):
        if not all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in value):
            raise CheckpointError(f"{where}: a list must hold objects with name and template")
        value = {v["name"]: v.get("template") for v in value}
    if isinstance(value, dict):
        if not all(isinstance(v, str) for v in value.values()):
            raise CheckpointError(f"{where}: templates must be text")
    elif value is not None and not isinstance(value, str):
        raise CheckpointError(f"{where}: must be text or a list of named templates, found {type(value).__name__}")
    return value
