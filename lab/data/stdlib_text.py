"""Source and documentation of the running interpreter's own standard library."""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import pydoc_data.topics
import random
import sysconfig
from pathlib import Path

from lab.data.base import END, Document, Item, held_out, listed

SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "ensurepip",
}
DOMAINS = ("source", "documentation")
DOCUMENTED = listed(
    "argparse ast base64 bisect calendar collections copy csv datetime decimal difflib fractions "
    "functools glob hashlib heapq html inspect io itertools json logging math operator os os.path "
    "pathlib pprint random re shutil socket sqlite3 statistics string struct subprocess sys tempfile "
    "textwrap threading time traceback types typing unittest urllib.parse uuid zipfile"
)


def source_files() -> list[Path]:
    """The ``.py`` files of the standard library without tests, sorted; the root is the interpreter's."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in root.rglob("*.py")
        if not SKIPPED & set(path.relative_to(root).parts) and path.name != "topics.py"
    ]
    return sorted(found)


@functools.cache
def source_texts() -> dict[str, str]:
    """Source text by module path relative to the library's root; undecodable files are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in source_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        relative = path.relative_to(root).as_posix()
        if len(text) > 200 and "_sysconfigdata" not in relative and not relative.startswith("encodings/"):
            texts[relative] = text
    return texts


def public_names(module: object) -> list[str]:
    """The names a module says it exports, or all without a leading underscore."""
    listed = getattr(module, "__all__", None)
    return sorted(listed if listed is not None else (each for each in dir(module) if not each.startswith("_")))


@functools.cache
def docstrings() -> dict[str, str]:
    """Documentation by qualified name, of the builtins and of the modules in ``DOCUMENTED``."""
    found: dict[str, str] = {}
    modules = [("", builtins)] + [(f"{each}.", importlib.import_module(each)) for each in DOCUMENTED]
    for prefix, module in modules:
        for name in public_names(module):
            value = getattr(module, name, None)
            if not callable(value) or (isinstance(value, type) and issubclass(value, BaseException)):
                continue
            text = inspect.getdoc(value)
            if text and len(text) > 20:
                found[f"{prefix}{name}"] = text
            if isinstance(value, type) and not prefix:
                for method in sorted(each for each in vars(value) if not each.startswith("_")):
                    note = inspect.getdoc(getattr(value, method))
                    if note:
                        found[f"{name}.{method}"] = note
    return found


@functools.cache
def documentation_texts() -> dict[str, str]:
    """The language reference's topics and the docstrings, by name."""
    texts = {f"topic/{name}": text for name, text in sorted(pydoc_data.topics.topics.items())}
    for name, text in docstrings().items():
        texts[f"doc/{name}"] = f"Help on {name}:\n\n{text}\n"
    return texts


def corpus(domain: str) -> dict[str, str]:
    """All texts of a domain by name."""
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; there are: {', '.join(DOMAINS)}")
    return source_texts() if domain == "source" else documentation_texts()


def split(domain: str, evaluation: bool) -> dict[str, str]:
    """The held-out texts of a domain, or the others."""
    return {name: text for name, text in corpus(domain).items() if held_out(domain, name) == evaluation}


@functools.cache
def paragraphs() -> tuple[str, ...]:
    """Training paragraphs of documentation of 80 to 600 characters, the filler of recall documents."""
    pieces = (each.strip() for text in split("documentation", False).values() for each in text.split("\n\n"))
    return tuple(each for each in pieces if 80 <= len(each) <= 600)


class StdlibText:
    """Windows of the training texts."""

    name = "stdlib"

    def __init__(self) -> None:
        self.texts = {domain: list(split(domain, False).values()) for domain in DOMAINS}
        self.sizes = {domain: [len(text) for text in self.texts[domain]] for domain in DOMAINS}

    def document(self, rng: random.Random, tokens: int) -> Document:
        """A window of about ``tokens`` tokens (3.5 characters each) that starts at a line."""
        domain = rng.choices(DOMAINS, (5, 1))[0]
        text = rng.choices(self.texts[domain], self.sizes[domain])[0]
        room = int(tokens * 3.5)
        start = max(0, rng.randrange(-room // 4, max(1, len(text) - room // 4)))
        if start:
            start = text.find("\n", start) + 1
        return Document(text[start : start + room].replace(END, ""), base=0.6)

    def items(self, seed: int, count: int) -> list[Item]:
        """None: text is measured by its perplexity."""
        return []
