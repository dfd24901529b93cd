"""What the fuzz targets share: run under atheris where it is installed, else a seeded mutator of the seeds.

`python fuzz_x.py --runs 2000 [--seed 0] [corpus files ...]`. A target takes bytes and must return or raise
CheckpointError.
"""

from __future__ import annotations

import argparse
import random
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SLOWEST = 2.0  # seconds for one input of a few kilobytes; real ones take under a millisecond
INTERESTING = [
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    127,
    128,
    255,
    256,
    65535,
    65536,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    (1 << 32) - 1,
    1 << 62,
    1 << 63,
    (1 << 63) - 1,
    (1 << 64) - 1,
]

Target = Callable[[bytes], None]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random edits: bits, bytes, interesting integers, cuts, copies, insertions."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind in (2, 3):
            code, size = rng.choice([("<H", 2), ("<I", 4), ("<Q", 8), ("<Q", 8)])
            out[at : at + size] = struct.pack(code, rng.choice(INTERESTING) & ((1 << 8 * size) - 1))
        elif kind == 4:
            del out[at : at + rng.choice([1, 2, 8, 64, 4096])]
        elif kind == 5:
            n, start = rng.choice([1, 4, 8, 30, 200]), rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + n]
        elif kind == 6:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4, 8])))
        else:
            out[at:at] = str(rng.choice([*INTERESTING, -1, 1.5])).encode()
    return bytes(out)


def fuzz(target: Target, seeds: Sequence[bytes], runs: int, seed: int = 0) -> float:
    """Run the target on the seeds and on mutations of them (and of mutations). Gives the slowest run's seconds.

    A failing input is written to crash.bin in the working directory.
    """
    rng = random.Random(seed)
    pool, slowest = list(seeds), 0.0
    for i in range(runs):
        data = pool[i] if i < len(seeds) else mutate(rng.choice(pool), rng)
        start = time.process_time()
        try:
            target(data)
            spent = time.process_time() - start
            if spent > SLOWEST:
                raise AssertionError(f"took {spent:.1f} s")
        except BaseException:
            Path("crash.bin").write_bytes(data)
            raise
        slowest = max(slowest, spent)
        if len(data) < 20_000 and rng.random() < 0.05:
            pool[len(seeds) :] = [*pool[len(seeds) :][-200:], data]
    return slowest


def main(target: Target, seeds: Sequence[bytes]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("files", nargs="*", type=Path, help="further seeds, or a crash to repeat")
    args = parser.parse_args()
    seeds = [*seeds, *(f.read_bytes() for f in args.files)]
    try:
        import atheris
    except ImportError:
        slowest = fuzz(target, seeds, args.runs, args.seed)
        print(f"{args.runs} runs, the slowest took {1000 * slowest:.1f} ms")
        return
    corpus = Path("corpus")
    corpus.mkdir(exist_ok=True)
    for i, s in enumerate(seeds):
        (corpus / f"seed{i}").write_bytes(s)
    atheris.instrument_all()
    atheris.Setup(["fuzz", f"-atheris_runs={args.runs}", str(corpus)], target)
    atheris.Fuzz()
