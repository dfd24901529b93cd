"""Lists to sort, copy and reverse, with the largest and smallest element and the length."""

from __future__ import annotations

import random
from collections.abc import Callable

from lab.data.base import STOP, Document, Item, Writer, chat_prompt, held_out, listed

WORDS = listed(
    "apple banana cherry date elder fig grape hazel iris jade kiwi lemon mango nut olive peach "
    "quince rose sage tulip violet willow yam zinnia ant bee cat dog eel fox goat hen ibis jay koala "
    "lion"
)
Elements = list[str]


def ordered(elements: Elements) -> Elements:
    """Numbers by value, words by the alphabet."""
    return sorted(elements, key=lambda each: (int(each) if each.isdigit() else 0, each))


TASKS: dict[str, Callable[[Elements], str]] = {
    "sort": lambda each: " ".join(ordered(each)),
    "copy": lambda each: " ".join(each),
    "reverse": lambda each: " ".join(reversed(each)),
    "largest": lambda each: ordered(each)[-1],
    "smallest": lambda each: ordered(each)[0],
    "count": lambda each: str(len(each)),
}
PHRASES: dict[str, tuple[str, ...]] = {
    "sort": ("Sort these {kind}: {list}", "Sort: {list}", "Put these {kind} in order: {list}"),
    "copy": ("Copy these {kind}: {list}", "Copy: {list}", "Repeat this list: {list}"),
    "reverse": ("Reverse these {kind}: {list}", "Reverse: {list}", "Write this list backwards: {list}"),
    "largest": ("Which is the largest of these numbers: {list}", "Maximum: {list}"),
    "smallest": ("Which is the smallest of these numbers: {list}", "Minimum: {list}"),
    "count": ("How many {kind} are in this list: {list}", "Count: {list}"),
}


def elements(rng: random.Random, size: int, numeric: bool) -> Elements:
    """``size`` distinct numbers below 10 or 100, or distinct words."""
    if numeric:
        return [str(each) for each in rng.sample(range(10 if size <= 8 and rng.random() < 0.3 else 100), size)]
    return rng.sample(WORDS, size)


class Lists:
    """List exercises of two to ten elements."""

    name = "lists"

    def problem(self, rng: random.Random) -> tuple[str, Elements]:
        """A task and a list that is not held out."""
        while True:
            task = rng.choices(list(TASKS), (6, 2, 4, 1, 1, 1))[0]
            numeric = task in ("largest", "smallest") or rng.random() < 0.7
            each = elements(rng, rng.randint(2, 10), numeric)
            if not held_out("lists", task, *each):
                return task, each

    def document(self, rng: random.Random, tokens: int) -> Document:
        """A few exercises, as chat turns or as plain lines."""
        writer = Writer(base=0.05)
        for _ in range(rng.randint(1, 4)):
            task, each = self.problem(rng)
            kind = "numbers" if each[0].isdigit() else "words"
            asked = rng.choice(PHRASES[task]).format(kind=kind, list=" ".join(each))
            if rng.random() < 0.8:
                writer.turn(asked, TASKS[task](each))
            else:
                writer.say(f"{asked}\n=>")
                writer.answer(f" {TASKS[task](each)}\n")
        return writer.document()

    def items(self, seed: int, count: int) -> list[Item]:
        """Held-out lists of five numbers for each of sort, copy and reverse."""
        found: list[Item] = []
        for task in ("sort", "copy", "reverse"):
            rng = random.Random(f"{seed}:{task}")
            seen: set[tuple[str, ...]] = set()
            while len(seen) < count:
                each = [str(one) for one in rng.sample(range(100), 5)]
                if tuple(each) in seen or not held_out("lists", task, *each):
                    continue
                seen.add(tuple(each))
                asked = PHRASES[task][0].format(kind="numbers", list=" ".join(each))
                found.append(Item(f"{task}-5", chat_prompt(asked), TASKS[task](each) + STOP))
        return found
