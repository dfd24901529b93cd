"""What a process takes: loading holds one parameter of the source at a time, and a short conversation few pages of the KV cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from paceline.analysis.synthetic import RandomCheckpoint
from paceline.assemble import native_isas
from paceline.checkpoints.safetensors import save_safetensors

MIB = 1 << 20

pytestmark = [
    pytest.mark.skipif(not native_isas(), reason="the native core is not built"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]

# Resident bytes of a process that loads a model (its arguments) and generates from ten tokens: at the start, the most while loading,
# after loading, in the end.
PROBE = """
import json, sys
from paceline.llm import LLM
from paceline.core.types import SamplingParams

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])

with LLM("lab-1m", context=64) as llm:
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
found = [resident("VmRSS")]
with LLM(sys.argv[1], **json.loads(sys.argv[2])) as llm:
    found += [resident("VmHWM"), resident("VmRSS")]
    llm.generate([list(range(10))], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    found += [resident("VmRSS"), llm.plan.model.weight_bytes]
print(json.dumps(found))
"""


def probe(folder: Path, **options: Any) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), json.dumps(options)], capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def write(folder: Path, **config: Any) -> int:
    """A folder of random bfloat16 weights; the bytes of its largest tensor."""
    whole = {
        "model_type": "llama", "num_attention_heads": 16, "max_position_embeddings": 1 << 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "hidden_act": "silu", **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))
    source = RandomCheckpoint(str(folder / "config.json"))
    arrays = {name: source.read(name).astype(ml_dtypes.bfloat16) for name in source.tensors()}
    save_safetensors(folder / "model.safetensors", arrays)
    return max(a.nbytes for a in arrays.values())


def test_quantising_while_loading_holds_one_parameter_of_the_source(tmp_path: Path) -> None:
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_key_value_heads": 4}
    largest = write(tmp_path, **size, vocab_size=8192)
    source = (tmp_path / "model.safetensors").stat().st_size
    start, peak, _, _, weights = probe(tmp_path, format="int4", context=64)
    # a parameter is mapped, joined from its sources, and packed; the rest is working memory
    bound = start + weights + 3 * largest + 24 * MIB
    assert bound < start + source, "the bound tells nothing"
    assert peak < bound


def test_a_short_conversation_takes_few_pages(tmp_path: Path) -> None:
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 40, "num_key_value_heads": 16}
    write(tmp_path, **size, vocab_size=512)
    _, _, loaded, after, _ = probe(tmp_path, kv_dtype="bfloat16", kv_memory=1 << 30, context=1024)
    huge = 2 * 40 * 2 * MIB  # what a huge page in each pool would take
    assert after - loaded < huge / 4


def test_arrays_stay_valid_when_their_pages_are_given_back(tmp_path: Path) -> None:
    from paceline.checkpoints import open_checkpoint

    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_key_value_heads": 16}
    write(tmp_path, **size, vocab_size=512)
    checkpoint = open_checkpoint(tmp_path)
    array = checkpoint.read("model.embed_tokens.weight")
    before = np.array(array)
    checkpoint.release()
    assert np.array_equal(np.asarray(array).view(np.uint16), before.view(np.uint16))
    checkpoint.close()
