"""Measure a checkpoint: ``python -m lab.evaluate FOLDER [--json FILE]``.

Perplexity on held-out standard-library text, loss on the answers of fresh documents, and the share of
held-out items whose whole greedy reply is right, written steps and end marker included.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from lab.data import generators
from lab.data.base import END, STOP, Item, chat_prompt
from lab.data.stdlib_text import DOMAINS, split
from lab.model import Config, Llama

WINDOW = 2048
Figures = dict[str, dict[str, float]]


def load(folder: Path, device: torch.device) -> tuple[Llama, Tokenizer]:
    """The model (float32 weights) and the tokenizer of an exported folder."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = Config(
        hidden=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        ffn=raw["intermediate_size"],
        vocab=raw["vocab_size"],
        context=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
    )
    model = Llama(config)
    weights = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.to(device).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


class Evaluator:
    """Runs the measurements on one model."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device

    @torch.inference_mode()
    def logits(self, ids: Tensor, last: int = 0) -> Tensor:
        """Logits ``[batch, length, vocab]`` in float32, or only those of the ``last`` positions."""
        with torch.autocast(self.device.type, torch.bfloat16):
            states = self.model.hidden(ids.to(self.device))[:, -last:]
            return functional.linear(states, self.model.model.embed_tokens.weight).float()

    def losses(self, ids: list[int]) -> Tensor:
        """Negative log likelihood in nats of every token but the first, ``[length - 1]``."""
        tokens = torch.tensor([ids])
        logits = self.logits(tokens[:, :-1])[0]
        return functional.cross_entropy(logits, tokens[0, 1:].to(self.device), reduction="none").cpu()

    def text(self, domain: str, limit: int) -> dict[str, float]:
        """Perplexity per token and bits per byte of held-out text, in windows of ``WINDOW`` tokens."""
        nats, tokens, size = 0.0, 0, 0
        for text in split(domain, True).values():
            ids = self.tokenizer.encode(text).ids
            for start in range(0, len(ids), WINDOW):
                window = ids[start : start + WINDOW]
                if len(window) < 2 or tokens >= limit:
                    continue
                nats += self.losses(window).sum().item()
                tokens += len(window) - 1
                size += len(self.tokenizer.decode(window[1:], skip_special_tokens=False).encode())
        bits = nats / math.log(2) / size
        return {"perplexity": math.exp(nats / tokens), "bits_per_byte": bits, "tokens": tokens}

    def answers(self, name: str, seed: int, count: int) -> dict[str, float]:
        """Perplexity per token inside the answers of ``count`` fresh documents of a generator."""
        generator, rng = generators()[name], random.Random(f"{seed}:fresh:{name}")
        nats, tokens = 0.0, 0
        for _ in range(count):
            document = generator.document(rng, 1024)
            encoding = self.tokenizer.encode(document.text)
            inside = torch.tensor(
                [any(start <= at < end for start, end in document.answers) for at, _ in encoding.offsets]
            )
            nats += self.losses(encoding.ids)[inside[1:]].sum().item()
            tokens += int(inside[1:].sum())
        return {"perplexity": math.exp(nats / tokens), "tokens": tokens}

    def continuation(self, ids: list[int], count: int) -> list[int]:
        """The ``count`` tokens that greedy decoding adds to ``ids``, or fewer up to an end marker."""
        ends = {self.tokenizer.token_to_id(each) for each in (END, STOP)}
        found: list[int] = []
        while len(found) < count:
            best = int(self.logits(torch.tensor([[*ids, *found]]), 1)[0, -1].argmax())
            if best in ends:
                break
            found.append(best)
        return found

    def reply(self, prompt: str, count: int) -> str:
        """The greedy reply to ``prompt`` of at most ``count`` tokens."""
        found = self.continuation(self.tokenizer.encode(prompt).ids, count)
        return self.tokenizer.decode(found, skip_special_tokens=False)

    def chosen(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether greedy decoding of ``prompt`` begins with exactly ``answer``.

        One pass over both decides it: every answer token must be the most likely one after the right tokens
        before it.
        """
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        return self.logits(ids, len(answer))[0].argmax(-1).tolist() == answer

    def correct(self, item: Item) -> bool:
        """Whether the greedy reply to an item is exactly its answer."""
        prompt = self.tokenizer.encode(item.prompt).ids
        whole = self.tokenizer.encode(item.prompt + item.answer).ids
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"{item.task}: the prompt does not end at a token boundary")
        return self.chosen(prompt, whole[len(prompt) :])

    def tasks(self, seed: int, count: int, only: str = "") -> Figures:
        """Accuracy and mean prompt length of every task whose name contains ``only``."""
        right: dict[str, list[bool]] = defaultdict(list)
        lengths: dict[str, list[int]] = defaultdict(list)
        for generator in generators().values():
            for item in generator.items(seed, count):
                if only in item.task:
                    right[item.task].append(self.correct(item))
                    lengths[item.task].append(len(self.tokenizer.encode(item.prompt).ids))
        return {
            task: {
                "accuracy": sum(each) / len(each),
                "items": len(each),
                "prompt_tokens": sum(lengths[task]) / len(each),
            }
            for task, each in right.items()
        }


def show(figures: dict[str, Figures]) -> None:
    """Print one table per group of figures."""
    console = Console()
    for title, rows in figures.items():
        if not rows:
            continue
        table = Table(title=title)
        columns = list(next(iter(rows.values())))
        for column in ("", *columns):
            table.add_column(column.replace("_", " "), justify="right" if column else "left")
        for name, row in rows.items():
            table.add_row(name, *(f"{row[column]:,.3f}".rstrip("0").rstrip(".") for column in columns))
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m lab.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported folder")
    parser.add_argument("--count", type=int, default=100, help="items per task")
    parser.add_argument("--only", default="", help="only tasks whose name contains this; skips the text")
    parser.add_argument("--text-tokens", type=int, default=1 << 30, help="most held-out tokens per domain")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the items")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ask", action="append", default=[], help="only print the reply; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    begun = time.monotonic()
    evaluator = Evaluator(*load(args.folder, device), device)
    if args.ask:
        for question in args.ask:
            print(f"> {question}\n{evaluator.reply(chat_prompt(question), 200)}\n")
        return 0
    figures: dict[str, Figures] = {}
    if not args.only:
        figures["held-out text"] = {each: evaluator.text(each, args.text_tokens) for each in DOMAINS}
        fresh = [name for name in generators() if name != "stdlib"]
        figures["answers of fresh documents"] = {each: evaluator.answers(each, args.seed, args.count) for each in fresh}
    figures["held-out tasks"] = evaluator.tasks(args.seed, args.count, args.only)
    show(figures)
    print(f"{time.monotonic() - begun:.0f} seconds")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
