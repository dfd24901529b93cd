"""A worker that some requests end: prompts beginning with token 77 crash it in the third step after they came, with 78 hang it."""

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
        return step(self)

    worker.Engine.step = poisoned  # type: ignore[method-assign]


if __name__ == "__main__":
    poison()
    sys.exit(worker.main(int(sys.argv[1])))
