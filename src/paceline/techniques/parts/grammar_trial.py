"""Grammars tried out in a process of their own before one that serves depends on them.

The compiler recurses as deep as a grammar nests and bounds most of its work, not all: there are short texts that
overflow the stack, and others that do not come to an end. Here such a text ends a helper process, which has a small
stack, little memory and a deadline, and nothing else. Run as a module it is that helper: a line of JSON for each
grammar, and a line back.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from time import monotonic
from typing import Any

SECONDS = 1.5  # for one grammar
START_SECONDS = 60.0
STACK = 1 << 20  # bytes; the threads that compile for use have more
MEMORY = 2 << 30  # bytes of address space
N_STEPS = 48  # tokens of one byte that a trial writes
MAX_LINE = 1 << 20


class Trial:
    """Tries grammars; starts its helper when first asked, and again after one was lost. Safe to use from several threads.

    specials: texts of the tokens that a grammar may name.
    """

    def __init__(self, specials: Sequence[str] = ()):
        self._specials = list(specials)
        self._helper: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def why_not(self, grammar: str) -> str | None:
        """Why a grammar (as llguidance takes it) cannot be used; None if it can. At most twice SECONDS, but for the start of the helper.

        Raises RuntimeError when there is no helper to be had.
        """
        with self._lock:
            for _ in range(
                2
            ):  # a helper may have been lost before, for another reason, such as the system's want of memory
                if self._helper is None or self._helper.poll() is not None:
                    self._start()
                try:
                    return self._ask(grammar, SECONDS) or None
                except TimeoutError:
                    self._stop()
                    break
                except OSError:
                    self._stop()
            return f"is too complex: compiling it takes more than {SECONDS:g} s, or more memory or recursion than is granted"

    def close(self) -> None:
        """End the helper."""
        with self._lock:
            self._stop()

    def __del__(self) -> None:
        self._stop()

    def _start(self) -> None:
        self._stop()
        command, env = [sys.executable, "-m", __name__], {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        try:
            self._helper = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env, start_new_session=True
            )
            self._ask(self._specials, START_SECONDS)
        except (OSError, TimeoutError) as e:
            self._stop()
            raise RuntimeError("the helper process that tries grammars does not start") from e

    def _stop(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        helper.kill()
        for pipe in (helper.stdin, helper.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written to a process that has ended
                    pipe.close()
        helper.wait()

    def _ask(self, message: Any, seconds: float) -> str:
        """Raises TimeoutError when no line comes in time, OSError when the helper has ended."""
        assert self._helper is not None
        pipe, out = self._helper.stdin, self._helper.stdout
        assert pipe is not None
        assert out is not None
        pipe.write(json.dumps(message).encode() + b"\n")
        pipe.flush()
        until = monotonic() + seconds
        line = b""
        with selectors.DefaultSelector() as ready:
            ready.register(out, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not ready.select(max(0.0, until - monotonic())):
                    raise TimeoutError
                piece = out.read1(1 << 16)  # type: ignore[attr-defined]
                if not piece or len(line) > MAX_LINE:
                    raise OSError("the helper has ended")
                line += piece
        return str(json.loads(line))


# --- the helper -----------------------------------------------------------------------------------


class _Bytes:
    """A vocabulary of single bytes, an end token and the tokens that grammars may name (llguidance.TokenizerWrapper)."""

    def __init__(self, specials: Sequence[str]):
        named = [s.encode("utf-8") for s in specials]
        self.tokens = [bytes([b]) for b in range(256)] + [b"<end>", *named]
        self.eos_token_id, self.bos_token_id = 256, None
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("takes text")
        return list(text.encode("utf-8"))


def _try(tokenizer: Any, grammar: str) -> str:
    """ "" or what is wrong. Compiles, and writes some bytes at random, since work is put off until it is needed."""
    from paceline.techniques.parts.grammar import Mask, new_matcher

    matcher = new_matcher(tokenizer, grammar)
    if matcher.is_error():
        return str(matcher.get_error())
    draw = random.Random(0)
    for _ in range(N_STEPS):
        tokens = Mask(matcher, tokenizer.vocab_size).tokens()
        if matcher.is_error():
            return f"is too complex to follow: {matcher.get_error()}"
        others = tokens[tokens < 256]
        if not len(others):
            break
        if not matcher.consume_token(int(others[draw.randrange(len(others))])):
            return f"is too complex to follow: {matcher.get_error()}"
    return ""


def _serve() -> None:
    import llguidance

    import paceline.techniques.parts.grammar  # noqa: F401  (before memory is limited)

    _limit_memory()
    specials = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(specials)), eos_token=[256])
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # should nobody be there any more to end this process
        print(json.dumps(_try(tokenizer, json.loads(line))[:4000]), flush=True)
        faulthandler.cancel_dump_traceback_later()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass  # Windows has no such limits, others may not grant them; the deadline remains


def main() -> None:
    threading.stack_size(STACK)
    worker = threading.Thread(target=_serve)
    worker.start()
    worker.join()


if __name__ == "__main__":
    main()
