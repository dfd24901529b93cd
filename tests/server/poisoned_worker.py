"""A worker that some requests end, by the first token of their prompts.

77: it crashes in the third step after they came, every time. 78: it hangs. 79: it is killed at their first attempt, when the first
completion has as many tokens as the second token of the prompt says; 80: likewise, when the first completion has ended and others have not.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from paceline.server import worker


def poison() -> None:
    step = worker.Engine.step

    def poisoned(self: Any) -> Any:
        for live in self.live.values():
            first, n = live.request.tokens[0], len(live.seqs[0].output)
            if first == 77 and n >= 2:
                os.kill(os.getpid(), signal.SIGSEGV)
            if first == 78:
                time.sleep(3600)
            once = live.request.id.endswith("#1")
            if once and first == 79 and n >= live.request.tokens[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            if once and first == 80 and live.seqs[0].done:
                os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    worker.Engine.step = poisoned  # type: ignore[method-assign]


if __name__ == "__main__":
    poison()
    sys.exit(worker.main(int(sys.argv[1])))
