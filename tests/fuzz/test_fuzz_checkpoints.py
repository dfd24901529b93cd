"""A short run of the fuzz targets with every test run, and their seeds on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fuzz_gguf
import fuzz_safetensors
import mutate
import pytest

from paceline.checkpoints.gguf import GgufCheckpoint
from paceline.checkpoints.safetensors import SafetensorsFile
from paceline.core.errors import CheckpointError

TARGETS = {"gguf": fuzz_gguf, "safetensors": fuzz_safetensors}


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a failing input would be left
    module: Any = TARGETS[name]
    mutate.fuzz(module.target, module.seeds(), runs=600, seed=1)


def test_the_seeds_reach_the_readers(tmp_path: Path) -> None:
    """A seed that is refused at once would make the fuzzing worthless; the split part alone is meant to be refused."""
    path = tmp_path / "seed.gguf"
    *whole, part = fuzz_gguf.seeds()
    for data in whole:
        path.write_bytes(data)
        assert GgufCheckpoint(path).tensors()
    path.write_bytes(part)
    with pytest.raises(CheckpointError, match="one of 2 parts"):
        GgufCheckpoint(path)
    path = path.with_suffix(".safetensors")
    for data in fuzz_safetensors.seeds():
        path.write_bytes(data)
        assert SafetensorsFile(path).entries


def test_a_failure_is_reported_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def target(data: bytes) -> None:
        if b"\xff" in data:
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        mutate.fuzz(target, [bytes(50)], runs=5000)
    assert b"\xff" in (tmp_path / "crash.bin").read_bytes()
