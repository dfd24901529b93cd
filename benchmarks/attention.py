"""Attention alone, in the shapes of real models: decode (bound by memory) and prefill (bound by arithmetic), against both ceilings.

    python benchmarks/attention.py [--isa NAME] [--threads N] [--seconds S] [--kv bfloat16] [--shape NAME] [--case NAME]

A case is a batch of sequences, one program with the attention of several layers, each with a cache of its own; decode takes all
layers of the model, so that a long context comes from memory (that of `decode 128` fits a cache). GB/s counts K and V once per
sequence; GFLOP/s counts 4 * dim per visible (query head, index). `bound` is the larger of bytes / bandwidth (one pass over memory)
and FLOP / peak (of the bfloat16 or float32 instruction that the path uses), both measured in the same run; `share` is bound / time
of the best pass. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from paceline.core import entries
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
CASES: dict[str, list[tuple[int, int]]] = {  # (entries of the cache, rows at their end) of every sequence
    "decode 128": [(128, 1)],
    "decode 512": [(512, 1)],
    "decode 8k": [(8192, 1)],
    "batch 32": [(512, 1)] * 32,
    "mixed 8": [(n, 1) for n in (100, 4000, 30, 700, 250, 60, 1500, 6000)],
    "verify 8": [(2048, 9)],
    "prefill 512": [(512, 512)],
    "prefill 2048": [(2048, 2048)],
    "chunk at 8k": [(8192, 512)],
}
PAGE = 64
LAYERS_OF_PREFILL = 2


class Case:
    """Caches for every layer and a batch at their ends: `seqs` holds (context, n_rows)."""

    def __init__(self, ops: NativeOps, shape: Shape, seqs: list[tuple[int, int]], kv: str):
        self.ops, self.shape = ops, shape
        n_rows = sum(n for _, n in seqs)
        self.n_layers = shape.n_layers if n_rows <= 32 else LAYERS_OF_PREFILL
        layers = tuple(range(self.n_layers))
        rng = np.random.default_rng(0)
        group = KVGroup(0, KV(shape.n_kv_heads, shape.dim), layers, tuple(range(shape.n_kv_heads)), PAGE)
        n_pages = [-(-context // PAGE) for context, _ in seqs]
        k, v = ([self._pool(sum(n_pages), kv, rng) for _ in layers] for _ in range(2))
        tables, slots = self._tables(seqs, n_pages, rng)
        rows, cu = np.arange(n_rows, dtype=np.int32), np.cumsum([0, *(n for _, n in seqs)]).astype(np.int32)
        lens = np.array([context for context, _ in seqs], np.int32)
        groups = [GroupBatch(group, slots, tables, lens, k, v)]
        self.step = ops.begin(Batch(rows, rows, cu, np.zeros(0, np.int32), groups, [[0] for _ in layers]))
        widths = tuple(h * shape.dim for h in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads))
        self.qkv = [rng.standard_normal((n_rows, n), dtype=np.float32) for n in widths]
        self.program = ops.compile(self._trace, widths)
        n_seen = sum(n * context - n * (n - 1) // 2 for context, n in seqs)
        self.flop = 4.0 * shape.dim * shape.n_heads * n_seen * self.n_layers
        self.bytes = 2.0 * entries.n_bytes(kv, shape.dim) * shape.n_kv_heads * float(lens.sum()) * self.n_layers

    def _trace(self, q: Any, k: Any, v: Any, batch: Any) -> Any:
        return [self.ops.attention(q, k, v, batch, layer, self.shape.spec) for layer in range(self.n_layers)][-1]

    def _tables(
        self, seqs: list[tuple[int, int]], n_pages: list[int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        free, cu = rng.permutation(sum(n_pages)).astype(np.int32), np.cumsum([0, *n_pages])
        tables, slots = np.full((len(seqs), max(n_pages)), -1, np.int32), []
        for table, (a, b), (context, n) in zip(tables, pairwise(cu), seqs, strict=True):
            table[: b - a] = free[a:b]
            index = np.arange(context - n, context)
            slots.append(table[index // PAGE].astype(np.int64) * PAGE + index % PAGE)
        return tables, np.concatenate(slots)

    def _pool(self, n_pages: int, kv: str, rng: np.random.Generator) -> Any:
        pool = self.ops.empty((n_pages, self.shape.n_kv_heads, PAGE, entries.n_items(kv, self.shape.dim)), kv)
        page = rng.standard_normal((*pool.shape[1:-1], self.shape.dim), dtype=np.float32)
        pool[:] = entries.encode(page, kv).astype(pool.dtype, copy=False)
        return pool

    def seconds(self, budget: float) -> list[float]:
        times: list[float] = []
        until = time.perf_counter() + budget
        while len(times) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            self.program(*self.qkv, self.step)
            times.append(time.perf_counter() - start)
        return times[1:]


def measure(
    ops: NativeOps, shape: Shape, case_name: str, kv: str, budget: float, ceilings: dict[str, float]
) -> dict[str, Any]:
    case = Case(ops, shape, CASES[case_name], kv)
    times = case.seconds(budget)
    best = min(times)
    memory, arithmetic = case.bytes / ceilings["bandwidth"], case.flop / ceilings["peak"]
    row = {
        "shape": shape.name,
        "case": case_name,
        "kv": kv,
        "n_layers": case.n_layers,
        "us_per_layer": 1e6 * best / case.n_layers,
        "median_us_per_layer": 1e6 * float(np.median(times)) / case.n_layers,
        "GB/s": case.bytes / best / 1e9,
        "GFLOP/s": case.flop / best / 1e9,
        "bound": "memory" if memory > arithmetic else "arithmetic",
        "share": max(memory, arithmetic) / best,
    }
    print(
        f"{shape.name:14} {case_name:13} {row['us_per_layer']:10.1f} us per layer (median {row['median_us_per_layer']:.1f})"
        f" {row['GB/s']:7.1f} GB/s {row['GFLOP/s']:8.1f} GFLOP/s   {row['share']:.0%} of the {row['bound']} bound"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--kv", default="bfloat16", choices=["float32", "float16", "bfloat16", "int8"])
    parser.add_argument("--shape", choices=[s.name for s in SHAPES])
    parser.add_argument("--case", choices=list(CASES))
    args = parser.parse_args()
    ops = NativeOps(args.isa, args.threads)
    pairs = args.kv in ("bfloat16", "int8") and ops.isa in ("avx512_bf16", "amx")
    kind = "bf16" if pairs else "f32"
    ceilings = {"bandwidth": ops.device.read_bandwidth(), "peak": ops.device.peak(kind, 0.3)}
    print(
        f"{ops.isa}, {ops.n_threads} threads: {ceilings['bandwidth'] / 1e9:.1f} GB/s,"
        f" {ceilings['peak'] / 1e9:.0f} GFLOP/s {kind}"
    )
    shapes = [s for s in SHAPES if args.shape in (None, s.name)]
    rows = [
        measure(ops, s, c, args.kv, args.seconds, ceilings) for s in shapes for c in CASES if args.case in (None, c)
    ]
    print(json.dumps({"benchmark": "attention", "isa": ops.isa, "threads": ops.n_threads, **ceilings, "cases": rows}))


if __name__ == "__main__":
    main()
