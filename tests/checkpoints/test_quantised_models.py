"""Whole AWQ and GPTQ models: their codes arrive in the packed weights as they were stored, fused and unfused, and text comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_awq_gptq import AWQ_COLUMNS, pack_columns

from paceline.core.types import SamplingParams
from paceline.llm import LLM
from paceline.ops import formats

D, FF, V, GROUP = 64, 128, 80, 32
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "float16",
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (D, D), "self_attn.k_proj": (D // 2, D), "self_attn.v_proj": (D // 2, D), "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (FF, D), "mlp.up_proj": (FF, D), "mlp.down_proj": (D, FF),
}  # fmt: skip


def quantised(method: str, symmetric: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(the file's tensors, the float64 weights they stand for)"""
    rng = np.random.default_rng(5)
    tensors: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": rng.standard_normal((V, D)).astype(np.float16),
        "lm_head.weight": rng.standard_normal((V, D)).astype(np.float16),
        "model.norm.weight": np.ones(D, np.float16),
    }
    meant: dict[str, np.ndarray] = {}
    for layer in range(2):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}{n}.weight": np.ones(D, np.float16) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, (n_out, n_in) in LINEARS.items():
            q = rng.integers(0, 16, (n_in, n_out))
            zeros = np.full((n_in // GROUP, n_out), 8) if symmetric else rng.integers(1, 16, (n_in // GROUP, n_out))
            scales = (0.02 * (rng.random((n_in // GROUP, n_out)) + 0.5)).astype(np.float16)
            meant[at + name] = ((q - np.repeat(zeros, GROUP, 0)) * np.repeat(scales.astype(np.float64), GROUP, 0)).T
            if method == "awq":
                tensors[f"{at}{name}.qweight"] = pack_columns(q, 4, AWQ_COLUMNS)
                tensors[f"{at}{name}.qzeros"] = pack_columns(zeros, 4, AWQ_COLUMNS)
            else:
                tensors[f"{at}{name}.qweight"] = np.ascontiguousarray(pack_columns(q.T, 4).T)
                tensors[f"{at}{name}.qzeros"] = pack_columns(zeros - 1, 4)
                tensors[f"{at}{name}.g_idx"] = (np.arange(n_in) // GROUP).astype(np.int32)
            tensors[f"{at}{name}.scales"] = scales
    return tensors, meant


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_model_keeps_its_codes(tmp_path: Path, method: str, symmetric: bool) -> None:
    tensors, meant = quantised(method, symmetric)
    section: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    section |= {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": False, "sym": symmetric}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": section}))
    save_file(tensors, tmp_path / "model.safetensors")
    with LLM(tmp_path) as llm:
        assert "int4" in llm.plan.model.formats
        weights = llm.engine.runner.model.w
        stored = {name: w for name, w in weights.items() if getattr(w, "format", "") == "int4g"}
        found = {w.shape: [] for w in stored.values()}
        for w in stored.values():
            found[w.shape].append(formats.get("int4g").unpack(w))
        for layer in range(2):
            at = f"model.layers.{layer}."
            qkv = np.concatenate([meant[f"{at}self_attn.{n}_proj"] for n in "qkv"])
            gate_up = np.concatenate([meant[f"{at}mlp.{n}_proj"] for n in ("gate", "up")])
            for wanted in (qkv, gate_up, meant[f"{at}self_attn.o_proj"], meant[f"{at}mlp.down_proj"]):
                tolerance = 0.0 if symmetric else np.abs(wanted).max() * 2**-10
                assert any(np.abs(w - wanted).max() <= tolerance for w in found[wanted.shape]), wanted.shape
        out = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8))[0]
        assert len(out.token_ids) == 8
