"""GGUF models: numbers against the `gguf` package bit for bit, names and conventions against transformers' own
checkpoints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_builders import ARRAY, BOOL, F32, STRING, U16, U32, gguf_bytes, llama_keys, small_gguf

from paceline.checkpoints import open_checkpoint
from paceline.checkpoints.gguf_config import llama3_scaling
from paceline.checkpoints.gguf_dequant import BLOCKED, codes, dequantise
from paceline.checkpoints.gguf_file import TYPES
from paceline.core.errors import CheckpointError
from paceline.ops.packed import Codes

gguf = pytest.importorskip("gguf", reason="needs the gguf package")
SIZES = {name: (block, size) for name, block, size in TYPES.values()}
ROWS, COLUMNS = 6, 512


def reference(raw: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def random_blocks(kind: str, seed: int = 0) -> np.ndarray:
    """(ROWS, bytes) random, so that scales are also subnormal, infinite and NaN."""
    block, size = SIZES[kind]
    return np.random.default_rng(seed).integers(0, 256, (ROWS, COLUMNS // block * size), dtype=np.uint8)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """Equal as bits; a NaN equals any NaN."""
    assert a.dtype == b.dtype == np.float32
    assert a.shape == b.shape
    nan = np.isnan(a) & np.isnan(b)
    assert ((a.view(np.uint32) == b.view(np.uint32)) | nan).all()


def test_the_sizes_of_the_types_are_the_reference_ones() -> None:
    for number, (name, block, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, size))
    assert set(BLOCKED) == set(SIZES) - {"F32", "F16", "BF16"}


@pytest.mark.parametrize("kind", BLOCKED)
def test_random_blocks_bit_for_bit(kind: str) -> None:
    for seed in range(20):
        raw = random_blocks(kind, seed)
        same_bits(dequantise(raw.reshape(-1), kind, (ROWS, COLUMNS)), reference(raw, kind))


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("scale", [0x0000, 0x0001, 0x83FF, 0x7BFF, 0xFC00, 0x7C00, 0x7E01])
def test_special_scales_bit_for_bit(kind: str, scale: int) -> None:
    """All scale fields of a block zero, subnormal, largest, infinite or NaN: every 16-bit word that may be one."""
    raw = random_blocks(kind)
    size = SIZES[kind][1]
    blocks = raw.reshape(-1, size)
    for at in (0, 2, size - 2, size - 4):
        changed = blocks.copy()
        changed[:, at : at + 2] = np.array([scale], "<u2").view(np.uint8)
        same_bits(dequantise(changed.reshape(-1), kind, (ROWS, COLUMNS)), reference(changed.reshape(raw.shape), kind))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_really_quantised_numbers(kind: str) -> None:
    w = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    raw = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    out = dequantise(raw.reshape(-1), kind, (ROWS, COLUMNS))
    same_bits(out, reference(raw, kind))
    assert np.abs(out - w).max() < 0.5


def test_tensors_larger_than_a_chunk() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (700, 1024 // 32 * 34), dtype=np.uint8)
    same_bits(dequantise(raw.reshape(-1), "Q8_0", (700, 1024)), reference(raw, "Q8_0"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_codes_say_the_same_as_the_numbers(kind: str) -> None:
    w = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    raw = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    c = codes(raw.reshape(-1), kind, (ROWS, COLUMNS))
    assert c is not None
    assert (c.bits, c.group, c.mins is None) == (8 if kind == "Q8_0" else 4, 32, kind != "Q4_1")
    assert c.q.dtype == (np.int8 if kind == "Q8_0" else np.uint8)
    wide = np.repeat(c.scales.astype(np.float32), 32, axis=1)
    if c.mins is not None:
        value = wide * c.q.astype(np.float32) + np.repeat(c.mins.astype(np.float32), 32, axis=1)
    else:
        value = wide * (c.q.astype(np.float32) - (8 if c.bits == 4 else 0))
    same_bits(value, reference(raw, kind))


def test_what_codes_cannot_hold() -> None:
    raw = np.zeros((1, 34), np.uint8)
    raw[0, 5] = 0x80  # the code -128
    assert codes(raw.reshape(-1), "Q8_0", (1, 32)) is None
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        raw = np.zeros((1, SIZES[kind][1]), np.uint8)
        raw[0, 1] = 0x7C  # an infinite scale
        assert codes(raw.reshape(-1), kind, (1, 32)) is None


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCKED])
def test_every_type_through_a_file(tmp_path: Path, kind: str) -> None:
    number = {name: i for i, (name, _, _) in TYPES.items()}[kind]
    block, size = SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 60, (4, 256 // block * size), dtype=np.uint8)  # no NaN, no infinity
    (tmp_path / "x.gguf").write_bytes(
        gguf_bytes(llama_keys(), [("token_embd.weight", [256, 4], number, 0)], raw.tobytes())
    )
    c = open_checkpoint(tmp_path / "x.gguf")
    info = c.tensors()["model.embed_tokens.weight"]
    assert (info.shape, info.nbytes, info.dtype.upper()) == ((4, 256), raw.nbytes, kind)
    a = c.read("model.embed_tokens.weight")
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        assert isinstance(a, Codes)
        return
    assert isinstance(a, np.ndarray)
    assert a.dtype == {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    same_bits(a.astype(np.float32), reference(raw, kind).reshape(4, 256))


# whole models: a transformers checkpoint, converted to GGUF by this test, must read as the checkpoint itself

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", TINY),
    "mistral": ("llama", "Mistral", {**TINY, "sliding_window": 32}),
    "mixtral": ("llama", "Mixtral", {**TINY, **MOE, "sliding_window": None}),
    "qwen2": ("qwen2", "Qwen2", {k: v for k, v in TINY.items() if k != "head_dim"}),
    "qwen3": ("qwen3", "Qwen3", TINY),
    "qwen3_moe": ("qwen3moe", "Qwen3Moe", {**TINY, **MOE, "norm_topk_prob": True, "intermediate_size": 1}),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {**TINY, "query_pre_attn_scalar": 16, "sliding_window": 32, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        "gemma3",
        "Gemma3",
        {
            **TINY,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", "Phi3", {k: v for k, v in TINY.items() if k != "head_dim"}),
    "olmo2": ("olmo2", "Olmo2", {k: v for k, v in TINY.items() if k != "head_dim"}),
    "gpt2": (
        "gpt2",
        "GPT2",
        {
            "vocab_size": 64,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def save_hf(name: str, folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch = pytest.importorskip("torch", reason="needs torch")
    _, cls, options = MODELS[name]
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{cls}TextConfig" if cls == "Gemma3" else f"{cls}Config")
    config = config_class(**options)
    head = "GPT2LMHeadModel" if cls == "GPT2" else f"{cls}ForCausalLM"
    model = getattr(transformers, head)(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return options


def to_gguf(name: str, folder: Path, out: Path, kind: str = "F32") -> None:
    """As llama.cpp's converter does: tensor names by the gguf package's own table, then its changes to the numbers."""
    arch = MODELS[name][0]
    c = open_checkpoint(folder)
    raw = c.config
    n_layers = raw.get("num_hidden_layers") or raw["n_layer"]
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH_NAMES and next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), n_layers
    )
    writer = gguf.GGUFWriter(out, arch)
    write_keys(writer, arch, raw, n_layers)
    experts: dict[str, dict[int, np.ndarray]] = {}
    for hf in c.tensors():
        a = np.asarray(c.read(hf), np.float32)
        if m := re.fullmatch(r"(.*\.experts)\.(\d+)\.(w[123]|\w+_proj)\.weight", hf):
            experts.setdefault(f"{m[1]}.{m[3]}", {})[int(m[2])] = a
            continue
        add(writer, names, hf, forward(arch, raw, hf, a), kind)
    for stem, parts in experts.items():
        add(writer, names, f"{stem}.weight", np.stack([parts[i] for i in range(len(parts))]), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_keys(writer: Any, arch: str, raw: dict[str, Any], n_layers: int) -> None:
    def get(*keys: str) -> Any:
        return next((raw[k] for k in keys if raw.get(k) is not None), None)

    writer.add_context_length(get("max_position_embeddings", "n_positions"))
    writer.add_embedding_length(get("hidden_size", "n_embd"))
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(get("intermediate_size") or 4 * raw["n_embd"])
    writer.add_head_count(get("num_attention_heads", "n_head"))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if arch == "gpt2":
        writer.add_layer_norm_eps(raw["layer_norm_epsilon"])
        return
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    theta = (
        get("rope_theta")
        or raw["rope_parameters"].get("rope_theta")
        or raw["rope_parameters"]["full_attention"]["rope_theta"]
    )
    writer.add_rope_freq_base(theta)
    if raw.get("head_dim"):
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
    if raw.get("sliding_window"):
        writer.add_sliding_window(raw["sliding_window"])
    if experts := get("num_local_experts", "num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(raw["num_experts_per_tok"])
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])


def forward(arch: str, raw: dict[str, Any], hf: str, a: np.ndarray) -> np.ndarray:
    if arch == "llama" and re.search(r"[qk]_proj\.", hf):
        heads = raw["num_attention_heads"] if "q_proj" in hf else raw["num_key_value_heads"]
        return a.reshape(heads, 2, a.shape[0] // heads // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)
    if arch.startswith("gemma") and hf.endswith("norm.weight"):
        return a + 1
    if arch == "gpt2" and hf.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return np.ascontiguousarray(a.T)
    return a


def add(writer: Any, names: Any, hf: str, a: np.ndarray, kind: str) -> None:
    name = names.get_name(hf, try_suffixes=(".weight", ".bias"))
    assert name, f"the gguf package has no name for {hf}"
    if kind == "F32" or a.ndim == 1:
        writer.add_tensor(name, a)
    else:
        k = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(a, k), raw_dtype=k)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_reads_as_the_original(tmp_path: Path, name: str) -> None:
    options = save_hf(name, tmp_path / "hf")
    to_gguf(name, tmp_path / "hf", tmp_path / "x.gguf")
    original, ours = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "x.gguf")
    tied = bool(original.config.get("tie_word_embeddings"))
    assert {n: i.shape for n, i in ours.tensors().items()} == {n: i.shape for n, i in original.tensors().items()}
    for tensor in original.tensors():
        a, b = original.read(tensor), ours.read(tensor)
        assert isinstance(b, np.ndarray)
        if name.startswith("gemma") and "norm" in tensor:
            np.testing.assert_allclose(b, a, atol=1e-6)
        else:
            np.testing.assert_array_equal(b, a)
    assert ours.config["model_type"] == name
    assert ours.config["tie_word_embeddings"] == tied
    assert ours.generation["eos_token_id"] == 2
    skip = (
        {"pad_token_id", "num_local_experts"}
        if name == "qwen3_moe"
        else {"pad_token_id", "num_experts", "moe_intermediate_size"}
    )
    skip |= {"num_experts"} if name == "mixtral" else set()
    for key, value in options.items():
        if key not in skip and not (key == "intermediate_size" and name == "qwen3_moe"):
            assert ours.config.get(key) == value, key
    if name.startswith("gemma"):
        assert ours.config["layer_types"] == original.config["layer_types"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_quantised_rows_and_experts_find_their_place(tmp_path: Path, name: str, kind: str) -> None:
    """Reading the quantised file gives the original's rows quantised: rows are quantised one by one, so order does
    not matter.
    """
    save_hf(name, tmp_path / "hf")
    to_gguf(name, tmp_path / "hf", tmp_path / "x.gguf", kind)
    original, ours = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "x.gguf")
    k = gguf.GGMLQuantizationType[kind]
    for tensor, info in original.tensors().items():
        a, b = np.asarray(original.read(tensor), np.float32), ours.read(tensor)
        if len(info.shape) != 2:
            continue
        turned = name == "gpt2" and ".c_" in tensor
        wanted = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(a.T if turned else a), k), k)
        wanted = wanted.T if turned else wanted
        if isinstance(b, Codes):
            assert not turned
            wide = np.repeat(b.scales.astype(np.float32), 32, axis=1)
            low = np.repeat(b.mins.astype(np.float32), 32, axis=1) if b.mins is not None else -8 * wide * (b.bits == 4)
            np.testing.assert_allclose(wide * b.q + low, wanted, rtol=1e-6, atol=1e-7)
        else:
            assert kind in ("Q5_1", "F16", "BF16") or turned
            np.testing.assert_array_equal(b.astype(np.float32), wanted)


def test_real_model(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "stories260K"
    MODELS["stories"] = ("llama", "", {})
    try:
        to_gguf("stories", folder, tmp_path / "x.gguf")
    finally:
        del MODELS["stories"]
    original, ours = open_checkpoint(folder), open_checkpoint(tmp_path / "x.gguf")
    assert set(ours.tensors()) == set(original.tensors())
    for name in original.tensors():
        np.testing.assert_array_equal(ours.read(name), original.read(name))
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "vocab_size",
        "rope_theta",
        "tie_word_embeddings",
        "max_position_embeddings",
        "attention_bias",
        "hidden_act",
    ):
        assert ours.config[key] == original.config[key], key


# the rest of the configuration


def with_factors(factors: np.ndarray, **changes: Any) -> bytes:
    keys = llama_keys(
        **{
            "llama__rope__freq_base": (F32, 500000.0),
            "llama__attention__key_length": (U32, 2 * factors.size),
            "llama__attention__value_length": (U32, 2 * factors.size),
            **changes,
        }
    )
    data = np.zeros(128, "<f4").tobytes() + factors.astype("<f4").tobytes()
    return gguf_bytes(keys, [("token_embd.weight", [32, 4], 0, 0), ("rope_freqs.weight", [factors.size], 0, 512)], data)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rotary_factors_are_recognised(tmp_path: Path, factor: float) -> None:
    """Divisors by the formula of the Llama 3.1 model card, computed here in the converter's way."""
    divisors = []
    for i in range(0, 64, 2):
        freq = 1 / 500000.0 ** (i / 64)
        wavelength = 2 * np.pi / freq
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    (tmp_path / "x.gguf").write_bytes(with_factors(np.array(divisors)))
    c = open_checkpoint(tmp_path / "x.gguf")
    assert c.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert set(c.tensors()) == {"model.embed_tokens.weight"}


