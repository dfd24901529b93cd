"""A whole model from a GGUF file: the same tokens as from the Hugging Face folder, and as llama.cpp gives for the
same file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline import LLM
from paceline.checkpoints import open_checkpoint
from paceline.core.types import SamplingParams

gguf = pytest.importorskip("gguf", reason="needs the gguf package")
N = 100
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def convert(folder: Path, out: Path) -> None:
    """stories260K as GGUF in F32, with its vocabulary, as llama.cpp's converter writes a Llama."""
    c = open_checkpoint(folder)
    raw = c.config
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_dimension_count(raw["head_dim"])
    add_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()))
    for name in c.tensors():
        a = np.array(c.read(name), np.float32)
        for kind, heads in (("q_proj", raw["num_attention_heads"]), ("k_proj", raw["num_key_value_heads"])):
            if kind in name:
                a = a.reshape(heads, 2, -1, a.shape[1]).swapaxes(1, 2).reshape(a.shape)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: Any, tokenizer: dict[str, Any]) -> None:
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    byte = [w.startswith("<0x") and w.endswith(">") for w in words]
    kinds = [
        2 if w == "<unk>" else 3 if w in ("<s>", "</s>") else 6 if b else 1 for w, b in zip(words, byte, strict=True)
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.fixture(scope="module")
def model(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    convert(shared / "models" / "stories260K", out)
    return out


def greedy(path: Path, prompt: list[int]) -> list[int]:
    llm = LLM(path, dtype="float32", backend="reference")
    params = SamplingParams(temperature=0.0, max_tokens=N, ignore_eos=True)
    try:
        return llm.generate([prompt], params)[0].token_ids
    finally:
        llm.close()


PROMPTS = [[1], [1, 403, 407], [1, 261, 500, 300, 290, 400]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_tokens_as_from_the_folder(model: Path, shared: Path, prompt: list[int]) -> None:
    assert greedy(model, prompt) == greedy(shared / "models" / "stories260K", prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_tokens_as_llama_cpp(model: Path, prompt: list[int]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    llama = llama_cpp.Llama(str(model), n_ctx=512, n_threads=1, logits_all=False, verbose=False)
    llama.eval(prompt)
    expected: list[int] = []
    for _ in range(N):
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),))
        expected.append(int(logits.argmax()))
        llama.eval(expected[-1:])
    llama.close()
    assert greedy(model, prompt) == expected
