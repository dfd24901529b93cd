"""No calls: all is content."""

from __future__ import annotations

from paceline.server.dialects.base import Content, Parser, Reading


class Plain(Parser):
    """Passes text through, whitespace and all."""

    def _run(self) -> Reading[None]:
        while (yield from self._more()):
            self._events.append(Content(self._text[self._at :]))
            self._at = len(self._text)
