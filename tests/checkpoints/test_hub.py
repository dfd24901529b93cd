"""Hub names, without a network: a cache laid out on disk, and a Hub that is a Python function."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from checkpoint_builders import small_gguf, tensors_bytes
from huggingface_hub import constants

from paceline.checkpoints import hub, open_checkpoint
from paceline.core.errors import CheckpointError

COMMIT = "a" * 40


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("user/repo", ("user/repo", None)),
        ("user/repo:Q4_K_M", ("user/repo", "Q4_K_M")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ("HuggingFaceTB/SmolLM2-135M-Instruct", None)),
        ("repo", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("/a/b", None),
        ("../b", None),
        ("user/..", None),
        ("user/x.gguf", None),
        ("user/x.safetensors", None),
        ("user/repo:", None),
        ("user/re po", None),
        ("user/" + "x" * 200, None),
    ],
)
def test_what_can_be_a_name(ref: str, expected: Any) -> None:
    found = hub.parse(ref)
    assert (found and (found.repo, found.quant)) == expected


def choose(ref: str, *files: str) -> list[str]:
    name = hub.parse(ref)
    assert name
    return hub.choose(name, files)


def test_only_what_is_read_is_chosen() -> None:
    extra = [
        ".gitattributes",
        "README.md",
        "config.json",
        "tokenizer.json",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "flax_model.msgpack",
        "onnx/model.onnx",
        "train.py",
        "generation_config.json",
    ]
    kept = ["config.json", "tokenizer.json", "generation_config.json"]
    assert choose("u/r", *extra, "model.safetensors", "other.safetensors", "sub/model.safetensors") == [
        *kept,
        "model.safetensors",
    ]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert choose("u/r", *extra, *shards, index, "consolidated.safetensors") == [*kept, index, *shards]
    assert choose("u/r", "config.json", "odd-name.safetensors") == ["config.json", "odd-name.safetensors"]
    ours = ["paceline.json", "paceline-00001-of-00001.safetensors"]
    assert choose("u/r", *extra, *ours, "model.safetensors") == [*kept, *ours]


def test_a_gguf_is_chosen_by_its_quantisation() -> None:
    files = [
        "README.md",
        "m-Q4_K_M.gguf",
        "m-Q4_K.gguf",
        "m-q8_0.gguf",
        "mmproj-m-f16.gguf",
        "big/m-F16-00001-of-00002.gguf",
        "big/m-F16-00002-of-00002.gguf",
    ]
    assert choose("u/r:Q4_K_M", *files) == ["m-Q4_K_M.gguf"]
    assert choose("u/r:q4_k", *files) == ["m-Q4_K.gguf"]
    assert choose("u/r:Q8_0", *files) == ["m-q8_0.gguf"]
    assert choose("u/r:F16", *files) == ["big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf"]
    assert choose("u/r", "README.md", "only.gguf") == ["only.gguf"]
    for ref, words in {"u/r": "4 GGUF models", "u/r:Q5_K_M": "none of its files"}.items():
        with pytest.raises(CheckpointError, match=words) as e:
            choose(ref, *files)
        assert "u/r:Q4_K_M" in str(e.value)
        assert "m-q8_0" in str(e.value)
    with pytest.raises(CheckpointError, match="2 files are"):
        choose("u/r:Q4_K_M", "a-Q4_K_M.gguf", "b-Q4_K_M.gguf")


def test_pickles_are_never_chosen() -> None:
    with pytest.raises(CheckpointError, match=r"pickled.*run code"):
        choose("u/r", "config.json", "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
        choose("u/r", "README.md")
    with pytest.raises(CheckpointError, match="no GGUF files"):
        choose("u/r:Q4_0", "config.json", "model.safetensors")


# the cache


def cache(root: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], repo: str = "user/repo") -> Path:
    """A Hub cache in `root` that holds one snapshot."""
    folder = root / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return snapshot


HF = {
    "config.json": json.dumps({"model_type": "llama"}).encode(),
    "model.safetensors": tensors_bytes({"a": np.ones(2, np.float32)}),
}


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)


def test_offline_by_argument_and_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path, monkeypatch, HF)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the Hub"))
    assert np.asarray(open_checkpoint("user/repo", offline=True).read("a")).tolist() == [1, 1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert set(open_checkpoint("user/repo").tensors()) == {"a"}


def test_without_a_network_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path, monkeypatch, {"m-Q8_0.gguf": small_gguf(), "m-Q4_0.gguf": small_gguf()})
    no_network(monkeypatch)
    assert open_checkpoint("user/repo:Q8_0").path.name == "m-Q8_0.gguf"
    with pytest.raises(CheckpointError, match=r"local cache.*2 GGUF models"):
        open_checkpoint("user/repo")


def test_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path, monkeypatch, HF)
    no_network(monkeypatch)
    with pytest.raises(CheckpointError, match=r"user/other.*cannot be reached.*not in the local cache.*go online"):
        open_checkpoint("user/other")
    with pytest.raises(CheckpointError, match=r"user/other.*offline mode is on.*HF_HUB_OFFLINE"):
        open_checkpoint("user/other", offline=True)


def test_a_snapshot_with_the_files_we_chose_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer libraries remember the repository's whole listing and call such a snapshot incomplete."""
    tree = pytest.importorskip("huggingface_hub._tree_cache", reason="this huggingface_hub keeps no listing")
    cache(tmp_path, monkeypatch, HF)
    listing = {name: tree.TreeCacheEntry(1, "b" * 40, None, None, None) for name in [*HF, "pytorch_model.bin"]}
    tree.write_tree_cache(str(tmp_path / "models--user--repo"), COMMIT, listing)
    with pytest.raises(Exception, match="incomplete"):
        huggingface_hub.snapshot_download("user/repo", local_files_only=True, cache_dir=tmp_path)
    assert set(open_checkpoint("user/repo", offline=True).tensors()) == {"a"}


