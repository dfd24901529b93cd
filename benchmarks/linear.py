"""Linear kernels in the shapes of Llama-3.2-1B: how close to the memory (few rows) and to the arithmetic (many rows) of this machine?

    python benchmarks/linear.py [--isa NAME] [--threads N] [--formats bf16,int8,int4] [--seconds S]

Every figure is the best of the runs that fit into `seconds`; the memory bandwidth and the peak it is compared with are measured the
same way in the same process, just before. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from paceline.ops.native import NativeOps
from paceline.ops.packed import LANES, Packed

SHAPES = {"mlp": (8192, 2048), "down": (2048, 8192), "attention": (2048, 2048), "head": (128256, 2048)}  # (N, K)
CASES = {
    "f32": ("f32", 0, False),
    "f16": ("f16", 0, False),
    "bf16": ("bf16", 0, False),
    "int8": ("int8", 0, False),
    "int8-g32": ("int8", 32, False),
    "int8-g128": ("int8", 128, False),
    "int4": ("int4", 32, False),
    "int4g-g32": ("int4g", 32, False),
    "int4g-g64": ("int4g", 64, False),
    "int4g-g128": ("int4g", 128, False),
    "int4g-g128-mins": ("int4g", 128, True),
    "int4g-g32-mins": ("int4g", 32, True),
}
FEW, MANY = (1, 8, 32), 512


def random_packed(fmt: str, group: int, mins: bool, n: int, k: int) -> Packed:
    """Random bits in tile layout: the kernels' time does not depend on the values."""
    rng = np.random.default_rng(0)
    blocks = n // LANES
    if fmt == "f32":
        return Packed(fmt, (n, k), rng.random((blocks, k, LANES), np.float32))
    if fmt in ("f16", "bf16"):
        return Packed(fmt, (n, k), rng.integers(0x3000, 0x3C00, (blocks, k // 2, LANES, 2), np.uint16))
    data = rng.integers(
        0, 256, (blocks, k // 4, LANES, 4) if fmt == "int8" else (blocks, k // 64, 8, LANES, 4), np.uint8
    )
    if fmt == "int4":
        factors = rng.integers(-15, 16, (blocks, k // group, LANES), np.int8)
        return Packed(fmt, (n, k), data, np.full((blocks, 1, LANES), 0.01, np.float32), None, group, factors)
    scales = np.full((blocks, k // group if group else 1, LANES), 0.01, np.float16 if group else np.float32)
    return Packed(fmt, (n, k), data.view(np.int8) if fmt == "int8" else data, scales, scales if mins else None, group)


def best_time(fn: Any, seconds: float) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    fn()
    while True:
        start = time.perf_counter()
        fn()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > until:
            return best


def measure(ops: NativeOps, case: str, shape: str, seconds: float) -> list[dict[str, Any]]:
    n, k = SHAPES[shape]
    fmt, group, mins = CASES[case]
    w = random_packed(fmt, group, mins, n, k)
    kind = {"f32": "f32", "f16": "f32", "bf16": "bf16"}.get(fmt, "int8")
    out = []
    for m in (*FEW, MANY):
        if m == MANY and shape == "head":
            continue  # a step asks for the logits of few rows
        bandwidth = ops.device.read_bandwidth(1 << 28, 3)
        peak = ops.device.peak(kind, 0.1)
        x = np.random.default_rng(m).standard_normal((m, k), dtype=np.float32)
        t = best_time(lambda x=x: ops.linear(x, w), seconds)
        n_bytes, flops = w.nbytes + 4 * m * (n + k), 2 * m * n * k
        row = {
            "format": case,
            "shape": shape,
            "rows": m,
            "us": 1e6 * t,
            "gb_per_s": n_bytes / t / 1e9,
            "tflops": flops / t / 1e12,
        }
        row |= {"of_bandwidth": n_bytes / t / bandwidth, "of_peak": flops / t / peak}
        row |= {"bandwidth_gb_per_s": bandwidth / 1e9, "peak_tflops": peak / 1e12}
        out.append(row)
        print(
            f"{case:14s} {shape:10s} M={m:<4d} {row['us']:10.0f} us {row['gb_per_s']:6.1f} GB/s ({row['of_bandwidth']:4.0%} of "
            f"{row['bandwidth_gb_per_s']:.1f}) {row['tflops']:7.3f} TFLOPS ({row['of_peak']:4.0%} of {row['peak_tflops']:.2f})",
            flush=True,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=0.5)
    a = parser.parse_args()
    ops = NativeOps(a.isa, a.threads)
    rows = [r for c in a.formats.split(",") for s in a.shapes.split(",") for r in measure(ops, c, s, a.seconds)]
    print(json.dumps({"benchmark": "linear", "isa": ops.isa, "threads": ops.n_threads, "rows": rows}))


if __name__ == "__main__":
    main()
