"""Llama 3.1 to 3.3: {"name": ..., "parameters": {...}} as the whole answer, or after <|python_tag|>; several with ";".

Format: Meta's prompt format of Llama 3.1, "JSON based tool calling".
"""

from __future__ import annotations

from collections.abc import Collection

from paceline.server.dialects.base import Parser
from paceline.server.dialects.grammar import Form
from paceline.server.dialects.reading import Malformed, Reading

TAG = "<|python_tag|>"


class Llama3(Parser):
    """Code of the built-in tools, which the tag may announce as well, is content."""

    markers = (TAG,)
    marked = False

    @staticmethod
    def form(parallel: bool, tokens: Collection[str]) -> Form:
        return Form('{"name": ', ', "parameters": ', "}", between="; ", tag=TAG)

    def _run(self) -> Reading[None]:
        yield from self._input.space()
        if (yield from self._input.more()) and self._input.text[self._input.at] == "{":
            yield from self._calls()
        while (yield from self._until(TAG)):
            yield from self._calls()

    def _calls(self) -> Reading[None]:
        try:
            while True:
                yield from self._input.space()
                yield from self._object()
                yield from self._input.space()
                yield from self._input.skip(";")
                yield from self._input.space()
                if not (yield from self._input.more()):
                    self._input.held.clear()
                    break
                if self._input.text[self._input.at] != "{":
                    break
        except Malformed:
            pass
        self._give_back()
