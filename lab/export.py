"""Write a trained model as a Hugging Face folder: ``python -m lab.export --work FOLDER --out FOLDER``.

Files are replaced one by one and atomically, so that an export over an older one never leaves half a file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lab.model import SIZES, Config

END_ID, STOP_ID = 0, 2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def model_config(config: Config) -> dict[str, Any]:
    """The content of ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_ID,
        "eos_token_id": STOP_ID,
        "pad_token_id": END_ID,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def generation_config() -> dict[str, Any]:
    """The content of ``generation_config.json``: greedy, ending at a turn or at a document."""
    return {
        "bos_token_id": END_ID,
        "eos_token_id": [STOP_ID, END_ID],
        "pad_token_id": END_ID,
        "do_sample": False,
    }


def export(config: Config, weights: Path, tokenizer: Path, out: Path) -> None:
    """Write the folder ``out`` from a safetensors file and a tokenizer folder; weights in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in load_file(str(weights)).items()}
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        part = Path(name)
        for file in TOKENIZER_FILES:
            (part / file).write_bytes((tokenizer / file).read_bytes())
        for file, content in (
            ("config.json", model_config(config)),
            ("generation_config.json", generation_config()),
        ):
            (part / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, str(part / "model.safetensors"), metadata={"format": "pt"})
        for path in sorted(part.iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)


def main(argv: list[str] | None = None) -> int:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m lab.export", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="8m", help="which model")
    parser.add_argument("--work", type=Path, required=True, help="working folder of the training")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    export(SIZES[args.size], args.work / args.size / "model.safetensors", args.work / "tokenizer", args.out)
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {total:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
