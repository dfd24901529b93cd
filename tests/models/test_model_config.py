"""The registry, and what a wrong config.json is told."""

from __future__ import annotations

from typing import Any

import pytest

from paceline import models
from paceline.core.errors import CheckpointError
from paceline.core.specs import KV, Window
from paceline.models.loader import FormatChoice, plan_sizes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_the_registry_is_the_folder() -> None:
    known = "gemma2 gemma3 gemma3_text gpt2 llama mistral mixtral olmo2 phi3 qwen2 qwen3 qwen3_moe"
    assert models.names() == known.split()
    for name in models.names():
        family = models.get(name)
        assert callable(family.config)
        assert issubclass(family.Net, models.Model)


@pytest.mark.parametrize("model_type", ["rwkv", "base", "loader", "", "../llama", None, 3])
def test_unknown_architectures_are_refused(model_type: Any) -> None:
    with pytest.raises(CheckpointError, match="model_type") as e:
        models.read({"model_type": model_type})
    assert repr(model_type) in str(e.value)
    assert "llama" in str(e.value)


def test_every_problem_is_told_at_once() -> None:
    raw = {
        **LLAMA,
        "vocab_size": None,
        "hidden_size": "32",
        "num_hidden_layers": 10**9,
        "num_attention_heads": 5,
        "hidden_act": "mystery",
        "rms_norm_eps": float("nan"),
        "tie_word_embeddings": "yes",
        "rope_scaling": {"type": "helix"},
        "eos_token_id": "</s>",
    }
    with pytest.raises(CheckpointError) as e:
        models.read(raw)
    text = str(e.value)
    for part in (
        "vocab_size is missing",
        "hidden_size = '32'",
        "num_hidden_layers = 1000000000",
        "multiple of num_key_value_heads = 2",
        "hidden_act = 'mystery'",
        "rms_norm_eps = nan",
        "tie_word_embeddings = 'yes'",
        "rope_scaling.rope_type = 'helix'",
        "eos_token_id = '</s>'",
    ):
        assert part in text


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "olmo2", "phi3", "mixtral", "qwen3_moe", "gpt2"]
)
def test_an_empty_config_names_what_is_missing(model_type: str) -> None:
    with pytest.raises(CheckpointError) as e:
        models.read({"model_type": model_type})
    assert "vocab_size is missing" in str(e.value)
    assert ("n_layer" if model_type == "gpt2" else "num_hidden_layers") + " is missing" in str(e.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": 33}, "divisible by num_attention_heads"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"max_position_embeddings": -5}, "max_position_embeddings = -5"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"], "use_sliding_window": True}, "layer_types"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention"] * 2}, "needs sliding_window"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9, "num_local_experts": 8}, "num_experts_per_tok = 9"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 8, "mlp_only_layers": [7]}, "mlp_only_layers"),
        ({"model_type": "gemma2", "attn_logit_softcapping": "high"}, "attn_logit_softcapping = 'high'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3"}, "text_config"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as e:
        models.read({**LLAMA, **change})
    assert told in str(e.value)


def test_windows_become_states() -> None:
    assert models.read(LLAMA).states == (KV(2, 8),) * 2
    c = models.read({**LLAMA, "model_type": "gemma2", "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 3})
    assert c.states == (Window(2, 8, 5), KV(2, 8), Window(2, 8, 5))
    assert [a.window for a in c.attn] == [5, None, 5]
    c = models.read({**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "num_hidden_layers": 7})
    assert [s.size if isinstance(s, Window) else 0 for s in c.states] == [4096] * 5 + [0] + [4096]


def test_end_tokens_and_reach() -> None:
    c = models.read({**LLAMA, "eos_token_id": [2, 7, 9999], "bos_token_id": 1, "max_position_embeddings": 128})
    assert (c.eos, c.bos, c.context, c.max_context) == ((2, 7), 1, 128, 128)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    c = models.read({**LLAMA, "max_position_embeddings": 128, "rope_scaling": yarn})
    assert (c.context, c.max_context) == (128, 512)


def published(model_type: str, v: int, d: int, ff: int, n: int, h: int, kv: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": v, "hidden_size": d, "intermediate_size": ff, "num_hidden_layers": n}
    return {"model_type": model_type, **sizes, "num_attention_heads": h, "num_key_value_heads": kv, **more}


TIED = {"tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED = {  # the hyper-parameters of published models and how many parameters their cards count
    "Llama-2-7B": (published("llama", 32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "TinyLlama-1.1B": (published("llama", 32000, 2048, 5632, 22, 32, 4), 1_100_048_384),
    "Llama-3.2-1B": (published("llama", 128256, 2048, 8192, 16, 32, 8, rope_scaling=LLAMA3, **TIED), 1_235_814_400),
    "SmolLM2-135M": (published("llama", 49152, 576, 1536, 30, 9, 3, **TIED), 134_515_008),
    "Qwen2.5-0.5B": (published("qwen2", 151936, 896, 4864, 24, 14, 2, **TIED), 494_032_768),
    "Qwen3-0.6B": (published("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED), 596_049_920),
    "Mistral-7B": (published("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096), 7_241_732_096),
    "Gemma-2-2B": (published("gemma2", 256000, 2304, 9216, 26, 8, 4), 2_614_341_888),
    "Gemma-3-1B": (published("gemma3_text", 262144, 1152, 6912, 26, 4, 1, sliding_window=512), 999_885_952),
    "Gemma-3-4B, text": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        3_880_263_168,
    ),
    "Phi-3-mini": (published("phi3", 32064, 3072, 8192, 32, 32, 32, sliding_window=2047), 3_821_079_552),
    "GPT-2": ({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}, 124_439_808),
    "OLMo-2-7B": (published("olmo2", 100352, 4096, 11008, 32, 32, 32), 7_298_617_344),
    "Mixtral-8x7B": (published("mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8), 46_702_792_704),
    "Qwen3-30B-A3B": (
        published("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, head_dim=128, moe_intermediate_size=768),
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    raw, n_params = PUBLISHED[name]
    sizes = plan_sizes(models.read(raw), FormatChoice.parse("int8:group=0"))
    assert sizes.n_params == n_params
    assert n_params < sizes.n_bytes < 1.05 * n_params
