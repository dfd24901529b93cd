"""The catalogue of machines: one TOML file each in `machines/`, with where its figures come from."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent / "machines"


@dataclass(frozen=True)
class MachineModel:
    """Attainable rates. bandwidth: GB/s read from memory by all cores; peaks in TFLOP/s (TOP/s for int8), 0: no such unit known."""

    name: str
    cores: int
    memory_gb: float
    bandwidth_gb_s: float
    peak_f32: float
    peak_bf16: float
    peak_int8: float
    source: str

    def describe(self) -> dict[str, Any]:
        return asdict(self)


@cache
def catalogue() -> tuple[MachineModel, ...]:
    """Every machine of the folder, by name."""
    found = []
    for path in sorted(_FOLDER.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        found.append(MachineModel(name=path.stem, **data))
    return tuple(found)
