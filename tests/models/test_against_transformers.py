"""Every architecture against transformers: tiny random checkpoints, float32, logits of every row within 1e-4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Pools, backends, chunked, make_ops, run

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from paceline import models  # noqa: E402
from paceline.checkpoints import open_checkpoint  # noqa: E402
from paceline.models.loader import FormatChoice, load  # noqa: E402

N_TOKENS = 29
CONTEXTS = {"llama-dynamic": N_TOKENS, "phi3-longrope-short": 40}  # where the context chooses the frequencies
LLAMA = {
    "vocab_size": 67,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**LLAMA, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 12}  # heads wider than hidden_size / n_heads
ORIGINAL = {"original_max_position_embeddings": 16}


def scaled(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


LLAMA3 = scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
LONG = scaled(
    "longrope",
    short_factor=[1.0, 1.1, 1.3, 1.6],
    long_factor=[1.5, 2.0, 3.0, 4.5],
    original_max_position_embeddings=16,
)
GEMMA = {**GQA, "head_dim": 12, "num_hidden_layers": 4, "query_pre_attn_scalar": 20, "sliding_window": 7}
QWEN_MOE = {**WIDE, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 4}
MIXTRAL = {**GQA, "num_local_experts": 5, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": 67,
    "n_positions": 64,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-gqa-tied": ("Llama", {**GQA, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama-wide-heads-biases": ("Llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {**GQA, **scaled("linear", factor=4.0)}),
    "llama-dynamic": ("Llama", {**GQA, **scaled("dynamic", factor=4.0), "max_position_embeddings": 16}),
    "llama-llama3": ("Llama", {**WIDE, **LLAMA3}),
    "llama-yarn": ("Llama", {**WIDE, **scaled("yarn", factor=4.0, **ORIGINAL)}),
    "llama-yarn-mscale": (
        "Llama",
        {
            **WIDE,
            **scaled("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0, beta_slow=2.0, **ORIGINAL),
        },
    ),
    "qwen2": ("Qwen2", {**GQA, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {**GQA, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2-layer-types": (
        "Qwen2",
        {
            **GQA,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3": ("Qwen3", WIDE),
    "qwen3-tied-bias": ("Qwen3", {**WIDE, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {**GQA, "sliding_window": 9}),
    "mistral-no-window": ("Mistral", {**WIDE, "sliding_window": None}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma2-no-caps": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu"},
    ),
    "gemma2-tight-caps": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "tie_word_embeddings": False},
    ),
    "gemma3": ("Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}),
    "gemma3-scaled": (
        "Gemma3Text",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            },
        },
    ),
    "phi3": ("Phi3", {**GQA}),
    "phi3-window-partial": (
        "Phi3",
        {**GQA, "sliding_window": 10, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope-long": ("Phi3", {**GQA, **LONG, **ORIGINAL, "max_position_embeddings": 64}),
    "phi3-longrope-short": ("Phi3", {**GQA, **LONG, "original_max_position_embeddings": 40}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 50, "activation_function": "relu"}),
    "gpt2-scales": ("GPT2", {**GPT2, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    "olmo2": ("Olmo2", GQA),
    "olmo2-bias": ("Olmo2", {**LLAMA, "attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral-window": ("Mixtral", {**MIXTRAL, "sliding_window": 8, "num_experts_per_tok": 1}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN_MOE, "norm_topk_prob": True}),
    "qwen3_moe-mixed": (
        "Qwen3Moe",
        {**QWEN_MOE, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
}


def random_model(family: str, options: dict[str, Any], seed: int) -> Any:
    """A transformers model with random weights."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options)
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family.removesuffix('Text')}ForCausalLM"
    return shake(getattr(transformers, head)(config).eval().float())


