# What csrc/bind offers to Python; see csrc/README.md.
from collections.abc import Sequence
from typing import Any

import numpy as np

def instruction_sets() -> list[tuple[str, str]]: ...
def usable_threads() -> int: ...

class Buffer:
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    def __init__(self, shape: Sequence[int], dtype: str, small_pages: int = 0) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(self, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Device:
    isa: str
    n_threads: int
    busy: float
    def __init__(self, isa: str, n_threads: int) -> None: ...
    def sample(
        self,
        logits: np.ndarray,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        min_p: np.ndarray,
        u: np.ndarray,
    ) -> np.ndarray: ...
    def logprobs(
        self, logits: np.ndarray, ids: np.ndarray, n_top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def move(self, pool: np.ndarray, src: np.ndarray, dst: np.ndarray) -> None: ...
    def pack(
        self,
        src: np.ndarray,
        source: str,
        format: str,
        group: int,
        data: np.ndarray,
        scales: np.ndarray | None,
        mins: np.ndarray | None,
    ) -> int: ...
    def profile(self, on: bool) -> list[tuple[str, int, float]]: ...
    def read_bandwidth(self, n_bytes: int = ..., n_passes: int = ...) -> float: ...
    def peak(self, kind: str, seconds: float = ...) -> float: ...

class Pools:
    def __init__(self, k: list[np.ndarray], v: list[np.ndarray], heads: list[int], dtype: str) -> None: ...

class Adapter:
    def __init__(self, sites: list[tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, int, int]]]]) -> None: ...

class Step:
    n_rows: int
    def __init__(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        cu_rows: np.ndarray,
        want: np.ndarray,
        groups: list[tuple[Pools, np.ndarray, np.ndarray, np.ndarray]],
        cu_layer: np.ndarray,
        layer_at: np.ndarray,
        mask: np.ndarray | None,
        tail: np.ndarray | None,
        adapters: list[Adapter],
        adapter_of: np.ndarray | None,
    ) -> None: ...

class Ref:
    def __init__(self, slot: int, wanted: bool, base: int, stride: int, col: int, cols: int) -> None: ...

class Weight:
    def __init__(
        self,
        format: str,
        n_out: int,
        n_in: int,
        group: int,
        data: np.ndarray,
        scales: np.ndarray | None,
        mins: np.ndarray | None,
    ) -> None: ...

class Program:
    def __init__(self, device: Device, width: int, in_cols: list[int], outs: list[tuple[int, bool]]) -> None: ...
    def run(self, step: Step | None, *inputs: Any) -> Any: ...