def test_other_rotary_factors_are_given_as_they_are(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, 8)
    (tmp_path / "x.gguf").write_bytes(with_factors(factors))
    scaling = open_checkpoint(tmp_path / "x.gguf").config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["attention_factor"] == 1.0
    np.testing.assert_allclose(scaling["long_factor"], factors, rtol=1e-6)
    assert scaling["short_factor"] == scaling["long_factor"]
    assert llama3_scaling(np.ones(8, np.float32), 10000.0, 16)["rope_type"] in ("llama3", "longrope")


@pytest.mark.parametrize("bad", [np.zeros(8), np.full(8, np.nan), -np.ones(8)])
def test_damaged_rotary_factors(tmp_path: Path, bad: np.ndarray) -> None:
    (tmp_path / "x.gguf").write_bytes(with_factors(bad))
    with pytest.raises(CheckpointError, match="rotary factors"):
        open_checkpoint(tmp_path / "x.gguf")


def test_scaling_by_metadata(tmp_path: Path) -> None:
    def scaling(**keys: Any) -> Any:
        (tmp_path / "x.gguf").write_bytes(small_gguf(**keys))
        return open_checkpoint(tmp_path / "x.gguf").config.get("rope_scaling")

    kind, factor = "llama__rope__scaling__type", "llama__rope__scaling__factor"
    assert scaling() is None
    assert scaling(**{kind: (STRING, "none")}) is None
    assert scaling(**{kind: (STRING, "linear"), factor: (F32, 4.0)}) == {"rope_type": "linear", "factor": 4.0}
    trained = {"llama__rope__scaling__original_context_length": (U32, 32)}
    assert scaling(**{kind: (STRING, "yarn"), factor: (F32, 2.0)}, **trained) == {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    }
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type"):
        scaling(**{kind: (STRING, "magic"), factor: (F32, 2.0)})