def shake(model: Any) -> Any:
    """Weights that all matter: nothing is zero, one, or too small to be seen."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
            else:
                p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """variant -> (folder, tokens, transformers' logits), made once."""
    made: dict[str, tuple[Path, list[int], np.ndarray]] = {}

    def get(variant: str) -> tuple[Path, list[int], np.ndarray]:
        if variant not in made:
            seed = sorted(VARIANTS).index(variant)
            model = random_model(*VARIANTS[variant], seed)
            folder = tmp_path_factory.mktemp(variant)
            model.save_pretrained(folder)
            tokens = np.random.default_rng(seed).integers(0, 67, N_TOKENS).tolist()
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0].numpy()
            made[variant] = folder, tokens, logits
        return made[variant]

    return get


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, backend: str, oracle: Any) -> None:
    folder, tokens, expected = oracle(variant)
    ops = make_ops(backend)
    checkpoint = open_checkpoint(folder)
    model = load(checkpoint, ops, format=FormatChoice(), context=CONTEXTS.get(variant, 48))
    checkpoint.close()
    assert np.abs(expected).max() > 0.5, "the oracle's logits are too small to tell anything"
    schedules = {
        "whole": [tokens],
        "prefill then decode": [tokens[:11], *chunked(tokens[11:], 1)],
        **{f"chunks of {n}": chunked(tokens, n) for n in (1, 3, 17)},
    }
    for name, chunks in schedules.items():
        error = np.abs(run(model, ops, chunks) - expected).max()
        assert error < 1e-4, f"{variant}, {name}: logits differ by {error:.2e}"


@pytest.mark.parametrize("backend", backends())
def test_many_sequences_in_one_batch(backend: str, oracle: Any) -> None:
    """Ragged rows of several sequences do not see each other, in windows of their own length."""
    folder, tokens, expected = oracle("gemma3")
    ops = make_ops(backend)
    model = load(open_checkpoint(folder), ops, format=FormatChoice(), context=48)
    pools = Pools(model, N_TOKENS, n_seqs=3)
    starts = [tokens[:20], tokens[:1], tokens[:7]]
    first = ops.numpy(model.forward(ops.begin(pools.batch(starts, want=[19, 20, 27])))).copy()
    np.testing.assert_allclose(first, expected[[19, 0, 6]], atol=1e-4)
    rest = [tokens[20:21], tokens[1:18], tokens[7:N_TOKENS]]
    second = ops.numpy(model.forward(ops.begin(pools.batch(rest))))
    np.testing.assert_allclose(second, expected[[20, *range(1, 18), *range(7, N_TOKENS)]], atol=1e-4)


@pytest.mark.parametrize("backend", backends())
def test_hidden_states(backend: str, oracle: Any) -> None:
    folder, tokens, _ = oracle("gpt2")
    ops = make_ops(backend)
    model = load(open_checkpoint(folder), ops, format=FormatChoice(), context=48)
    hidden = ops.numpy(model.hidden(ops.begin(Pools(model, N_TOKENS).batch([tokens], want=[]))))
    theirs = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(hidden, expected, atol=1e-4)


@pytest.mark.parametrize("backend", backends())
def test_multi_modal_gemma3_loads_its_text_part(backend: str, tmp_path: Path) -> None:
    text = transformers.Gemma3TextConfig(**{**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2})
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = shake(transformers.Gemma3ForConditionalGeneration(config).eval())
    theirs.save_pretrained(tmp_path)
    tokens = list(range(20))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([tokens])).logits[0].numpy()
    ops = make_ops(backend)
    model = load(open_checkpoint(tmp_path), ops, format=FormatChoice(), context=48)
    np.testing.assert_allclose(run(model, ops, [tokens]), expected, atol=1e-4)


@pytest.mark.parametrize(
    "variant", ["llama-llama3", "qwen2-window", "gemma3-scaled", "phi3-longrope-long", "llama-yarn"]
)
def test_older_configs_say_the_same(variant: str, oracle: Any) -> None:
    """rope_theta and rope_scaling as transformers 4 wrote them; sizes that it left out."""
    folder, _, _ = oracle(variant)
    new = json.loads((folder / "config.json").read_text())
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
    ropes = new["rope_parameters"]
    if "full_attention" in ropes:
        old |= {"rope_theta": ropes["full_attention"]["rope_theta"], "sliding_window_pattern": 2}
        old["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = {"type": "linear", "factor": ropes["full_attention"]["factor"]}
    else:
        old["rope_theta"] = ropes["rope_theta"]
    rest = {k: v for k, v in ropes.items() if k not in ("rope_theta", "partial_rotary_factor")}
    old["rope_scaling"] = rest if rest.get("rope_type") != "default" else None
    if variant == "phi3-longrope-long":
        old["rope_scaling"]["rope_type"] = "su"
    assert models.read(old) == models.read(new)


def test_missing_sizes_follow_from_the_others() -> None:
    old = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"model_type": "llama"}
    c = models.read(old)
    assert (c.n_kv_heads, c.head_dim, c.tied, c.rope["full"].theta) == (5, 8, False, 10000.0)
