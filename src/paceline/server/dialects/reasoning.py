"""What a model thinks before its answer, told apart from it: <think>...</think> and the like."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.server.dialects.base import Parser
from paceline.server.dialects.events import Reasoning
from paceline.server.dialects.reading import Reading


@dataclass(frozen=True)
class Tags:
    """What a model writes around its thoughts."""

    open: str
    close: str


TAGS = (
    Tags("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, SmolLM3, GLM-4.5
    Tags("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A, Command R7B
    Tags("<seed:think>", "</seed:think>"),  # Seed-OSS
    Tags("<thought>", "</thought>"),  # EXAONE Deep
    Tags("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
)


def tags(template_source: str) -> Tags | None:
    """The tags of a model with this chat template; None if it does not think in tags."""
    return next((t for t in TAGS if t.close in template_source), None)


def opens_reasoning(prompt: str, tags: Tags | None) -> bool:
    """Whether the rendered prompt ends with an open tag, so that the answer begins with thoughts.

    Only the very end counts: a tag further up may be a client's text.
    """
    return tags is not None and prompt.rstrip().endswith(tags.open)


class ReasoningParser(Parser):
    """Tells thoughts, and gives what follows to the parser `inner`.

    open: the answer begins with thoughts, with or without the tag. Without `open` it does if it begins with the tag.
    Whitespace around thoughts and newlines before the answer are left out. A block that is not closed is all thoughts.
    """

    def __init__(self, inner: Parser, tags: Tags, open: bool = False):
        super().__init__()
        self._inner = inner
        self._tags = tags
        self._open = open

    def _run(self) -> Reading[None]:
        yield from self._input.space()
        tagged = yield from self._input.skip(self._tags.open)
        if tagged or self._open:
            self._input.held.clear()
            if (yield from self._thoughts()):
                self._input.held.clear()
                while (yield from self._input.skip("\n")):
                    self._input.held.clear()
        self._events += self._inner.push("".join(self._input.held))
        self._input.held.clear()
        while (yield from self._input.more()):
            self._events += self._inner.push(self._input.text[self._input.at :])
            self._input.at = len(self._input.text)
        self._events += self._inner.finish()

    def _thoughts(self) -> Reading[bool]:
        self._kind = Reasoning
        self._strip = True  # whitespace before them
        return (yield from self._until(self._tags.close))