def test_metadata_and_ends_of_text(tmp_path: Path) -> None:
    keys = {
        "tokenizer__ggml__model": (STRING, "gpt2"),
        "tokenizer__ggml__tokens": (ARRAY, (STRING, list("abcd"))),
        "tokenizer__chat_template": (STRING, "{{ x }}"),
        "tokenizer__ggml__eos_token_id": (U32, 2),
        "tokenizer__ggml__eot_token_id": (U32, 3),
        "tokenizer__ggml__bos_token_id": (U32, 1),
        "tokenizer__ggml__add_bos_token": (BOOL, True),
    }
    (tmp_path / "x.gguf").write_bytes(small_gguf(**keys))
    c = open_checkpoint(tmp_path / "x.gguf")
    assert c.metadata["tokenizer.ggml.tokens"] == ["a", "b", "c", "d"]
    assert c.metadata["tokenizer.chat_template"] == "{{ x }}"
    assert c.metadata["tokenizer.ggml.add_bos_token"] is True
    assert c.generation == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    assert c.config["rms_norm_eps"] == 1e-5  # not 9.999999747e-06


def test_unknown_tensors_keep_their_names(tmp_path: Path) -> None:
    tensors = [
        ("token_embd.weight", [32, 4], 0, 0),
        ("blk.0.attn_surprise.weight", [8], 0, 512),
        ("blk.0.ffn_gate_exps.weight", [8], 0, 544),
    ]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(llama_keys(), tensors, bytes(1024)))
    c = open_checkpoint(tmp_path / "x.gguf")
    assert set(c.tensors()) == {"model.embed_tokens.weight", "blk.0.attn_surprise.weight", "blk.0.ffn_gate_exps.weight"}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        c.read("model.norm.weight")


