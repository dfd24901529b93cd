"""Hermes, Qwen2.5, Qwen3 and many others: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere in the text.

Format: the model cards of NousResearch/Hermes-2-Pro and Qwen/Qwen2.5.
"""

from __future__ import annotations

from collections.abc import Collection

from paceline.server.dialects.base import Parser
from paceline.server.dialects.grammar import Form
from paceline.server.dialects.reading import Malformed, Reading

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(Parser):
    """The end marker may be missing, as may the brace before it: models forget both."""

    markers = (BEGIN, END)

    @staticmethod
    def form(parallel: bool, tokens: Collection[str]) -> Form:
        return Form(f'{BEGIN}\n{{"name": ', ', "arguments": ', f"}}\n{END}", between="\n", trigger=BEGIN)

    def _run(self) -> Reading[None]:
        while (yield from self._until(BEGIN)):
            try:
                yield from self._input.space()
                yield from self._object()
            except Malformed:
                ended = self._call.ended
                self._give_back()
                if not ended:
                    continue
            yield from self._input.space()
            yield from self._input.skip(END)
            self._input.held.clear()
