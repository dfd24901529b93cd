"""The same random weights in every peer's format: Hugging Face bfloat16, compressed-tensors int8 and int4, GGUF.

Weights are normal, every tensor's own, repeatable from the seed; norms are ones. A matrix keeps the variance of what it multiplies
(standard deviation 1 / sqrt(inputs), about 0.02), queries and keys somewhat more, so that attention depends on positions: with weaker
ones a model of random weights answers from its last token alone, and comparing outputs would not find a wrong cache. int8: one scale per
output, symmetric. int4: symmetric in groups of up to 128 inputs (compressed-tensors) or 32 (GGUF Q4_0). Peers with a converter of
their own start from the bfloat16 folder.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from paceline.analysis.synthetic import RandomCheckpoint

BITS = ("bf16", "int8", "int4")
STORED = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "int32": "I32", "int64": "I64"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

Tensors = Iterator[tuple[str, np.ndarray]]


def config_of(shape: str) -> dict[str, Any]:
    """config.json of a shape, with all that the peers' readers insist on."""
    config = dict(RandomCheckpoint(shape).config)
    heads = config["num_attention_heads"]
    config.setdefault("head_dim", config["hidden_size"] // heads)
    return {
        **config,
        "architectures": [ARCHITECTURES[config["model_type"]]],
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": config["vocab_size"] - 2,
        "eos_token_id": config["vocab_size"] - 1,
    }


def weights(shape: str, seed: int = 0) -> Tensors:
    """Every tensor of the Hugging Face checkpoint, bfloat16; matrices (outputs, inputs)."""
    for name, info in RandomCheckpoint(shape).tensors().items():
        if len(info.shape) == 1:
            yield name, np.ones(info.shape, ml_dtypes.bfloat16)
        else:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            w = rng.standard_normal(info.shape, np.float32)
            w *= np.float32(deviation(name, info.shape[1]))
            yield name, w.astype(ml_dtypes.bfloat16)


def deviation(name: str, n_in: int) -> float:
    if "embed" in name or "lm_head" in name:
        return 0.02
    return (1.3 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(n_in)


def group_of(config: Mapping[str, Any]) -> int:
    """Inputs that share a scale of int4: 128, or the largest power of two that divides every matrix's inputs."""
    widths = (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] * config["head_dim"])
    return math.gcd(128, *widths)


def is_quantised(name: str) -> bool:
    """The linear layers between embedding and head."""
    return name.endswith("proj.weight")


def quantised(tensors: Iterable[tuple[str, np.ndarray]], bits: str, group: int) -> Tensors:
    """Matrices as compressed-tensors keeps them ("int-quantized" for int8, "pack-quantized" for int4); the rest as it is."""
    for name, w in tensors:
        if not is_quantised(name):
            yield name, w
            continue
        base = name.removesuffix("weight")
        if bits == "int8":
            codes, scales = _codes(w.astype(np.float32), w.shape[1], 127)
            yield base + "weight", codes
        else:
            codes, scales = _codes(w.astype(np.float32), group, 7)
            yield base + "weight_packed", pack_int4(codes)
            yield base + "weight_shape", np.array(w.shape, np.int64)
        yield base + "weight_scale", scales.astype(ml_dtypes.bfloat16)


def _codes(w: np.ndarray, group: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 (n, k) from -most to most, scales float32 (n, k / group) that bfloat16 holds exactly."""
    grouped = w.reshape(len(w), -1, group)
    scales = (np.abs(grouped).max(-1) / np.float32(most)).astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.clip(np.rint(grouped / scales[..., None]), -most, most)
    return codes.astype(np.int8).reshape(w.shape), scales


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Codes (n, k) from -8 to 7 -> int32 (n, k / 8): eight codes + 8 to a word, the first in the lowest bits."""
    nibbles = (codes.astype(np.int32) + 8).astype(np.uint32).reshape(len(codes), -1, 8)
    words = np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    return words.astype(np.uint32).view(np.int32)


def quantization_config(bits: str, group: int) -> dict[str, Any]:
    """The entry of config.json by which vLLM and transformers know compressed-tensors."""
    weight: dict[str, Any] = {"num_bits": int(bits[3:]), "type": "int", "symmetric": True, "dynamic": False}
    weight |= {"strategy": "channel"} if bits == "int8" else {"strategy": "group", "group_size": group}
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weight,
                "input_activations": dynamic if bits == "int8" else None,
                "output_activations": None,
            }
        },
    }


