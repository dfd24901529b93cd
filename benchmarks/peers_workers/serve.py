"""What every worker is: a process that holds one peer with one model and answers requests, a JSON object per line.

    {"do": "prefill", "n": 512, "seed": 1}                                    -> {"seconds": ..., "tokens": 512}
    {"do": "decode", "batch": 8, "context": 512, "n": 32, "room": 96, "seed": 2} -> {"seconds": ..., "tokens": 256}
    {"do": "generate", "prompts": [[...], ...], "n": 8}                       -> {"tokens": [[...], ...]}

The first line says {"ready": {...}} or {"error": "..."}. Sequences of a decode request stay where they are, so the next request of
the same batch and context goes on with them; `room` steps are asked for in all. Only the standard library is used here: the peers'
environments share nothing else.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
import traceback
from typing import Any, Protocol

WARM = 2  # steps before those that count

Prompt = list[int]


class Peer(Protocol):
    """One engine with its model. Greedy everywhere; no end of text.

    whole: `step` runs the prompts anew each time and returns the time of decoding alone, so nothing is kept between calls.
    """

    n_vocab: int
    whole: bool

    def facts(self) -> dict[str, Any]:
        """Settings worth writing down."""

    def prefill(self, prompt: Prompt) -> float:
        """Seconds from the prompt's submission to its first token."""

    def begin(self, prompts: list[Prompt], room: int) -> None:
        """Compute the prompts; `room` steps will follow."""

    def step(self, n: int) -> tuple[float, int]:
        """n decoding steps of all sequences: seconds, tokens."""

    def end(self) -> None:
        """Drop the sequences."""

    def generate(self, prompts: list[Prompt], n: int) -> list[list[int]]:
        """The n tokens that follow each prompt."""


class Server:
    def __init__(self, peer: Peer):
        self.peer = peer
        self.held: tuple[int, int] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request["do"]
        if do == "prefill":
            self._release()
            n = request["n"]
            return {"seconds": self.peer.prefill(self._prompt(n, request["seed"])), "tokens": n}
        if do == "decode":
            return self._decode(request)
        self._release()
        return {"tokens": self.peer.generate(request["prompts"], request["n"])}

    def _decode(self, request: dict[str, Any]) -> dict[str, Any]:
        batch, context = request["batch"], request["context"]
        if self.held != (batch, context):
            self._release()
            prompts = [self._prompt(context, 1000 * request["seed"] + i) for i in range(batch)]
            self.peer.begin(prompts, request["room"] + WARM)
            self.held = (batch, context)
            if not self.peer.whole:
                self.peer.step(WARM)
        seconds, tokens = self.peer.step(request["n"])
        return {"seconds": seconds, "tokens": tokens}

    def _prompt(self, n: int, seed: int) -> Prompt:
        rng = random.Random(seed)
        return [rng.randrange(256, self.peer.n_vocab - 2) for _ in range(n)]

    def _release(self) -> None:
        if self.held is not None:
            self.peer.end()
            self.held = None


def peak_rss() -> int:
    """Bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(make: Any, serve_with: Any = Server) -> None:
    """Serve `make(options)`, where options are the JSON object given as first argument: model, bits, threads, n_vocab,
    max_context (of a sequence), max_batch, max_tokens (of all sequences)."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the peer prints goes to the log
    say = lambda value: out.write(json.dumps(value) + "\n")  # noqa: E731
    try:
        start = time.perf_counter()
        peer = make(json.loads(sys.argv[1]))
        ready = {"load_s": time.perf_counter() - start, "facts": peer.facts(), "peak_rss_bytes": peak_rss()}
    except Exception as e:
        traceback.print_exc()
        say({"error": f"{type(e).__name__}: {str(e)[:300]}"})
        return
    say({"ready": ready})
    server = serve_with(peer)
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as e:
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
        say({**answer, "peak_rss_bytes": peak_rss()})
    os._exit(0)  # some runtimes hang in their destructors
