"""Attention alone: decode at a long context (bound by memory) and prefill (bound by arithmetic), in the shapes of real models.

    python benchmarks/attention.py [--isa NAME] [--threads N] [--seconds S] [--kv bfloat16]

Decode walks all layers' caches, so that no cache level holds them. GB/s counts K and V once; GFLOP/s counts 4 * dim per visible
(query head, index). Rates are of the best pass; `share` is that over the bandwidth (one pass over memory) or the float32 peak
measured in the same run. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.core.batch import Batch, GroupBatch
from paceline.core.specs import KV, AttnSpec, KVGroup
from paceline.ops.native import NativeOps


@dataclass(frozen=True)
class Shape:
    name: str
    n_heads: int
    n_kv_heads: int
    dim: int
    n_layers: int

    @property
    def spec(self) -> AttnSpec:
        return AttnSpec(self.n_heads, self.n_kv_heads, self.dim, self.dim**-0.5)


SHAPES = (Shape("llama-3.2-1b", 32, 8, 64, 16), Shape("smollm2-135m", 9, 3, 64, 30))
PAGE = 64


class Case:
    """Caches of `context` entries for every layer and a batch of `n_rows` rows at their end."""

    def __init__(self, ops: NativeOps, shape: Shape, context: int, n_rows: int, n_layers: int, kv: str):
        self.ops, self.shape, self.n_layers = ops, shape, n_layers
        rng = np.random.default_rng(0)
        n_pages = -(-context // PAGE)
        layers = tuple(range(n_layers))
        group = KVGroup(0, KV(shape.n_kv_heads, shape.dim), layers, tuple(range(shape.n_kv_heads)), PAGE)
        k, v = ([self._pool(n_pages, kv, rng) for _ in layers] for _ in range(2))
        table = rng.permutation(n_pages).astype(np.int32)
        index = np.arange(context - n_rows, context)
        slots = table[index // PAGE].astype(np.int64) * PAGE + index % PAGE
        rows = np.arange(n_rows, dtype=np.int32)
        cu = np.array([0, n_rows], np.int32)
        groups = [GroupBatch(group, slots, table[None], np.array([context], np.int32), k, v)]
        batch = Batch(rows, rows, cu, np.zeros(0, np.int32), groups, [[0] for _ in layers])
        self.step = ops.begin(batch)
        widths = [h * shape.dim for h in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)]
        self.qkv = [rng.standard_normal((n_rows, n), dtype=np.float32) for n in widths]
        n_seen = n_rows * context - n_rows * (n_rows - 1) // 2
        self.flop = 4.0 * shape.dim * shape.n_heads * n_seen * n_layers
        self.bytes = 2.0 * k[0].itemsize * shape.dim * shape.n_kv_heads * context * n_layers

    def _pool(self, n_pages: int, kv: str, rng: np.random.Generator) -> Any:
        pool = self.ops.empty((n_pages, self.shape.n_kv_heads, PAGE, self.shape.dim), kv)
        pool[:] = rng.standard_normal(pool.shape[1:], dtype=np.float32).astype(pool.dtype)
        return pool

    def seconds(self, budget: float) -> list[float]:
        times: list[float] = []
        until = time.perf_counter() + budget
        while len(times) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            for layer in range(self.n_layers):
                self.ops.attention(*self.qkv, self.step, layer, self.shape.spec)
            times.append(time.perf_counter() - start)
        return times[1:]


def measure(
    ops: NativeOps, shape: Shape, mode: str, kv: str, budget: float, ceilings: dict[str, float]
) -> dict[str, Any]:
    decode = mode == "decode"
    case = Case(ops, shape, 8192 if decode else 2048, 1 if decode else 2048, shape.n_layers if decode else 1, kv)
    times = case.seconds(budget)
    best = min(times)
    rate = case.bytes / best if decode else case.flop / best
    ceiling = ceilings["bandwidth"] if decode else ceilings["peak_f32"]
    row = {
        "shape": shape.name,
        "mode": mode,
        "kv": kv,
        "best_ms": 1e3 * best,
        "median_ms": 1e3 * float(np.median(times)),
        "GB/s": case.bytes / best / 1e9,
        "GFLOP/s": case.flop / best / 1e9,
        "share": rate / ceiling if ceiling else None,
    }
    print(
        f"{shape.name:14} {mode:8} {row['best_ms']:9.3f} ms {row['GB/s']:7.1f} GB/s {row['GFLOP/s']:8.1f} GFLOP/s"
        f"   share {row['share'] or 0:.0%} of the {'bandwidth' if decode else 'peak'}"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--kv", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    ops = NativeOps(args.isa, args.threads)
    ceilings = {"bandwidth": ops.device.read_bandwidth(), "peak_f32": ops.device.peak("f32", 0.3)}
    print(
        f"{ops.isa}, {ops.n_threads} threads: {ceilings['bandwidth'] / 1e9:.1f} GB/s, {ceilings['peak_f32'] / 1e9:.0f} GFLOP/s float32"
    )
    rows = [measure(ops, s, mode, args.kv, args.seconds, ceilings) for s in SHAPES for mode in ("decode", "prefill")]
    print(json.dumps({"benchmark": "attention", "isa": ops.isa, "threads": ops.n_threads, **ceilings, "cases": rows}))


if __name__ == "__main__":
    main()
