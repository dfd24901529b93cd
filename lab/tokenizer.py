"""Train the byte-level BPE tokenizer of 4,096 tokens and write it as a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lab.data import generators
from lab.data.base import END, STOP, TURN
from lab.data.stdlib_text import DOMAINS, split

VOCABULARY = 4096
SPECIAL = (END, TURN, STOP)
# Contractions, words with one leading mark, single digits, marks, line ends, blanks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def texts(seed: int) -> Iterator[str]:
    """What the merges are learned from: the training texts and samples of each generator."""
    for domain in DOMAINS:
        yield from split(domain, False).values()
    rng = random.Random(seed)
    for generator in generators().values():
        if generator.name != "stdlib":
            for _ in range(4000):
                text = generator.document(rng, 256).text
                for special in SPECIAL:
                    text = text.replace(special, "")
                yield text


def train(seed: int) -> Tokenizer:
    """Learn the merges; every byte is in the alphabet, so that any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed), trainer)
    return tokenizer


def settings() -> dict[str, object]:
    """The content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": STOP,
        "pad_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    text = json.dumps(settings(), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line: ``python -m lab.tokenizer --work FOLDER``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="working folder outside the repository")
    parser.add_argument("--seed", type=int, default=1, help="seed of the generated samples")
    args = parser.parse_args(argv)
    tokenizer = train(args.seed)
    save(tokenizer, args.work / "tokenizer")
    print(f"{tokenizer.get_vocab_size()} tokens written to {args.work / 'tokenizer'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