# split files


def parts(folder: Path, n: int = 3, **wrong: Any) -> list[Path]:
    out = []
    for i in range(n):
        first = llama_keys() if i == 0 else []
        keys = [
            *first,
            ("split.no", U16, wrong.get("no", i)),
            ("split.count", U16, n),
            ("split.tensors.count", U32, wrong.get("total", n)),
        ]
        name = "token_embd.weight" if i == 0 else wrong.get("name", f"blk.0.x{i}.weight")
        data = np.full(128, i, "<f4").tobytes()
        out.append(folder / f"m-{i + 1:05d}-of-{n:05d}.gguf")
        out[-1].write_bytes(gguf_bytes(keys, [(name, [32, 4], 0, 0)], data))
    return out


def test_split_files(tmp_path: Path) -> None:
    files = parts(tmp_path)
    for file in files:  # any part means all of them
        c = open_checkpoint(file)
        assert set(c.tensors()) == {"model.embed_tokens.weight", "blk.0.x1.weight", "blk.0.x2.weight"}
        assert np.asarray(c.read("blk.0.x2.weight")).max() == 2
        assert c.config["model_type"] == "llama"
    assert open_checkpoint(tmp_path).path == files[0]  # a folder of one model
    (tmp_path / "other.gguf").write_bytes(small_gguf())
    with pytest.raises(CheckpointError, match=r"2 GGUF models.*other\.gguf"):
        open_checkpoint(tmp_path)


