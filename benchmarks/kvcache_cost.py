"""What the cache's bookkeeping costs per step, apart from all arithmetic.

32 decoding sequences: reserve, tables and settle of one row each. The prefix index: finding and adding prompts of about
2,000 tokens of which a half is shared, and giving pages back one at a time. Medians in microseconds; the last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
from time import perf_counter
from typing import Any

import numpy as np

from paceline.core.kvcache import KVCache, make_groups
from paceline.core.specs import KV
from paceline.techniques.serving.radix import RadixIndex


class NoMemory:
    """Bookkeeping only: pools that are never read or written."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return None

    def move(self, pool: Any, src: np.ndarray, dst: np.ndarray) -> None:
        pass

    def numpy(self, x: Any) -> np.ndarray:
        raise NotImplementedError


def step_cost(n_seqs: int, n_groups: int, n_steps: int) -> float:
    cache = KVCache(make_groups([KV(n_groups, 1)], 16, head_split=1), NoMemory(), "float32", n_seqs * 140)
    kvs = [cache.new() for _ in range(n_seqs)]
    for i, kv in enumerate(kvs):
        assert cache.reserve(kv, np.arange(500 + i)) is not None
        cache.settle(kv)
    times = []
    for step in range(n_steps):
        position = np.array([1000 + step], np.int32)
        start = perf_counter()
        for kv in kvs:
            cache.reserve(kv, position)
        for g in range(n_groups):
            cache.tables(kvs, g)
        for kv in kvs:
            cache.settle(kv)
        times.append(perf_counter() - start)
    return float(np.median(times)) * 1e6


def index_cost(n_prompts: int) -> dict[str, float]:
    cache = KVCache(make_groups([KV(1, 1)], 16), NoMemory(), "float32", 20000)
    index = RadixIndex(cache)
    cache.evict = index.evict
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 50000, 2048).tolist()
    times: dict[str, list[float]] = {"match": [], "insert": [], "evict one page": []}
    for _ in range(n_prompts):
        tokens = shared[: int(rng.integers(1, 128)) * 16] + rng.integers(0, 50000, 1024).tolist()
        start = perf_counter()
        n, pages = index.match(tokens)
        times["match"].append(perf_counter() - start)
        kv = cache.adopt(pages, n)
        assert cache.reserve(kv, np.arange(n, len(tokens))) is not None
        cache.settle(kv)
        start = perf_counter()
        index.insert(tokens, kv)
        times["insert"].append(perf_counter() - start)
        cache.free(kv)
    for _ in range(n_prompts):
        start = perf_counter()
        index.evict(1, 0)
        times["evict one page"].append(perf_counter() - start)
    return {name: float(np.median(t)) * 1e6 for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=400)
    args = parser.parse_args()
    out: dict[str, Any] = {f"step_us_{n}_groups": step_cost(32, n, args.steps) for n in (1, 2, 8)}
    out["prefix_us"] = index_cost(args.prompts)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
