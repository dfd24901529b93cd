"""PEFT folders: what is read, and everything that is refused, by its name and before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline import models
from paceline.checkpoints.adapter import CONFIG, WEIGHTS, AdapterFolder
from paceline.checkpoints.safetensors import save_safetensors
from paceline.core.errors import CheckpointError
from paceline.models import adapters

D, FF = 24, 40
BASE = models.read(
    {
        "model_type": "llama", "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    }
)  # fmt: skip
LAYER = "model.layers.0"
Q, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"


def tensors(module: str, rank: int, n_out: int, n_in: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank)
    a, b = rng.standard_normal((rank, n_in)), rng.standard_normal((n_out, rank))
    return {f"base_model.model.{module}.lora_{n}.weight": x.astype(dtype) for n, x in (("A", a), ("B", b))}


def write(folder: Path, arrays: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **config}
    (folder / CONFIG).write_text(json.dumps(settings))
    save_safetensors(folder / WEIGHTS, arrays)
    return folder


GOOD = tensors(Q, 4, D, D) | tensors(DOWN, 4, D, FF)


def test_scales(tmp_path: Path) -> None:
    def scales(arrays: dict[str, np.ndarray], **config: Any) -> dict[str, float]:
        return {m.module: m.scale for m in AdapterFolder(write(tmp_path, arrays, **config)).modules}

    assert scales(GOOD) == {Q: 1.5, DOWN: 1.5}
    assert scales(GOOD, use_rslora=True) == {Q: 3.0, DOWN: 3.0}
    assert scales(GOOD, alpha_pattern={"layers.0.mlp.down_proj": 2, "down_proj": 5}) == {Q: 1.5, DOWN: 0.5}
    assert scales(GOOD, alpha_pattern={"proj": 5, "0.self_attn.q_proj": 8}) == {Q: 2.0, DOWN: 1.5}  # whole names only
    assert scales(GOOD, alpha_pattern={f"^{Q}": 8, "^down_proj": 9}) == {Q: 2.0, DOWN: 1.5}
    other = tensors(Q, 4, D, D) | tensors(DOWN, 9, D, FF)
    assert scales(other, rank_pattern={"down_proj": 9}, use_rslora=True) == {Q: 3.0, DOWN: 2.0}


def test_numbers_are_kept_as_stored_or_as_asked(tmp_path: Path) -> None:
    for stored, dtype, kept in (
        (np.float32, "auto", np.float32), (np.float16, "auto", np.float32), (ml_dtypes.bfloat16, "auto", ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, "float32", np.float32), (np.float32, "bfloat16", ml_dtypes.bfloat16),
    ):  # fmt: skip
        arrays = tensors(Q, 4, D, D, stored)
        folder = AdapterFolder(write(tmp_path, arrays), dtype)
        a, b = folder.read(folder.modules[0])
        assert a.dtype == b.dtype == kept
        assert a.shape == (4, D)
        assert b.shape == (D, 4)
        assert np.array_equal(a, arrays[f"base_model.model.{Q}.lora_A.weight"].astype(kept))


def test_digest_is_that_of_what_is_computed(tmp_path: Path) -> None:
    def digest(name: str, arrays: dict[str, np.ndarray], **config: Any) -> str:
        return AdapterFolder(write(tmp_path / name, arrays, **config)).digest()

    first = digest("a", GOOD)
    assert first == digest("b", dict(reversed(GOOD.items())), lora_dropout=0.1)
    assert first == digest("c", GOOD, lora_alpha=3.0, alpha_pattern={"proj": 1, "q_proj": 6, "down_proj": 6})
    changed = {**GOOD, f"base_model.model.{Q}.lora_A.weight": GOOD[f"base_model.model.{Q}.lora_A.weight"] + 1e-6}
    others = {digest("d", GOOD, lora_alpha=5), digest("e", changed), digest("f", tensors(Q, 4, D, D))}
    assert len(others | {first}) == 4


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"r": 0}, "r = 0: must be an integer from 1 to 512"),
        ({"r": 513}, "r = 513"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"use_dora": True}, "use_dora = True: DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "alpha_pattern: .* is an expression"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"use_something_new": True}, "use_something_new = True: this option is unknown"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        AdapterFolder(write(tmp_path, GOOD, **config))


def test_everything_wrong_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as e:
        AdapterFolder(write(tmp_path, GOOD, r=0, use_dora=True, bias="all"))
    assert all(name in str(e.value) for name in ("r = 0", "use_dora", "bias = 'all'"))


def test_neutral_options_are_not(tmp_path: Path) -> None:
    neutral = {"use_dora": False, "modules_to_save": None, "layer_replication": None, "something_new": {}, "lora_dropout": 0.3,
               "base_model_name_or_path": "x/y", "init_lora_weights": "gaussian", "megatron_core": "megatron.core"}  # fmt: skip
    assert len(AdapterFolder(write(tmp_path, GOOD, **neutral)).modules) == 2


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({}, "has no lora_A"),
        ({"base_model.model.lm_head.weight": np.zeros((50, D), np.float32)}, "lm_head.weight: only lora_A and lora_B"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 50), np.float32)}, "no embeddings"),
        ({f"base_model.model.{Q}.lora_magnitude_vector.weight": np.zeros(D, np.float32)}, "magnitudes"),
        ({f"base_model.model.{Q}.lora_B.bias": np.zeros(D, np.float32)}, "biases"),
        ({f"base_model.model.{'x' * 500}.lora_A.weight": np.zeros((4, D), np.float32)}, "x{100}"),
        ({f"base_model.model.{DOWN}.lora_A.weight": np.zeros((4, FF), np.float32)}, "lora_B is missing"),
        (tensors(DOWN, 3, D, FF), r"lora_A \[3, 40\] and lora_B \[24, 3\] must be \[4, n_in\] and \[n_out, 4\]"),
        (tensors(DOWN, 4, D, FF, np.int8), "stored as I8"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    good = tensors(Q, 4, D, D) if arrays else {}
    with pytest.raises(CheckpointError, match=text) as e:
        AdapterFolder(write(tmp_path, good | arrays))
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize(
    ("arrays", "config", "text"),
    [
        (tensors(f"{LAYER}.self_attn.q_proj", 4, D, D + 1), {}, "is for a matrix of 24 x 25, the base model's is 24 x 24"),
        (tensors("model.layers.7.self_attn.q_proj", 4, D, D), {}, "layers.7.self_attn.q_proj: the base model has no such"),
        (tensors("lm_head", 4, 50, D), {"target_modules": ["lm_head"]}, "target_modules: 'lm_head' cannot be adapted; down_proj"),
        (tensors("model.embed_tokens", 4, 50, D), {"target_modules": ["embed_tokens"]}, "'embed_tokens' cannot be adapted"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model(
    tmp_path: Path, arrays: dict[str, np.ndarray], config: dict[str, Any], text: str
) -> None:
    with pytest.raises(CheckpointError, match=text):
        adapters.size(write(tmp_path, arrays, **config), BASE)


def test_damaged_numbers(tmp_path: Path) -> None:
    arrays = dict(GOOD)
    arrays[f"base_model.model.{DOWN}.lora_B.weight"][3, 1] = np.nan
    with pytest.raises(CheckpointError, match=r"down_proj.lora_B.weight holds NaN"):
        AdapterFolder(write(tmp_path, arrays)).digest()
    arrays[f"base_model.model.{DOWN}.lora_B.weight"][3, 1] = 0


def test_files_that_are_missing_or_pickled(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        AdapterFolder(tmp_path / "nothing")
    folder = write(tmp_path / "a", GOOD)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        AdapterFolder(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        AdapterFolder(folder)
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no such file"):
        AdapterFolder(folder)


def test_names_of_a_target_list_may_be_paths_or_an_expression(tmp_path: Path) -> None:
    for targets in ("all-linear", [Q, "mlp.down_proj"], ["down_proj"], None):
        assert adapters.size(write(tmp_path, GOOD, target_modules=targets), BASE) > 0


NAMES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "bias", "init_lora_weights", "use_rslora", "use_dora",
         "modules_to_save", "lora_dropout", "other")  # fmt: skip
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(10**400)
    | st.just("x" * 10**5)
)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(config=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_config_loads_or_is_refused_in_few_words(tmp_path: Path, config: dict[str, Any]) -> None:
    said, n_modules = "", 2
    try:
        folder = AdapterFolder(write(tmp_path, GOOD, **config))
        n_modules = len(folder.modules)
        folder.close()
    except CheckpointError as e:
        said = str(e)
    assert n_modules == 2
    assert len(said) < 4000