def save_safetensors(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors one after the other: the data first into a file beside it, since the header must know every size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body, at = path.with_suffix(".data"), 0
    with body.open("wb") as f:
        for name, a in tensors:
            header[name] = {"dtype": STORED[a.dtype.name], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
            f.write(np.ascontiguousarray(a).view(np.uint8).tobytes())
            at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out, body.open("rb") as f:
        out.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(f, out, 1 << 24)
    body.unlink()


def stored(path: Path) -> Tensors:
    """Every tensor of a file that `save_safetensors` wrote in bfloat16."""
    with path.open("rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(start - 8))
    header.pop("__metadata__")
    data = np.memmap(path, np.uint8, "r", start)
    for name, info in header.items():
        first, last = info["data_offsets"]
        yield name, data[first:last].view(ml_dtypes.bfloat16).reshape(info["shape"])


def token_name(i: int, n_vocab: int) -> str:
    """Token i of the made-up vocabulary: the bytes' own characters, then plain words, two special tokens last."""
    special = {n_vocab - 2: "<s>", n_vocab - 1: "</s>"}
    return special.get(i) or (byte_alphabet()[i] if i < 256 else f"w{i}")


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    stand_in = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [stand_in[b] for b in range(256)]


def save_tokenizer(folder: Path, n_vocab: int) -> None:
    """A byte-level BPE without merges. Nothing is tokenised here, but converters insist on a tokenizer of the right size."""
    added: list[dict[str, Any]] = [
        {"id": i, "content": token_name(i, n_vocab), "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i in (n_vocab - 2, n_vocab - 1)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = {token_name(i, n_vocab): i for i in range(n_vocab)}
    bpe: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []}
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
    }
    whole |= {"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": bpe}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "</s>", "pad_token": "</s>", "model_max_length": 1 << 20}
    _json(folder / "tokenizer.json", whole)
    _json(folder / "tokenizer_config.json", settings)
    _json(folder / "special_tokens_map.json", {k: v for k, v in settings.items() if k.endswith("_token")})


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def save_folder(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """A Hugging Face folder."""
    folder.mkdir(parents=True)
    save_tokenizer(folder, config["vocab_size"])
    _json(folder / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")})
    _json(folder / "config.json", config)
    save_safetensors(folder / "model.safetensors", tensors)


def ensure(root: Path, shape: str, form: str, bits: str) -> Path:
    """Path of a checkpoint, written now if it is not there. form: hf (bfloat16), compressed-tensors, gguf."""
    suffix = "-vocabulary.gguf" if form == "gguf" else ""
    path = root / Path(shape).name.removesuffix(".json") / f"{form}-{'bf16' if form == 'hf' else bits}{suffix}"
    if path.exists():
        return path
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    config, group = config_of(shape), group_of(config_of(shape))
    if form == "hf":
        save_folder(partial, config, weights(shape))
    else:
        tensors = stored(ensure(root, shape, "hf", "bf16") / "model.safetensors")
        if form == "gguf":
            save_gguf(partial, config, tensors, bits)
        else:
            config["quantization_config"] = quantization_config(bits, group)
            save_folder(partial, config, quantised(tensors, bits, group))
    partial.rename(path)
    return path


# ---- GGUF

_GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        layer, rest = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_GGUF_NAMES[rest]}.weight"
    return f"{_GGUF_NAMES[stem]}.weight"


def interleaved(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a query or key projection reordered from halves to pairs, which is how llama.cpp rotates a Llama's heads."""
    return w.reshape(n_heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """float32 (head_dim / 2,): by what llama3 scaling divides each frequency; None without scaling."""
    s = config.get("rope_scaling")
    if not s:
        return None
    d = config["head_dim"]
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, d, 2) / d)
    turns = s["original_max_position_embeddings"] / wavelength
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / s["factor"] + smooth)).astype(np.float32)


def save_gguf(path: Path, config: Mapping[str, Any], tensors: Tensors, bits: str) -> None:
    """A GGUF file: every matrix bfloat16, Q8_0 or Q4_0, the embedding (tied to the head) included; the vocabulary of `token_name`."""
    import gguf

    kind = gguf.GGMLQuantizationType[_GGUF_TYPES[bits]]
    writer = gguf.GGUFWriter(path, config["model_type"], use_temp_file=True)
    _gguf_facts(writer, config)
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + _GGUF_TYPES[bits]])
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    for name, w in tensors:
        if w.ndim == 1:
            writer.add_tensor(gguf_name(name), w.astype(np.float32))
            continue
        n_heads = next((n for end, n in heads.items() if name.endswith(end)), 0)
        if n_heads and config["model_type"] == "llama":
            w = interleaved(w, n_heads)
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(w.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_facts(writer: Any, config: Mapping[str, Any]) -> None:
    facts: list[tuple[Callable[[Any], None], Any]] = [
        (writer.add_name, "random weights"),
        (writer.add_context_length, config["max_position_embeddings"]),
        (writer.add_embedding_length, config["hidden_size"]),
        (writer.add_block_count, config["num_hidden_layers"]),
        (writer.add_feed_forward_length, config["intermediate_size"]),
        (writer.add_head_count, config["num_attention_heads"]),
        (writer.add_head_count_kv, config["num_key_value_heads"]),
        (writer.add_key_length, config["head_dim"]),
        (writer.add_value_length, config["head_dim"]),
        (writer.add_rope_dimension_count, config["head_dim"]),
        (writer.add_rope_freq_base, config["rope_theta"]),
        (writer.add_layer_norm_rms_eps, config["rms_norm_eps"]),
        (writer.add_vocab_size, config["vocab_size"]),
        *_gguf_vocabulary(writer, config["vocab_size"]),
    ]
    for add, value in facts:
        add(value)


def _gguf_vocabulary(writer: Any, n_vocab: int) -> list[tuple[Callable[[Any], None], Any]]:
    """What `save_tokenizer` writes, but that readers insist on merges: token 256 is that of the only one."""
    import gguf

    names = [token_name(i, n_vocab) for i in range(n_vocab)]
    names[256] = "ww"
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    return [
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_token_list, names),
        (writer.add_token_types, [normal] * (n_vocab - 2) + [control] * 2),
        (writer.add_token_merges, ["w w"]),
        (writer.add_bos_token_id, n_vocab - 2),
        (writer.add_eos_token_id, n_vocab - 1),
        (writer.add_add_bos_token, False),
    ]
