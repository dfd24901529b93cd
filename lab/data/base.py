"""What every generator shares: documents with weighted answers, evaluation items and the held-out split."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Protocol

HELD_OUT_PERCENT = 5
END = "<|endoftext|>"
TURN = "<|im_start|>"
STOP = "<|im_end|>"


@dataclasses.dataclass
class Document:
    """A training text; ``answers`` are character ranges that carry the full loss weight.

    ``base`` is the loss weight of every character outside ``answers``, ``gain`` the weight inside.
    """

    text: str
    answers: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    base: float = 1.0
    gain: float = 1.0


@dataclasses.dataclass(frozen=True)
class Item:
    """An evaluation item: the greedy continuation of ``prompt`` must be exactly ``answer``.

    The answer includes its end (a line end or the end-of-turn marker) and any written steps.
    """

    task: str
    prompt: str
    answer: str


class Generator(Protocol):
    """The interface of each module's generator class."""

    name: str

    def document(self, rng: random.Random, tokens: int) -> Document:
        """A training document of at most about ``tokens`` tokens."""

    def items(self, seed: int, count: int) -> list[Item]:
        """``count`` evaluation items per task, none of which a training document contains."""


def held_out(*parts: object) -> bool:
    """Whether the problem identified by ``parts`` is kept for evaluation (a fixed hash decides)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def listed(text: str) -> list[str]:
    """The words of ``text``."""
    return text.split()


class Writer:
    """Builds a document piece by piece and remembers which pieces are answers."""

    def __init__(self, base: float = 0.1, gain: float = 1.0) -> None:
        self.pieces: list[str] = []
        self.answers: list[tuple[int, int]] = []
        self.length = 0
        self.base, self.gain = base, gain

    def say(self, text: str) -> None:
        """Append text outside the answers."""
        self.pieces.append(text)
        self.length += len(text)

    def answer(self, text: str) -> None:
        """Append text that carries the full loss weight."""
        self.answers.append((self.length, self.length + len(text)))
        self.say(text)

    def turn(self, question: str, reply: str) -> None:
        """Append one chat exchange; the reply and its closing marker are the answer."""
        self.say(chat_prompt(question))
        self.answer(reply + STOP)
        self.say("\n")

    def document(self) -> Document:
        """The finished document."""
        return Document("".join(self.pieces), self.answers, self.base, self.gain)


def chat_prompt(question: str, system: str = "") -> str:
    """The chat template's rendering of a first user message, up to where the assistant replies."""
    head = f"{TURN}system\n{system}{STOP}\n" if system else ""
    return f"{head}{TURN}user\n{question}{STOP}\n{TURN}assistant\n"
