"""Leave alone for a while what keeps failing."""

from __future__ import annotations

import logging
import threading
from time import monotonic

log = logging.getLogger(__name__)


class Pause:
    """Closed after a failure for `first` seconds, twice as long after each further one, at most `longest`. Changes are logged once."""

    def __init__(self, what: str, first: float, longest: float):
        self.what, self.first, self.longest = what, first, longest
        self.why: str | None = None  # the last failure, None after a success
        self.n_failures = 0
        self._seconds = 0.0
        self._until = 0.0
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        return self.why is not None and monotonic() < self._until

    def failed(self, why: str) -> None:
        with self._lock:
            self.n_failures += 1
            if self.why is None:
                log.warning("%s is paused: %s", self.what, why)
            self.why = why
            self._seconds = min(self.longest, 2 * self._seconds or self.first)
            self._until = monotonic() + self._seconds

    def worked(self) -> None:
        if self.why is None:
            return
        with self._lock:
            log.warning("%s works again", self.what)
            self.why, self._seconds = None, 0.0
