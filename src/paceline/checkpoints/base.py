"""What a checkpoint is to the loader, whatever file format it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from paceline.ops.packed import Codes, Packed


@dataclass(frozen=True)
class TensorInfo:
    """shape is (n_out, n_in) for matrices, as in a Hugging Face checkpoint; dtype names the stored format ("bf16",
    "Q4_K").
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Checkpoint(Protocol):
    """Named tensors, read one at a time; config in the form of config.json.

    Names are those of a Hugging Face checkpoint, except when format is "packed": then they are the parameter names of
    our own model programs (`Model.params`) and matrices are `Packed`, ready to use.
    """

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]  # generation_config.json, or what the file says of it
    metadata: dict[str, Any]  # what else the file says: GGUF's keys (tokenizer.ggml.*, ...); empty for the others
    notes: list[str]  # what a user should be told about how this file is read

    @property
    def format(self) -> Literal["safetensors", "gguf", "packed"]: ...

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor, without reading data."""

    def read(self, name: str) -> np.ndarray | Codes | Packed:
        """One tensor: a float32, float16 or ml_dtypes.bfloat16 array (a view of the mmap where possible), or quantised.

        Raises CheckpointError for an unknown name or a tensor that cannot be used.
        """

    def release(self) -> None:
        """Give back the memory of what was read from the file so far. Arrays already read stay valid."""

    def digest(self) -> str:
        """Stands for the weights: see `files.sampled_digest`."""

    def close(self) -> None:
        """Forget the file. Arrays already read stay valid."""


Names = Iterable[str]
