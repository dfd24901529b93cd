"""Mistral: [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], and since tokenizer v11 [TOOL_CALLS]name[ARGS]{...}.

Format: mistral-common's instruct tokenizers (v3 to v13).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Collection

from paceline.server.dialects.base import MAX_NAME, OpenCall, Parser
from paceline.server.dialects.grammar import Form
from paceline.server.dialects.reading import Malformed, Reading

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[^\[\]{}\s]+")
_ALPHABET = string.ascii_letters + string.digits
_ID = re.compile(r"[A-Za-z0-9]{9}")


class Mistral(Parser):
    """Ids are nine letters or digits: Mistral's templates refuse others."""

    markers = (BEGIN, ID, ARGUMENTS)

    @staticmethod
    def form(parallel: bool, tokens: Collection[str]) -> Form:
        if ARGUMENTS in tokens:
            return Form(BEGIN, ARGUMENTS, "", quoted=False, trigger=BEGIN)
        return Form('{"name": ', ', "arguments": ', "}", first=f"{BEGIN} [", between=", ", last="]", trigger=BEGIN)

    @staticmethod
    def call_id(given: str | None = None) -> str:
        if given is None:
            return "".join(secrets.choice(_ALPHABET) for _ in range(9))
        if _ID.fullmatch(given):
            return given
        digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()
        return "".join(_ALPHABET[b % len(_ALPHABET)] for b in digest[:9])

    def _run(self) -> Reading[None]:
        while (yield from self._until(BEGIN)):
            try:
                yield from self._input.space()
                first = yield from self._input.peek()
                if first == "[":
                    yield from self._list()
                elif first == "{":
                    yield from self._object()
                else:
                    yield from self._named()
            except Malformed:
                self._give_back()

    def _named(self) -> Reading[None]:
        call = self._call = OpenCall()
        name = yield from self._word(MAX_NAME)
        yield from self._input.space()
        if (yield from self._input.skip(ID)):
            call.id = yield from self._word(64)
            yield from self._input.space()
        yield from self._input.skip(ARGUMENTS)
        yield from self._input.space()
        if (yield from self._input.peek()) != "{":
            raise Malformed
        call.name = name
        yield from self._arguments(call)

    def _word(self, most: int) -> Reading[str]:
        word = ""
        while (yield from self._input.more()) and (found := _NAME.match(self._input.text, self._input.at)):
            word += self._input.take(found.end() - self._input.at)
            if len(word) > most:
                raise Malformed
        if not word:
            raise Malformed
        return word
