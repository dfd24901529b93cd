"""Multi-digit arithmetic, with the written steps (units first) and with a direct answer."""

from __future__ import annotations

import random
from collections.abc import Callable

from lab.data.base import STOP, Document, Item, Writer, chat_prompt, held_out

Pair = tuple[int, int]
WORDS = {"+": "plus", "-": "minus", "*": "times"}


def addition_steps(a: int, b: int) -> str:
    """Column-wise addition from the units; one line per column, then the result."""
    lines: list[str] = []
    carry, left, right = 0, a, b
    while left or right or not lines:
        x, y = left % 10, right % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}: write {total % 10}, carry {total // 10}")
        carry, left, right = total // 10, left // 10, right // 10
    if carry:
        lines.append(f"write {carry}")
    return "\n".join([*lines, f"{a} + {b} = {a + b}"])


def subtraction_steps(a: int, b: int) -> str:
    """Column-wise subtraction of ``b <= a`` from the units with borrows."""
    lines: list[str] = []
    borrow, left, right = 0, a, b
    while left or right or not lines:
        x, y = left % 10, right % 10
        total = x - y - borrow
        digit = total % 10
        lines.append(f"{x} - {y} - {borrow} = {total}: write {digit}, borrow {int(total < 0)}")
        borrow, left, right = int(total < 0), left // 10, right // 10
    return "\n".join([*lines, f"{a} - {b} = {a - b}"])


def product_steps(a: int, b: int) -> str:
    """Column-wise product of ``a`` with the one-digit ``b`` from the units with carries."""
    lines: list[str] = []
    carry, left = 0, a
    while left or not lines:
        x = left % 10
        total = x * b + carry
        lines.append(f"{x} * {b} + {carry} = {total}: write {total % 10}, carry {total // 10}")
        carry, left = total // 10, left // 10
    if carry:
        lines.append(f"write {carry}")
    return "\n".join([*lines, f"{a} * {b} = {a * b}"])


STEPS: dict[str, Callable[[int, int], str]] = {
    "+": addition_steps,
    "-": subtraction_steps,
    "*": product_steps,
}


def result(op: str, a: int, b: int) -> int:
    """The value of ``a op b``."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def number(rng: random.Random, digits: int) -> int:
    """A number of exactly ``digits`` digits (zero counts as one digit)."""
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def question(rng: random.Random, op: str, a: int, b: int, steps: bool) -> str:
    """One of the phrasings of a question; those that want the steps say so."""
    plain = [
        f"What is {a} {op} {b}?",
        f"Calculate {a} {op} {b}.",
        f"{a} {op} {b} = ?",
        f"What is {a} {WORDS[op]} {b}?",
        f"How much is {a} {op} {b}?",
        f"{a} {op} {b}",
    ]
    asked = rng.choice(plain)
    return f"{asked} {rng.choice(['Show the steps.', 'Work step by step.'])}" if steps else asked


def direct_reply(op: str, a: int, b: int) -> str:
    """The reply without steps; it restates the problem, so that the answer follows an equals sign."""
    return f"{a} {op} {b} = {result(op, a, b)}"


class Arithmetic:
    """Problems of one to five digits; three-digit addition is the most frequent."""

    name = "arithmetic"

    def problem(self, rng: random.Random) -> tuple[str, int, int]:
        """A training problem that is not held out."""
        while True:
            op = rng.choices("+-*", (6, 3, 2))[0]
            digits = rng.choices((1, 2, 3, 4, 5), (2, 4, 8, 2, 1))[0]
            other = 1 if op == "*" else max(1, digits - rng.choice((0, 0, 0, 0, 1)))
            a, b = number(rng, min(digits, 3) if op == "*" else digits), number(rng, other)
            if op == "-":
                a, b = max(a, b), min(a, b)
            elif op == "+" and rng.random() < 0.5:
                a, b = b, a
            if not held_out("arithmetic", op, a, b):
                return op, a, b

    def exchange(self, writer: Writer, rng: random.Random) -> None:
        """Append one problem, as a chat turn or as plain lines."""
        op, a, b = self.problem(rng)
        steps = rng.random() < 0.5
        reply = STEPS[op](a, b) if steps else direct_reply(op, a, b)
        if rng.random() < 0.75:
            writer.turn(question(rng, op, a, b, steps), reply)
        elif steps:
            writer.say(f"Problem: {a} {op} {b}\n")
            writer.answer(f"Steps:\n{reply}\n\n")
        else:
            writer.say(f"{a} {op} {b} =")
            writer.answer(f" {result(op, a, b)}\n")

    def document(self, rng: random.Random, tokens: int) -> Document:
        """A few problems in a row."""
        writer = Writer(base=0.05)
        for _ in range(rng.randint(1, 4)):
            self.exchange(writer, rng)
        return writer.document()

    def items(self, seed: int, count: int) -> list[Item]:
        """Held-out problems: three-digit addition with steps and direct, and the other operations."""
        found: list[Item] = []
        for op, task, steps in (
            ("+", "add3-steps", True),
            ("+", "add3-direct", False),
            ("-", "sub3-steps", True),
            ("-", "sub3-direct", False),
            ("*", "mul3x1-steps", True),
            ("*", "mul3x1-direct", False),
        ):
            rng = random.Random(f"{seed}:{task}")
            pairs: set[Pair] = set()
            while len(pairs) < count:
                a, b = number(rng, 3), number(rng, 1 if op == "*" else 3)
                if op == "-":
                    a, b = max(a, b), min(a, b)
                if (a, b) in pairs or not held_out("arithmetic", op, a, b):
                    continue
                pairs.add((a, b))
                ask = f"What is {a} {op} {b}?" + (" Show the steps." if steps else "")
                reply = STEPS[op](a, b) if steps else direct_reply(op, a, b)
                found.append(Item(task, chat_prompt(ask), reply + STOP))
        return found
