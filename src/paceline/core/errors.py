"""What a user did wrong, said so that it can be mended.

Every error a user can cause derives from `PacelineError`; anything else that escapes is our own bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PacelineError(Exception):
    """A user-facing error: the message names the field, the value and the remedy."""


class ConfigError(PacelineError):
    """One or more options cannot be honoured. All problems are collected in one message."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems: Sequence[str] = [problems] if isinstance(problems, str) else list(problems)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems:\n"
        super().__init__(head + "\n".join(f"- {p}" if head else p for p in self.problems))


class CheckpointError(PacelineError):
    """A model file is missing, truncated, corrupt, unknown or contradicts itself."""


class TemplateError(PacelineError):
    """A chat template is invalid, refused its input, or exceeded its bounds."""


class RequestError(PacelineError):
    """A request cannot be served; the engine goes on serving the others."""


class OutOfMemory(PacelineError):
    """The plan does not fit in memory; the message says what would."""
