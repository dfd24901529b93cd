"""How byte-level BPE vocabularies split text into words, by the name a GGUF file gives in `tokenizer.ggml.pre`.

Each entry is the list of regular expressions applied one after the other (every match becomes a word of its own, what
lies between matches too), plus what the families using it fix: whether a whole word found in the vocabulary skips the
merges, whether BOS is added unless the file says otherwise, and whether the text is brought to Unicode NFC first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from paceline.core.errors import CheckpointError

# The apostrophe suffixes of GPT-2 and the case-insensitive form of the cl100k family.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    return rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"


def _o200k(suffix: str, digits: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{head}{upper}*{lower}+{suffix}|{head}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


def _ranges(codes: str) -> str:
    """The inside of a character class from hexadecimal code points and ranges of them.

    Written as numbers because editors normalize some of these letters into others.
    """
    return "".join("-".join(rf"\x{{{c}}}" for c in part.split("-")) for part in codes.split())


# The cased letters that DeepSeek-LLM groups into words.
_DEEPSEEK_LETTERS = _ranges(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_PUNCTUATION = r"!-/:-~" + _ranges("FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_CJK = f"[{_ranges('4E00-9FA5 0800-4E00 AC00-D7FF')}]+"
_CJK_KANA = f"[{_ranges('4E00-9FA5 3040-309F 30A0-30FF')}]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of splitting; see the module text for the fields."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Split(Regex(p), behavior="isolated", invert=False) for p in self.patterns]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_FAMILIES: dict[str, tuple[PreTokenizer, tuple[str, ...]]] = {
    "default": (
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
        ("default",),
    ),
    "gpt-2": (
        PreTokenizer((_GPT2,)),
        ("gpt-2", "phi-2", "mpt", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "granite-docling"),
    ),
    "olmo": (PreTokenizer((_GPT2,), nfc=True), ("olmo",)),
    "llama-bpe": (
        PreTokenizer((_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    "dbrx": (PreTokenizer((_cl100k(r"\p{N}{1,3}"),)), ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4")),
    "qwen2": (
        PreTokenizer((_cl100k(r"\p{N}"),), nfc=True),
        ("qwen2", "deepseek-r1-qwen", "kormo", "megrez"),
    ),
    "stablelm2": (PreTokenizer((_cl100k(r"\p{N}"),)), ("stablelm2", "hunyuan", "grok-2")),
    "starcoder": (
        PreTokenizer((r"\p{N}", _GPT2)),
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
    ),
    "falcon": (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")), ("falcon",)),
    "deepseek-llm": (
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                rf"\s?[{_PUNCTUATION}]+",
                r"\s+$",
                _CJK,
                r"\p{N}+",
            )
        ),
        ("deepseek-llm",),
    ),
    "deepseek-coder": (
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
        ("deepseek-coder",),
    ),
    "deepseek-v3": (
        PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, _DEEPSEEK3)),
        ("deepseek-v3", "hunyuan-dense"),
    ),
    "tekken": (PreTokenizer((_o200k("", r"\p{N}"),), ignore_merges=True, add_bos=True), ("tekken",)),
    "gpt-4o": (PreTokenizer((_o200k(f"{_SUFFIX}?", r"\p{N}{1,3}"),)), ("gpt-4o", "llama4", "minimax-m2")),
    "bloom": (PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)), ("bloom", "gpt3-finnish", "poro-chat")),
    "seed-coder": (
        PreTokenizer((rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",)),
        ("seed-coder",),
    ),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for pre, names in _FAMILIES.values() for name in names}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The splitting rule of that name.

    Raises CheckpointError naming an unknown one: a wrong rule would give plausible but different ids.
    """
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise CheckpointError(
            f"tokenizer.ggml.pre: {name[:80]!r} is not a pre-tokenizer known here; put the model's tokenizer.json "
            f"beside the file, or use one of: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return found
