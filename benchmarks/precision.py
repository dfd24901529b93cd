"""What do int8 and int4 change? KL divergence of each format from bf16, on random weights in a real shape.

    python benchmarks/precision.py [--shape llama-3.2-1b] [--formats int8,int4,...] [--tokens 256]

Random weights have no structure that rounding could spare, so these are figures for the arithmetic, not for a trained model (for that:
`paceline eval kl`). Prompts are random token ids. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from paceline.analysis.quality import divergence
from paceline.analysis.synthetic import RandomCheckpoint
from paceline.llm import LLM


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="llama-3.2-1b")
    p.add_argument(
        "--formats",
        default="int8,int8:group=0,int4,int4:group=128,int4:group=32,mins",
        help="separated by blanks or commas",
    )
    p.add_argument("--tokens", type=int, default=256)
    args = p.parse_args()
    results = []
    with LLM(RandomCheckpoint(args.shape), format="bf16", context=512) as reference:
        ids = np.random.default_rng(0).integers(0, reference.plan.model.n_vocab, args.tokens).tolist()
        for fmt in args.formats.replace(",mins", "+mins").replace(",", " ").replace("+mins", ",mins").split():
            with LLM(RandomCheckpoint(args.shape), format=fmt, context=512) as candidate:
                d = divergence(reference, candidate, ids, 64)
            results.append({"format": fmt, **d.describe()})
            print(
                f"{fmt:>22}: KL {d.mean_kl:.3e} ± {d.stderr:.1e} nats, top-1 agreement {100 * d.top1_agreement:.1f} %"
            )
    print(json.dumps({"shape": args.shape, "results": results}))


if __name__ == "__main__":
    main()