def test_an_interrupted_download_is_not_mistaken_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {f"model-{i:05d}-of-00002.safetensors": tensors_bytes({f"t{i}": np.ones(2, np.float32)}) for i in (1, 2)}
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(shards, 1)}}
    files = {"config.json": HF["config.json"], "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    del files["model-00002-of-00002.safetensors"]
    cache(tmp_path, monkeypatch, files)
    with pytest.raises(CheckpointError, match=r"missing: model-00002-of-00002\.safetensors"):
        open_checkpoint("user/repo", offline=True)


def test_a_download_fetches_exactly_the_chosen_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = ["config.json", "model.safetensors", "pytorch_model.bin", "README.md", "odd[1].json"]
    snapshot = cache(tmp_path, monkeypatch, HF)
    asked: dict[str, Any] = {}
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in listing])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(snapshot)

    class Bar:
        pass

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_checkpoint("user/repo", progress=Bar)
    assert asked == {"repo": "user/repo", "allow_patterns": ["config.json", "model.safetensors"], "tqdm_class": Bar}


def test_an_interrupted_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in HF])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)

    def download(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"user/repo.*No space left.*again"):
        open_checkpoint("user/repo")


@pytest.mark.parametrize(
    ("kind", "words"), [("GatedRepoError", "HF_TOKEN"), ("RepositoryNotFoundError", "no such repository")]
)
def test_refusals_of_the_hub_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    error = type(kind, (Exception,), {})

    def fail(*_: Any, **__: Any) -> Any:
        raise error("403")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint("user/repo")


def test_what_is_on_disk_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "repo").mkdir(parents=True)
    for name, content in HF.items():
        (tmp_path / "user" / "repo" / name).write_bytes(content)
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("asked the Hub"))
    assert set(open_checkpoint("user/repo").tensors()) == {"a"}
