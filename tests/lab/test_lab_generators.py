"""The generators: determinism, right answers, and no held-out problem in a training document."""

from __future__ import annotations

import json
import random
import re

import pytest

from lab.data import generators
from lab.data.arithmetic import STEPS, result
from lab.data.base import HELD_OUT_PERCENT, STOP, Document, Item, held_out
from lab.data.chat import words
from lab.data.lists import ordered
from lab.data.records import SCHEMAS
from lab.data.stdlib_text import DOMAINS, split

NAMES = ("stdlib", "recall", "arithmetic", "lists", "records", "chat")
GENERATORS = generators()


def documents(name: str, seed: int, count: int, tokens: int = 512) -> list[Document]:
    rng = random.Random(seed)
    return [GENERATORS[name].document(rng, tokens) for _ in range(count)]


def items(name: str, prefix: str, count: int = 20) -> list[Item]:
    return [item for item in GENERATORS[name].items(7, count) if item.task.startswith(prefix)]


def test_names() -> None:
    assert tuple(GENERATORS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_deterministic_and_vary_with_the_seed(name: str) -> None:
    first = documents(name, 3, 10)
    assert first == documents(name, 3, 10)
    assert [each.text for each in first] != [each.text for each in documents(name, 4, 10)]


@pytest.mark.parametrize("name", NAMES)
def test_items_are_deterministic(name: str) -> None:
    assert GENERATORS[name].items(7, 5) == GENERATORS[name].items(7, 5)


@pytest.mark.parametrize("name", NAMES)
def test_answer_ranges_lie_inside_the_text_in_order(name: str) -> None:
    for document in documents(name, 5, 30):
        end = 0
        for start, stop in document.answers:
            assert end <= start < stop <= len(document.text)
            end = stop


@pytest.mark.parametrize("name", [name for name in NAMES if name != "stdlib"])
def test_task_documents_have_answers(name: str) -> None:
    assert all(document.answers for document in documents(name, 6, 30))


def test_split_keeps_about_the_stated_share() -> None:
    share = sum(held_out("probe", number) for number in range(20_000)) / 20_000
    assert abs(100 * share - HELD_OUT_PERCENT) < 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_text_split_is_disjoint_and_neither_side_is_empty(domain: str) -> None:
    training, kept = split(domain, False), split(domain, True)
    assert training
    assert kept
    assert not set(training) & set(kept)


def test_text_documents_come_from_training_texts() -> None:
    training = "\0".join(text for domain in DOMAINS for text in split(domain, False).values())
    for document in documents("stdlib", 1, 10):
        assert document.text in training


def test_unknown_text_domain_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="source, documentation"):
        split("poems", True)


@pytest.mark.parametrize("op", sorted(STEPS))
def test_written_steps_are_right_line_by_line(op: str) -> None:
    rng = random.Random(2)
    for _ in range(300):
        a, b = rng.randrange(10_000), rng.randrange(10 if op == "*" else 10_000)
        if op == "-":
            a, b = max(a, b), min(a, b)
        *lines, last = STEPS[op](a, b).split("\n")
        for line in lines:
            if found := re.match(r"(\d) (.) (\d) (.) (\d) = (-?\d+): write (\d), (?:carry|borrow) (\d)$", line):
                x, first, y, second, z, total, digit, _ = found.groups()
                assert first == op
                assert second == ("-" if op == "-" else "+")
                assert eval(f"{x}{first}{y}{second}{z}") == int(total)
                assert int(total) % 10 == int(digit)
            else:
                assert re.match(r"write \d$", line)
        written = [re.search(r"write (\d)", line) for line in lines]
        digits = "".join(found.group(1) for found in reversed(written) if found)
        assert int(digits) == result(op, a, b)
        assert last == f"{a} {op} {b} = {result(op, a, b)}"


@pytest.mark.parametrize("task", ["add3-steps", "add3-direct", "sub3-steps", "sub3-direct", "mul3x1-steps"])
def test_arithmetic_items_are_right_and_three_digit(task: str) -> None:
    for item in items("arithmetic", task):
        found = re.search(r"What is (\d{3}) ([+*-]) (\d+)\?", item.prompt)
        assert found
        assert item.answer.endswith(STOP)
        a, op, b = int(found.group(1)), found.group(2), int(found.group(3))
        assert len(found.group(3)) == (1 if op == "*" else 3) or op == "-"
        assert item.answer.removesuffix(STOP).split("\n")[-1] == f"{a} {op} {b} = {result(op, a, b)}"


def test_no_held_out_problem_in_arithmetic_documents() -> None:
    text = "".join(document.text for document in documents("arithmetic", 8, 2000))
    seen = {(op, int(a), int(b)) for a, op, b in re.findall(r"(?<![\d+] )\b(\d+) ([+*-]) (\d+) = \d+(?![\d:])", text)}
    assert len(seen) > 1000
    assert not [each for each in seen if held_out("arithmetic", *each)]


@pytest.mark.parametrize("form", ["table", "notes", "chat"])
@pytest.mark.parametrize("distance", [512, 2048])
def test_recall_items_state_the_pair_once_at_the_start(form: str, distance: int) -> None:
    for item in items("recall", f"recall-{form}-{distance}", 3):
        answer = item.answer.removesuffix(STOP).strip().split(" = ")[-1]
        lines = [line for line in item.prompt.split("\n") if re.fullmatch(r"[a-z]+ = \w+", line)]
        keys = [line.split(" = ")[0] for line in lines]
        assert len(set(keys)) == len(keys)
        assert lines[0].split(" = ")[1] == answer
        assert lines[0].split(" = ")[0] in item.prompt.rstrip("= ").split("\n")[-1] + item.prompt[-80:]
        assert held_out("recall", *lines[0].split(" = "))


def test_no_held_out_pair_in_recall_documents_and_answers_repeat_a_stated_pair() -> None:
    for document in documents("recall", 9, 60, 1024):
        stated = re.findall(r"^([a-z]+) = (\w+)", document.text, re.MULTILINE)
        assert stated
        assert not [pair for pair in stated if held_out("recall", *pair)]
        values: dict[str, str] = {}
        for name, value in stated:
            assert values.setdefault(name, value) == value


@pytest.mark.parametrize("task", ["sort", "copy", "reverse"])
def test_list_items_are_right(task: str) -> None:
    for item in items("lists", task):
        found = re.search(r": ([\d ]+)<", item.prompt)
        assert found
        given = found.group(1).split()
        right = {"sort": ordered(given), "copy": given, "reverse": given[::-1]}[task]
        assert item.answer == " ".join(right) + STOP
        assert held_out("lists", task, *given)


def test_numbers_sort_by_value() -> None:
    assert ordered(["10", "9", "100"]) == ["9", "10", "100"]


def test_record_items_are_json_of_their_schema() -> None:
    for item in items("records", "records"):
        schema = json.loads(item.prompt.split("Schema: ")[1].split("\n")[0])
        assert schema in SCHEMAS.values()
        each = json.loads(item.answer.removesuffix(STOP))
        assert list(each) == list(schema)
        kind = next(name for name, fields in SCHEMAS.items() if fields == schema)
        assert held_out("records", kind, json.dumps(each))


def test_chat_documents_do_not_ask_held_out_questions() -> None:
    asked = {item.prompt for item in GENERATORS["chat"].items(7, 50)}
    assert len(asked) > 50
    text = "".join(document.text for document in documents("chat", 10, 1500))
    assert not [prompt for prompt in asked if prompt in text]


def test_number_words() -> None:
    assert [words(number) for number in (0, 13, 20, 42)] == ["zero", "thirteen", "twenty", "forty-two"]
