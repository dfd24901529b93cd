"""From an adapter's files to the model's sites: every module is checked against the base model, then read and bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from paceline import models
from paceline.checkpoints.adapter import AdapterFolder, Lora
from paceline.core.adapters import Adapter
from paceline.core.errors import CheckpointError, RequestError
from paceline.models.base import ModelConfig, Param
from paceline.ops import Ops
from paceline.ops.adapters import LowRank, n_bytes

_MAX_SHOWN = 20


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's module is in the program: columns [col, col + n_out) of a site."""

    site: str
    col: int
    n_out: int
    n_in: int


def places(config: ModelConfig) -> dict[str, Place]:
    """Every module that can be adapted, by the base checkpoint's name of it."""
    net = models.get(config.model_type).Net
    params = net.params(config)
    return {module: place for site in net.sites_of(config) for module, place in _of(site, params[site])}


def _of(site: str, p: Param) -> Iterator[tuple[str, Place]]:
    col = 0
    for source, rows in zip(p.sources, p.rows_of(), strict=True):
        yield source.removesuffix(".weight"), Place(site, col, rows, p.shape[1])
        col += rows


def check(folder: AdapterFolder, config: ModelConfig) -> int:
    """Bytes of memory it will take. Raises CheckpointError naming every module that does not fit the base model."""
    known = places(config)
    able = {module.rpartition(".")[2] for module in known}
    problems = [
        f"target_modules: {t[:80]!r} cannot be adapted; {', '.join(sorted(able))} can"
        for t in folder.targets
        if t.rpartition(".")[2] not in able and not any(module.endswith(f".{t}") for module in known)
    ]
    problems += [p for m in folder.modules if (p := _problem(m, known)) is not None]
    if problems:
        more = [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
        raise CheckpointError(f"{folder.path}: does not fit the model: " + "; ".join(problems[:_MAX_SHOWN] + more))
    widest: dict[str, int] = {}  # the updates of a site are kept alike
    for m in folder.modules:
        site = known[m.module].site
        widest[site] = max(m.itemsize, widest.get(site, 0))
    return sum(n_bytes(m.rank, m.n_in, m.n_out, widest[known[m.module].site]) for m in folder.modules)


def _problem(m: Lora, known: Mapping[str, Place]) -> str | None:
    place = known.get(m.module)
    if place is None:
        return f"{m.module}: the base model has no such linear that could be adapted"
    if (m.n_out, m.n_in) != (place.n_out, place.n_in):
        return f"{m.module}: is for a matrix of {m.n_out} x {m.n_in}, the base model's is {place.n_out} x {place.n_in}"
    return None


def size(path: str | Path, config: ModelConfig, dtype: str = "auto") -> int:
    """Bytes of memory an adapter will take, known from its headers. Raises CheckpointError."""
    folder = AdapterFolder(path, dtype)
    try:
        return check(folder, config)
    finally:
        folder.close()


def load(name: str, path: str | Path, room: int, *, config: ModelConfig, ops: Ops, dtype: str = "auto") -> Adapter:
    """Read an adapter for a model. Raises CheckpointError, and RequestError where it takes more than `room` bytes."""
    folder = AdapterFolder(path, dtype)
    try:
        needed = check(folder, config)
        if needed > room:
            raise RequestError(
                f"adapter = {name!r}: takes {needed / 1e6:,.1f} MB and {max(0, room) / 1e6:,.1f} MB are free for adapters; "
                "unload others, or start with a larger adapter_memory"
            )
        known = places(config)
        names = models.get(config.model_type).Net.sites_of(config)
        at = {site: i for i, site in enumerate(names)}
        sites: list[list[LowRank]] = [[] for _ in names]
        for m in folder.modules:
            place = known[m.module]
            sites[at[place.site]].append(LowRank(*folder.read(m), m.scale, place.col))
        for updates in sites:
            updates.sort(key=lambda u: u.col)
        used = frozenset(known[m.module].site for m in folder.modules)
        rank = max(m.rank for m in folder.modules)
        return Adapter(name, str(path), folder.digest(), rank, needed, used, ops.adapter(sites))
    finally:
        folder.close()
