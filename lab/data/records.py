"""JSON records: written from a description and a schema, and read for one field."""

from __future__ import annotations

import json
import random
from typing import Any

from lab.data.base import STOP, Document, Item, Writer, chat_prompt, held_out, listed

FIRST = listed(
    "Ana Ben Carla David Emma Felix Grace Hugo Irene Jonas Karin Leo Maria Nina Oscar Paula Robert "
    "Sofia Thomas Vera Walter Alice Bruno Clara Daniel Elena Frank Hanna Ivan Julia Kevin Laura "
    "Martin Olga Peter"
)
LAST = listed(
    "Silva Meyer Rossi Novak Dubois Smith Jones Brown Garcia Lopez Weber Fischer Moreau Costa Haas "
    "Keller Larsen Berg Olsen Kowalski Petrov Tanaka Sato Kim Chen Wang Singh Khan Ali Ortiz Vargas "
    "Moreno"
)
CITIES = listed(
    "Paris London Berlin Madrid Rome Vienna Lisbon Oslo Prague Dublin Athens Warsaw Tokyo Seoul "
    "Cairo Lima Boston Chicago Toronto Sydney Geneva Munich Milan Porto Bergen"
)
COLORS = ["red", "blue", "green", "black", "white", "yellow", "orange", "purple", "gray", "brown"]
PRODUCTS = listed("lamp chair table phone laptop camera bottle jacket backpack keyboard monitor printer bicycle")
TITLES = listed("garden river winter silence journey island letter mirror harbor forest mountain station")
ANIMALS = ["dog", "cat", "horse", "rabbit", "parrot", "hamster", "turtle", "goldfish"]

Record = dict[str, Any]
SCHEMAS: dict[str, dict[str, str]] = {
    "person": {"name": "string", "age": "integer", "city": "string"},
    "employee": {"name": "string", "age": "integer", "email": "string", "active": "boolean"},
    "product": {"product": "string", "color": "string", "price": "number", "stock": "integer"},
    "book": {"title": "string", "author": "string", "year": "integer", "pages": "integer"},
    "pet": {"name": "string", "animal": "string", "age": "integer", "color": "string"},
    "order": {"id": "integer", "customer": "string", "items": "array", "paid": "boolean"},
}


def field(rng: random.Random, kind: str, name: str, record: Record) -> Any:
    """A value for the field ``name`` of a record of ``kind``; earlier fields are in ``record``."""
    person = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    if name == "email":
        return record["name"].lower().replace(" ", ".") + "@example.com"
    choices: dict[str, Any] = {
        "name": rng.choice(FIRST) if kind == "pet" else person,
        "author": person,
        "customer": person,
        "age": rng.randint(1, 15) if kind == "pet" else rng.randint(18, 80),
        "city": rng.choice(CITIES),
        "active": rng.random() < 0.5,
        "paid": rng.random() < 0.5,
        "product": rng.choice(PRODUCTS),
        "color": rng.choice(COLORS),
        "price": rng.randint(1, 200) + rng.choice((0.5, 0.25, 0.75, 0.99)),
        "stock": rng.randint(0, 500),
        "title": f"The {rng.choice(COLORS).capitalize()} {rng.choice(TITLES).capitalize()}",
        "year": rng.randint(1900, 2024),
        "pages": rng.randint(80, 900),
        "animal": rng.choice(ANIMALS),
        "id": rng.randint(1, 9999),
        "items": rng.sample(PRODUCTS, rng.randint(1, 3)),
    }
    return choices[name]


def record(rng: random.Random, kind: str) -> Record:
    """A record of ``kind`` with its fields in the schema's order."""
    found: Record = {}
    for name in SCHEMAS[kind]:
        found[name] = field(rng, kind, name, found)
    return found


def spoken(value: Any) -> str:
    """A value as the description says it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def describe(rng: random.Random, kind: str, each: Record) -> str:
    """The record's fields in words, in one of two styles."""
    if kind == "person" and rng.random() < 0.5:
        return f"{each['name']}, {each['age']} years old, from {each['city']}"
    joint = rng.choice((" ", ": "))
    return "; ".join(f"{name}{joint}{spoken(value)}" for name, value in each.items())


def request(rng: random.Random, kind: str, each: Record) -> str:
    """A question that asks for the record."""
    told = describe(rng, kind, each)
    schema = json.dumps(SCHEMAS[kind])
    return rng.choice(
        (
            f"Write a JSON record for {told}.",
            f"Write a JSON record for this {kind}: {told}",
            f"Schema: {schema}\nData: {told}\nWrite the JSON record.",
            f"Convert to JSON with this schema {schema}: {told}",
        )
    )


class Records:
    """Records of six kinds with at most four fields."""

    name = "records"

    def fresh(self, rng: random.Random, evaluation: bool) -> tuple[str, Record]:
        """A kind and a record on the wanted side of the split."""
        while True:
            kind = rng.choice(list(SCHEMAS))
            each = record(rng, kind)
            if held_out("records", kind, json.dumps(each)) == evaluation:
                return kind, each

    def document(self, rng: random.Random, tokens: int) -> Document:
        """One to three exchanges: a record to write, to write indented, or a field to read."""
        writer = Writer(base=0.1)
        for _ in range(rng.randint(1, 3)):
            kind, each = self.fresh(rng, False)
            style = rng.random()
            if style < 0.65:
                writer.turn(request(rng, kind, each), json.dumps(each))
            elif style < 0.8:
                asked = request(rng, kind, each) + " Use indentation."
                writer.turn(asked, json.dumps(each, indent=2))
            else:
                name = rng.choice(list(each))
                asked = f"{json.dumps(each)}\nWhat is the {name}?"
                writer.turn(asked, f"The {name} is {spoken(each[name])}.")
        return writer.document()

    def items(self, seed: int, count: int) -> list[Item]:
        """Held-out records to write from a schema and a description."""
        rng = random.Random(f"{seed}:records")
        found = []
        for _ in range(count):
            kind, each = self.fresh(rng, True)
            told = "; ".join(f"{name}: {spoken(value)}" for name, value in each.items())
            asked = f"Schema: {json.dumps(SCHEMAS[kind])}\nData: {told}\nWrite the JSON record."
            found.append(Item("records-json", chat_prompt(asked), json.dumps(each) + STOP))
        return found
