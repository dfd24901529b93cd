"""Key-value recall at a chosen distance, in plain tables, inside running text, and as chat."""

from __future__ import annotations

import random

from lab.data.base import STOP, TURN, Document, Item, Writer, held_out, listed

ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st", "tr", "sh")
NUCLEI = ("a", "e", "i", "o", "u")
VALUES = listed(
    "red blue green black white gold silver pink brown gray apple lemon cherry grape peach plum "
    "bread stone river cloud storm light night morning winter summer tiger horse eagle shark mouse "
    "rabbit paper glass metal wood cotton silk table chair window door garden bridge castle tower"
)
DISTANCES = (512, 1024, 2048, 4096)
LONGEST = 3800  # tokens; what a distance of 4,096 leaves for the question and the answer
LONGEST_NOTES = 3600  # tokens; running text is less predictable in length
FORMS = ("table", "notes", "chat")
PAIR_TOKENS = 8  # a pair line such as "kavo = 482" with its newline, on average


def key(rng: random.Random) -> str:
    """A made-up word of two or three syllables."""
    return "".join(rng.choice(ONSETS) + rng.choice(NUCLEI) for _ in range(rng.choice((2, 2, 3))))


def value(rng: random.Random) -> str:
    """A number of two to four digits or a short word."""
    if rng.random() < 0.7:
        return str(rng.randrange(10, 10 ** rng.randint(2, 4)))
    return rng.choice(VALUES)


def pairs(rng: random.Random, count: int) -> dict[str, str]:
    """``count`` distinct keys with values, none of the pairs held out."""
    found: dict[str, str] = {}
    while len(found) < count:
        name, content = key(rng), value(rng)
        if name not in found and not held_out("recall", name, content):
            found[name] = content
    return found


def held_out_pair(rng: random.Random) -> tuple[str, str]:
    """A pair that no training document contains."""
    while True:
        name, content = key(rng), value(rng)
        if held_out("recall", name, content):
            return name, content


class Recall:
    """Documents that state pairs and then ask for many of them; ``filler`` supplies running text."""

    name = "recall"

    def __init__(self, filler: list[str]) -> None:
        if not filler:
            raise ValueError("recall needs at least one filler paragraph")
        self.filler = filler

    def document(self, rng: random.Random, tokens: int) -> Document:
        """About ``tokens`` tokens in one of the four forms."""
        size = max(64, int(tokens * rng.uniform(0.6, 0.98)))
        form = rng.choices((self.stream, self.table, self.notes), (3, 3, 4))[0]
        return form(rng, size)

    def stream(self, rng: random.Random, tokens: int) -> Document:
        """Pairs and repeats of earlier pairs mixed line by line: dense supervision at all distances."""
        writer = Writer(base=0.02, gain=2.0)
        known: dict[str, str] = {}
        for name, content in pairs(rng, max(2, tokens // (2 * PAIR_TOKENS))).items():
            writer.say(f"{name} = {content}\n")
            known[name] = content
            if len(known) > 1:
                asked = rng.choice(list(known))
                writer.say(f"{asked} =")
                writer.answer(f" {known[asked]}\n")
        return writer.document()

    def queries(self, writer: Writer, rng: random.Random, known: dict[str, str], count: int) -> None:
        """Ask for ``count`` of the known pairs, as chat turns or as plain lines."""
        asked = rng.sample(list(known), min(count, len(known)))
        chat = rng.random() < 0.6
        for name in asked:
            if chat:
                writer.turn(f"What is {name}?", f"{name} = {known[name]}")
            else:
                writer.say(f"{name} =")
                writer.answer(f" {known[name]}\n")

    def table(self, rng: random.Random, tokens: int) -> Document:
        """A table of pairs, then queries."""
        share = rng.uniform(0.4, 0.9)
        known = pairs(rng, max(2, int(tokens * share / PAIR_TOKENS)))
        writer = Writer(base=0.02, gain=2.0)
        body = "".join(f"{name} = {content}\n" for name, content in known.items())
        chat = rng.random() < 0.4
        if chat:
            writer.say(f"{TURN}user\nRemember this list.\n{body}{STOP}\n{TURN}assistant\n")
            writer.answer(f"I will remember it.{STOP}")
            writer.say("\n")
        else:
            writer.say(f"{body}\n")
        self.queries(writer, rng, known, int(tokens * (1 - share) / (PAIR_TOKENS * 1.5)) + 1)
        return writer.document()

    def notes(self, rng: random.Random, tokens: int) -> Document:
        """Pairs scattered through running text, then queries."""
        known = pairs(rng, max(2, min(40, tokens // 60)))
        room = int(tokens * 0.98) - len(known) * int(PAIR_TOKENS * 3.2)
        writer = Writer(base=0.05, gain=2.0)
        writer.say(self.scatter(rng, list(known.items()), max(0, room)))
        self.queries(writer, rng, known, len(known))
        return writer.document()

    def scatter(self, rng: random.Random, facts: list[tuple[str, str]], tokens: int) -> str:
        """Running text of about ``tokens`` tokens (3.3 characters each) with the facts on own lines."""
        gap = int(tokens * 3.3 / max(1, len(facts)))
        start = rng.randrange(len(self.filler))
        text = ""
        while len(text) < tokens * 3.3:
            text += self.filler[start % len(self.filler)] + "\n"
            start += 1
        pieces = []
        for index, (name, content) in enumerate(facts):
            pieces.append(f"{name} = {content}\n{text[index * gap : (index + 1) * gap]}\n")
        return "".join(pieces)

    def items(self, seed: int, count: int) -> list[Item]:
        """Held-out pairs asked at each distance (about that many tokens back) in each form."""
        found: list[Item] = []
        for distance in DISTANCES:
            for form in FORMS:
                rng = random.Random(f"{seed}:{form}:{distance}")
                found += [self.item(rng, form, distance) for _ in range(count)]
        return found

    def item(self, rng: random.Random, form: str, distance: int) -> Item:
        """One item whose queried pair is the first line, so that it lies ``distance`` tokens back."""
        name, content = held_out_pair(rng)
        length = min(distance, LONGEST)
        count = max(2, min(40, length // 60)) if form == "notes" else length // PAIR_TOKENS
        others = [pair for pair in pairs(rng, count - 1).items() if pair[0] != name]
        facts = [(name, content), *others]
        task = f"recall-{form}-{distance}"
        if form == "notes":
            body = self.scatter(rng, facts, max(0, min(length, LONGEST_NOTES) - len(facts) * PAIR_TOKENS))
            return Item(task, f"{body}\n{name} =", f" {content}\n")
        body = "".join(f"{left} = {right}\n" for left, right in facts)
        if form == "table":
            return Item(task, f"{body}\n{name} =", f" {content}\n")
        told = f"{TURN}user\nRemember this list.\n{body}{STOP}\n{TURN}assistant\nI will remember it.{STOP}\n"
        asked = f"{TURN}user\nWhat is {name}?{STOP}\n{TURN}assistant\n"
        return Item(task, told + asked, f"{name} = {content}{STOP}")
