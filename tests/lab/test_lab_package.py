"""The packaged models: names, folders, the tokenizer's round trip and the chat template."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from paceline import lab

NAMES = ("lab-1m", "lab-8m")
BUDGET = 25_000_000


def tensors(folder: Path) -> dict[str, dict[str, object]]:
    """The header of ``model.safetensors``."""
    with (folder / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, object]] = json.loads(file.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def test_names_and_default() -> None:
    assert lab.names() == sorted(NAMES)
    assert lab.path() == lab.path("lab-8m")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="lab-1m, lab-8m"):
        lab.path("lab-70b")


def test_import_needs_no_torch() -> None:
    root = Path(lab.__file__).resolve().parents[2]
    code = "import sys; import paceline.lab; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_total_size_is_within_the_budget() -> None:
    folders = [lab.path(name) for name in NAMES]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_complete_and_consistent(name: str) -> None:
    folder = lab.path(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [
        2,
        0,
    ]
    found = tensors(folder)
    assert {entry["dtype"] for entry in found.values()} == {"BF16"}
    assert found["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]
    assert len(found) == 2 + 9 * config["num_hidden_layers"]


def test_both_sizes_share_the_tokenizer() -> None:
    first, second = ((lab.path(name) / "tokenizer.json").read_bytes() for name in NAMES)
    assert first == second


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Hello, world!",
        "def f(x):\n    return x  # done\n\n\n",
        "\t\r\n mixed \u00a0 blanks\n",
        "Žluťoučký kůň, 日本語, العربية, 👩‍👩‍👧",
        "e\u0301 is not \u00e9",
        "".join(map(chr, range(256))),
        "1234567890 3.14159",
    ],
)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(lab.path() / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_size_specials_and_single_digits() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(lab.path() / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [tokenizer.token_to_id(each) for each in specials] == [0, 1, 2]
    assert tokenizer.encode("7305").tokens == ["7", "3", "0", "5"]
    digits = [token for token in tokenizer.get_vocab() if any(each.isdigit() for each in token)]
    assert all(len(token) == 1 for token in digits)


def test_chat_template_renders_as_the_training_prompts() -> None:
    jinja2 = pytest.importorskip("jinja2")
    from lab.data.base import chat_prompt

    settings = json.loads((lab.path() / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Template(settings["chat_template"])
    user = {"role": "user", "content": "What is 2 + 2?"}
    system = {"role": "system", "content": "Answer briefly."}
    rendered = template.render(messages=[user], add_generation_prompt=True)
    assert rendered == chat_prompt("What is 2 + 2?")
    rendered = template.render(messages=[system, user], add_generation_prompt=True)
    assert rendered == chat_prompt("What is 2 + 2?", "Answer briefly.")
    dialog = [user, {"role": "assistant", "content": "2 + 2 = 4"}]
    rendered = template.render(messages=dialog, add_generation_prompt=False)
    assert rendered == chat_prompt("What is 2 + 2?") + "2 + 2 = 4<|im_end|>\n"


def test_longest_recall_items_fit_the_context() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from lab.data import generators

    tokenizer = tokenizers.Tokenizer.from_file(str(lab.path() / "tokenizer.json"))
    longest = [item for item in generators()["recall"].items(1000, 30) if item.task.endswith("4096")]
    lengths = [len(tokenizer.encode(item.prompt + item.answer).ids) for item in longest]
    assert 3000 < min(lengths) <= max(lengths) <= 4096
