"""How fast is the engine in real shapes, and what share of the machine is that?

    python benchmarks/shapes.py [--shapes smollm2-135m,...] [--formats bf16,int8,int4] [--runs 3] [--quick]

Random weights; prefill of 512 and 2048 tokens, decode of 1, 8 and 32 sequences after 128 tokens; medians. Bandwidth and peak are
measured in the same process. Each shape and format runs in a process of its own, so that peak memory is that model's. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any


def bench(shape: str, fmt: str, runs: int, quick: bool) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "paceline",
        "bench",
        "--shape",
        shape,
        "--format",
        fmt,
        "--runs",
        str(runs),
        "--json",
    ]
    command += ["--context", "4096", "--prompt", "128", "--prefill", "512", "--batch", "1", "--batch", "8"]
    if not quick:
        command += ["--prefill", "2048", "--batch", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="smollm2-135m,qwen3-0.6b,llama-3.2-1b")
    p.add_argument("--formats", default="bf16,int8,int4")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--quick", action="store_true", help="without prefill 2048 and batch 32")
    args = p.parse_args()
    results = []
    for shape in args.shapes.split(","):
        for fmt in args.formats.split(","):
            r = bench(shape, fmt, args.runs, args.quick)
            results.append(r)
            mib, weights = r["peak_rss_bytes"] / 2**20, r["weight_bytes"] / 2**20
            peaks = ", ".join(f"{unit} {peak / 1e12:.2f} TFLOP/s" for unit, peak in r["peak_flop_s"].items())
            limits = f"bandwidth {r['bandwidth_bytes_s'] / 1e9:.1f} GB/s, {peaks}"
            print(f"{shape} {fmt}: load {r['load_s']:.1f} s, peak {mib:.0f} MiB (weights {weights:.0f}), {limits}")
            for c in r["cells"]:
                print(
                    f"  {c['work']:>13}: {c['tokens_per_s']:8.1f} tokens/s  spread {100 * c['spread']:3.0f} %  "
                    f"{100 * c['bandwidth_share']:3.0f} % of bandwidth  {100 * c['peak_share']:3.0f} % of peak"
                )
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
