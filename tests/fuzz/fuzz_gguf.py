"""Fuzz target: any bytes as a GGUF file, opened, listed and read in full."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "checkpoints"))
import numpy as np
from checkpoint_builders import ARRAY, F32, STRING, U16, U32, gguf_bytes, llama_keys, small_gguf
from mutate import main

from paceline.checkpoints.gguf import GgufCheckpoint
from paceline.checkpoints.gguf_file import TYPES
from paceline.core.errors import CheckpointError

_FOLDER = tempfile.TemporaryDirectory()


def target(data: bytes) -> None:
    path = Path(_FOLDER.name) / "x.gguf"
    path.write_bytes(data)
    try:
        c = GgufCheckpoint(path)
        for name, info in c.tensors().items():
            if info.nbytes < 1 << 20:
                c.read(name)
        c.close()
    except CheckpointError:
        pass


def seeds() -> list[bytes]:
    """A plain model, one with a vocabulary and rotary factors, one tensor of every type, a split part, experts."""
    keys = llama_keys(
        tokenizer__ggml__tokens=(ARRAY, (STRING, ["a", "b", "<0x-1>", ""])),
        tokenizer__ggml__scores=(ARRAY, (F32, [0.0, 1.0, -1.0, 2.0])),
        nested=(ARRAY, (ARRAY, [(U32, [1, 2]), (STRING, ["x"])])),
        llama__expert_count=(U32, 2),
        llama__expert_used_count=(U32, 1),
    )
    table = ("token_embd.weight", [32, 4], 0, 0)
    experts = [("blk.0.ffn_gate_exps.weight", [32, 4, 2], 8, 512), ("rope_freqs.weight", [8], 0, 800)]
    types, offset = [], 512
    for number, (_, block, size) in TYPES.items():
        types.append((f"blk.0.t{number}.weight", [block, 2], number, offset))
        offset += -(-2 * size // 32) * 32
    attention = [("blk.0.attn_q.weight", [32, 32], 2, 512), ("blk.0.attn_k.weight", [32, 32], 1, 1088)]
    split = llama_keys(split__no=(U16, 0), split__count=(U16, 2))
    return [
        small_gguf(),
        gguf_bytes(keys, [table, *experts], bytes(800) + np.ones(8, "<f4").tobytes()),
        gguf_bytes(llama_keys(), [table, *types], bytes(offset)),
        gguf_bytes(llama_keys(), [table, *attention], bytes(4096)),
        gguf_bytes(split, [table], bytes(512)),
    ]


if __name__ == "__main__":
    main(target, seeds())
