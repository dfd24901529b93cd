"""No calls: all is content."""

from __future__ import annotations

from paceline.server.dialects.base import Parser
from paceline.server.dialects.events import Content
from paceline.server.dialects.reading import Reading


class Plain(Parser):
    """Passes text through, whitespace and all."""

    def _run(self) -> Reading[None]:
        while (yield from self._input.more()):
            self._events.append(Content(self._input.text[self._input.at :]))
            self._input.at = len(self._input.text)
