"""Models without a format of their own: the answer is {"name", "arguments" or "parameters"}, a list of these, or
{"tool_calls": [...]}."""

from __future__ import annotations

from collections.abc import Collection

from paceline.server.dialects.base import OpenCall, Parser
from paceline.server.dialects.grammar import Form
from paceline.server.dialects.reading import Malformed, Reading


class Json(Parser):
    """JSON that is no call is content as soon as one of its keys says so."""

    marked = False
    _wrapped = False  # in {"tool_calls": [...]}

    @staticmethod
    def form(parallel: bool, tokens: Collection[str]) -> Form:
        first, last = ("[", "]") if parallel else ("", "")
        return Form('{"name": ', ', "arguments": ', "}", first=first, between=", ", last=last)

    def _run(self) -> Reading[None]:
        yield from self._input.space()
        try:
            if (yield from self._input.more()) and self._input.text[self._input.at] in "{[":
                yield from self._list() if self._input.text[self._input.at] == "[" else self._object()
        except Malformed:
            self._give_back()
        yield from self._until(None)

    def _member(self, call: OpenCall, key: str) -> Reading[None]:
        if key != "tool_calls" or self._wrapped or call != OpenCall():
            yield from super()._member(call, key)
            return
        self._wrapped = True
        yield from self._list()
        call.ended = True
