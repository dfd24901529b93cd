"""A GGUF file made from stories260K: our greedy text is llama.cpp's, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.checkpoints import open_checkpoint
from paceline.core.types import SamplingParams
from paceline.llm import LLM

N = 100


def permuted(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows as llama.cpp's rotary embedding wants them: pairs (2i, 2i+1) instead of (i, i + dim/2)."""
    return w.reshape(n_heads, 2, w.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write_gguf(folder: Path, out: Path, half: bool) -> None:
    gguf = pytest.importorskip("gguf", reason="writes the file with the gguf package")
    source = open_checkpoint(folder)
    c = source.config
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    w = gguf.GGUFWriter(out, "llama")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_rope_dimension_count(c["head_dim"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("llama")
    tokens = sorted(vocab, key=lambda t: vocab[t])
    w.add_token_list(tokens)
    w.add_token_scores([-float(i) for i in range(len(tokens))])
    w.add_token_types([2 if i == 0 else 3 if i < 3 else 6 if t.startswith("<0x") else 1 for i, t in enumerate(tokens)])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c["num_hidden_layers"])
    for name in source.tensors():
        if name == "lm_head.weight":
            continue
        x = np.asarray(source.read(name), np.float32)
        if "q_proj" in name or "k_proj" in name:
            x = permuted(x, c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if half and x.ndim == 2:
            x = x.astype(np.float16)
        w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    source.close()


@pytest.mark.parametrize("half", [False, True], ids=["F32", "F16"])
def test_greedy_text_is_that_of_llama_cpp(shared: Path, tmp_path: Path, half: bool) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="the oracle is llama-cpp-python")
    path = tmp_path / "stories.gguf"
    write_gguf(shared / "models" / "stories260K", path, half)
    with LLM(path) as llm:
        prompt = LLM.tokens(llm, "Once upon a time, there was a little girl")
        ours = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=N, ignore_eos=True))[0].token_ids
    oracle = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False, n_batch=512)
    theirs: list[int] = []
    for token in oracle.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == N:
            break
    assert ours == theirs


def test_the_gguf_is_the_checkpoint(shared: Path, tmp_path: Path) -> None:
    """Without any other engine: the file gives the same text as the folder it was made from."""
    folder = shared / "models" / "stories260K"
    path = tmp_path / "stories.gguf"
    write_gguf(folder, path, half=False)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    with LLM(path) as a, LLM(folder, dtype="float32") as b:
        prompt = b.tokens("Tom had a red ball")
        assert a.tokens("Tom had a red ball") == prompt
        assert a.generate([prompt], params)[0].token_ids == b.generate([prompt], params)[0].token_ids
