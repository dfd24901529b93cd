"""Templated English questions and answers in the chat format, with short dialogs and stories."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from lab.data import facts
from lab.data.arithmetic import direct_reply
from lab.data.base import STOP, TURN, Document, Item, Writer, chat_prompt, held_out, listed
from lab.data.stdlib_text import docstrings

Exchange = tuple[str, str]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = listed("January February March April May June July August September October November December")
ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
UNITS = {
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("days", "hours"): 24,
    ("weeks", "days"): 7,
    ("years", "months"): 12,
    ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000,
    ("kilograms", "grams"): 1000,
}
HEROES = ("girl", "boy", "cat", "dog", "robot", "bird", "fox", "rabbit", "bear", "mouse")
NAMES = ("Mia", "Tom", "Lena", "Max", "Lily", "Sam", "Nora", "Ben", "Ella", "Finn")
PLACES = ("forest", "village", "house by the sea", "small town", "garden", "city", "castle", "cave")
GOALS = ("a red ball", "a golden key", "a new friend", "a lost letter", "a blue stone", "a magic book")


def words(number: int) -> str:
    """English words of a number below one hundred."""
    if number < 20:
        return ONES[number]
    ten, one = divmod(number, 10)
    return TENS[ten] + (f"-{ONES[one]}" if one else "")


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(rng: random.Random) -> Exchange:
    """A country and its capital, asked either way round."""
    land, city = rng.choice(list(facts.CAPITALS.items()))
    if rng.random() < 0.3:
        asked = rng.choice((f"{city} is the capital of which country?", f"Which country has the capital {city}?"))
        return asked, f"{city} is the capital of {land}."
    asked = rng.choice(
        (
            f"What is the capital of {land}?",
            f"What's the capital of {land}?",
            f"Tell me the capital of {land}.",
            f"Which city is the capital of {land}?",
            f"Do you know the capital of {land}?",
            f"Name the capital of {land}.",
            f"capital of {land}",
        )
    )
    return asked, f"The capital of {land} is {city}."


def fact(rng: random.Random) -> Exchange:
    """A single fact from one of the tables."""
    kind = rng.randrange(7)
    if kind == 0:
        land, where = rng.choice(list(facts.CONTINENTS.items()))
        asked = rng.choice((f"On which continent is {land}?", f"Where is {land}?"))
        return asked, f"{land} is in {where}."
    if kind == 1:
        word, other = rng.choice(list(facts.OPPOSITES.items()))
        asked = rng.choice((f"What is the opposite of {word}?", f"Give me the opposite of {word}."))
        return asked, f"The opposite of {word} is {other}."
    if kind == 2:
        word, other = rng.choice(list(facts.PLURALS.items()))
        return f"What is the plural of {word}?", f"The plural of {word} is {other}."
    if kind == 3:
        animal, sound = rng.choice(list(facts.SOUNDS.items()))
        asked = rng.choice((f"What sound does {article(animal)} make?", f"What does {article(animal)} do?"))
        return asked, f"{article(animal).capitalize()} {sound}."
    if kind == 4:
        thing, color = rng.choice(list(facts.COLORS.items()))
        noun = f"the {thing}" if thing in ("sky", "grass", "ocean", "night") else thing
        return f"What color is {noun}?", f"{noun.capitalize()} is {color}."
    if kind == 5:
        animal, count = rng.choice(list(facts.LEGS.items()))
        return (
            f"How many legs does {article(animal)} have?",
            f"{article(animal).capitalize()} has {count} legs.",
        )
    return rng.choice(list(facts.GENERAL.items()))


def meaning(rng: random.Random) -> Exchange:
    """What a word means."""
    word, sense = rng.choice(list(facts.MEANINGS.items()))
    noun = f"the {word}" if word in ("Moon", "Sun") else word
    subject = noun if word in ("Moon", "Sun", "rain", "winter", "summer", "music", "bread") else article(word)
    asked = rng.choice((f"What is {subject}?", f"Explain what {subject} is.", f"What does {word} mean?"))
    return asked, f"{subject[0].upper()}{subject[1:]} is {sense}."


def calendar(rng: random.Random) -> Exchange:
    """Neighbours among days and months."""
    name, cycle = rng.choice((("day", DAYS), ("month", MONTHS)))
    index = rng.randrange(len(cycle))
    if rng.random() < 0.6:
        return f"Which {name} comes after {cycle[index]}?", (
            f"{cycle[(index + 1) % len(cycle)]} comes after {cycle[index]}."
        )
    return f"Which {name} comes before {cycle[index]}?", (f"{cycle[index - 1]} comes before {cycle[index]}.")


def counting(rng: random.Random) -> Exchange:
    """Numbers: words, parity, comparison, sequences and unit conversion."""
    number, other, kind = rng.randint(0, 99), rng.randint(0, 999), rng.randrange(5)
    if kind == 0:
        return f"Write {number} in words.", f"{number} in words is {words(number)}."
    if kind == 1:
        parity = "even" if other % 2 == 0 else "odd"
        return f"Is {other} even or odd?", f"{other} is {parity}."
    if kind == 2:
        first, second = rng.sample(range(1000), 2)
        asked = rng.choice((f"Which is larger, {first} or {second}?", f"Is {first} greater than {second}?"))
        if asked.startswith("Which"):
            return asked, f"{max(first, second)} is larger than {min(first, second)}."
        return asked, (
            f"Yes, {first} is greater than {second}." if first > second else f"No, {first} is less than {second}."
        )
    if kind == 3:
        start, end = rng.randint(1, 20), rng.randint(3, 10)
        run = range(start, start + end)
        return f"Count from {run[0]} to {run[-1]}.", " ".join(map(str, run)) + "."
    (large, small), factor = rng.choice(list(UNITS.items()))
    amount = rng.randint(2, 12)
    return (
        f"How many {small} are in {amount} {large}?",
        f"There are {amount * factor} {small} in {amount} {large}.",
    )


def spelling(rng: random.Random) -> Exchange:
    """Letters of a short word."""
    word = rng.choice((*facts.OPPOSITES, *facts.PLURALS, *facts.COLORS))
    kind = rng.randrange(4)
    if kind == 0:
        return f"Spell the word {word}.", " ".join(word.upper())
    if kind == 1:
        return f"How many letters are in the word {word}?", f"The word {word} has {len(word)} letters."
    if kind == 2:
        return f"What is the first letter of {word}?", f"The first letter of {word} is {word[0].upper()}."
    return f"Write {word} in capital letters.", word.upper()


def python(rng: random.Random) -> Exchange:
    """What a builtin of the running interpreter does: the first sentence of its documentation."""
    name, text = rng.choice(list(docstrings().items()))
    paragraphs = [each for each in text.split("\n\n") if "->" not in each and "(" not in each.split("\n")[0]]
    paragraph = " ".join((paragraphs or [text])[0].split())
    sentence = re.split(r"(?<=[a-z)])\.\s", paragraph)[0].rstrip(".")[:240]
    asked = rng.choice((f"What does {name} do?", f"What is {name} in Python?", f"Explain {name} in Python."))
    return asked, f"{name}: {sentence}."


def story(rng: random.Random) -> Exchange:
    """A story of a few templated sentences."""
    hero, name, place, goal = (rng.choice(each) for each in (HEROES, NAMES, PLACES, GOALS))
    friend = rng.choice([each for each in NAMES if each != name])
    mood = rng.choice(("happy", "proud", "tired but happy", "very glad"))
    middle = rng.choice(
        (
            f"One day {name} went out to look for {goal}. On the way {name} met {friend}.",
            f"One morning {name} heard about {goal} and wanted to find it. {friend} came along.",
            f"{name} had always wished for {goal}. One evening {friend} knew where to look.",
        )
    )
    last = rng.choice(
        (
            f"Together they searched until the sun went down, and at last they found {goal}.",
            f"They looked everywhere, and in the end {friend} saw {goal} under a tree.",
            f"It took a long time, but together they found {goal}.",
        )
    )
    reply = (
        f"Once upon a time there was a {hero} named {name} who lived in a {place}. {middle} {last} "
        f"{name} was {mood}, and they went home together."
    )
    return rng.choice((f"Tell me a story about a {hero}.", f"Write a short story about a {hero}.")), reply


def sums(rng: random.Random) -> Exchange:
    """A sum of everyday objects."""
    name, thing = rng.choice(NAMES), rng.choice(("apples", "books", "coins", "stones", "pencils"))
    first, second = rng.randint(2, 20), rng.randint(1, 20)
    if rng.random() < 0.5 or first <= second:
        return f"{name} has {first} {thing} and gets {second} more. How many {thing} does {name} have?", (
            f"{direct_reply('+', first, second)}, so {name} has {first + second} {thing}."
        )
    return f"{name} has {first} {thing} and gives away {second}. How many {thing} are left?", (
        f"{direct_reply('-', first, second)}, so {first - second} {thing} are left."
    )


def small_talk(rng: random.Random) -> Exchange:
    """Greetings and questions about the model."""
    return rng.choice(list(facts.SMALL_TALK.items()))


TOPICS: dict[str, tuple[Callable[[random.Random], Exchange], int]] = {
    "capital": (capital, 5),
    "fact": (fact, 6),
    "meaning": (meaning, 4),
    "calendar": (calendar, 2),
    "counting": (counting, 3),
    "spelling": (spelling, 2),
    "python": (python, 3),
    "story": (story, 2),
    "sums": (sums, 2),
    "small-talk": (small_talk, 4),
}
ALWAYS_TRAINED = ("small-talk", "story")
MEASURED = ("capital", "calendar", "counting", "sums")


def kept(topic: str, asked: str) -> bool:
    """Whether a question is held out; small talk and stories have too few phrasings to lose any."""
    return topic not in ALWAYS_TRAINED and held_out("chat", asked)


def exchange(rng: random.Random) -> Exchange:
    """A training exchange on a random topic."""
    while True:
        topic = rng.choices(list(TOPICS), [weight for _, weight in TOPICS.values()])[0]
        asked, reply = TOPICS[topic][0](rng)
        if not kept(topic, asked):
            return asked, reply


class Chat:
    """Dialogs of one to four exchanges, some with a system message."""

    name = "chat"

    def document(self, rng: random.Random, tokens: int) -> Document:
        """A dialog."""
        writer = Writer(base=0.2)
        if rng.random() < 0.2:
            writer.say(f"{TURN}system\n{rng.choice(facts.SYSTEMS)}{STOP}\n")
        for _ in range(rng.choice((1, 1, 2, 3, 4))):
            writer.turn(*exchange(rng))
        return writer.document()

    def items(self, seed: int, count: int) -> list[Item]:
        """Held-out phrasings (the fact itself occurs in training under other phrasings)."""
        found: list[Item] = []
        for topic in MEASURED:
            rng = random.Random(f"{seed}:{topic}")
            seen: set[str] = set()
            for _ in range(200 * count):
                asked, reply = TOPICS[topic][0](rng)
                if len(seen) == count:
                    break
                if asked not in seen and kept(topic, asked):
                    seen.add(asked)
                    found.append(Item(f"chat-{topic}", chat_prompt(asked), reply + STOP))
        return found