def test_damaged_splits(tmp_path: Path) -> None:
    files = parts(tmp_path)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"missing.*m-00002-of-00003\.gguf"):
        open_checkpoint(files[0])
    files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="give it its name back"):
        open_checkpoint(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="part 0 of 3, its name says 1 of 3"):
        open_checkpoint(parts(tmp_path, no=0)[0])
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count = 9"):
        open_checkpoint(parts(tmp_path, total=9)[0])
    with pytest.raises(CheckpointError, match="also in"):
        open_checkpoint(parts(tmp_path, name="token_embd.weight")[0])


@pytest.mark.parametrize(
    ("arch", "layers", "width", "heads", "head_dim", "scalar"),
    [  # the published sizes: 9B and 27B of Gemma 2; 4B and 27B of Gemma 3
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma2", 46, 4608, 32, 128, 144),
        ("gemma3", 34, 2560, 8, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),
    ],
)
def test_gemmas_attention_scale(
    tmp_path: Path, arch: str, layers: int, width: int, heads: int, head_dim: int, scalar: int
) -> None:
    """query_pre_attn_scalar is in no GGUF file: it follows from the size of the model, as in llama.cpp."""
    numbers = {
        "block_count": layers,
        "embedding_length": width,
        "context_length": 8192,
        "feed_forward_length": 64,
        "attention.head_count": heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    keys = [("general.architecture", STRING, arch), *((f"{arch}.{k}", U32, v) for k, v in numbers.items())]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(keys, [("token_embd.weight", [32, 4], 0, 0)], bytes(512)))
    config = open_checkpoint(tmp_path / "x.gguf").config
    assert config["query_pre_attn_scalar"] == scalar
    full = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert full == list(range(1, layers, 2) if arch == "gemma2" else range(5, layers, 6))
