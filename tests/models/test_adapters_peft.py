"""Adapters against transformers with peft: real LoRA folders, float32, logits of every row within 1e-4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Pools, backends, make_ops

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")

from paceline.checkpoints import open_checkpoint  # noqa: E402
from paceline.models import adapters  # noqa: E402
from paceline.models.loader import FormatChoice, load  # noqa: E402

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", SIZES, {"r": 4, "lora_alpha": 16, "target_modules": ALL}),
    "llama-qv": ("llama", SIZES, {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "qwen2-patterns": (
        "qwen2",
        SIZES,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 9, "layers.1.self_attn.k_proj": 1},
            "alpha_pattern": {"layers.0.mlp.up_proj": 40, "proj": 3, "^model.layers.1.self_attn.q_proj": 30},
        },
    ),
    "qwen3": (
        "qwen3",
        {**SIZES, "head_dim": 12},
        {"r": 5, "lora_alpha": 25, "target_modules": r".*(o|up)_proj", "init_lora_weights": "gaussian"},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 67,
            "n_positions": 64,
            "n_embd": 36,
            "n_layer": 2,
            "n_head": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
}
TOKENS = [int(t) for t in np.random.default_rng(1).integers(0, 67, 29)]


def saved(case: str, root: Path) -> np.ndarray:
    """A tiny random model and an adapter of it in `root`; the logits of both together."""
    kind, sizes, lora = CASES[case]
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(3.0)
    base.save_pretrained(root / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.2)
    model.save_pretrained(root / "adapter")
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return out


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, backend: str, tmp_path: Path) -> None:
    want = saved(case, tmp_path)
    ops = make_ops(backend)
    model = load(open_checkpoint(tmp_path / "base"), ops, format=FormatChoice.parse("auto"), context=64)
    adapter = adapters.load("a", tmp_path / "adapter", 1 << 30, config=model.config, ops=ops)
    found = {}
    for name, of in (("plain", None), ("adapted", np.zeros(1, np.int32))):
        batch = Pools(model, len(TOKENS)).batch([TOKENS])
        batch.adapters, batch.adapter_of = [adapter.weights], of
        found[name] = ops.numpy(model.adapted(adapter.sites).forward(ops.begin(batch))).copy()
    assert np.abs(found["plain"] - want).max() > 0.05 * want.std()
    assert np.abs(found["adapted"] - want).max() < 1e-4 * max(1.0, np.abs(want).max())


def test_dora_is_refused(tmp_path: Path) -> None:
    case = CASES["llama"]
    base = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(case[0], **SIZES))
    peft.get_peft_model(base, peft.LoraConfig(use_dora=True, **case[2])).save_pretrained(tmp_path)
    with pytest.raises(adapters.CheckpointError, match="use_dora = True: DoRA"):
        adapters.AdapterFolder(tmp_path)
