"""Errors as a person (stderr) or a program (`--json`) can use them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from paceline.core.errors import ConfigError, PacelineError


def guard(app: Callable[..., Any]) -> int:
    """Run the command line; user errors become one message, never a traceback."""
    try:
        app()
    except PacelineError as e:
        report(e, as_json="--json" in sys.argv)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader left (paceline ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    return 0


def report(e: PacelineError, as_json: bool) -> None:
    if as_json:
        problems = list(e.problems) if isinstance(e, ConfigError) else [str(e)]
        print(json.dumps({"error": {"type": type(e).__name__, "message": str(e), "problems": problems}}))
        return
    print(f"error: {e}", file=sys.stderr)
