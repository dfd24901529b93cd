"""The host as this process may use it: affinity, cgroup quota and memory limits included.

A container with a quota of two CPUs on a 64-core host has two cores here; memory is what can be had without swapping.
"""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Host:
    """cores: usable ones; quota: of the cgroup in cores, None without; memory in bytes; numa: nodes with their cores."""

    cpu: str
    flags: frozenset[str]
    n_logical: int
    n_physical: int
    affinity: tuple[int, ...]
    quota: float | None
    memory_total: int
    memory_available: int
    memory_limit: int | None
    numa: tuple[str, ...]

    @property
    def n_cores(self) -> int:
        """Threads worth starting: physical cores of the affinity set, within the quota, at least 1."""
        usable = min(len(self.affinity), max(1, self.n_physical))
        return max(1, usable if self.quota is None else min(usable, math.ceil(self.quota)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def cgroup_quota(root: Path = _CGROUP) -> float | None:
    """Cores the cgroup may use (v2 cpu.max, v1 cfs_quota), None when unlimited."""
    text = _read(root / "cpu.max")
    if text:
        quota, _, period = text.partition(" ")
        return None if quota == "max" else int(quota) / int(period or 100_000)
    v1, period1 = _read(root / "cpu/cpu.cfs_quota_us"), _read(root / "cpu/cpu.cfs_period_us")
    if v1 and period1 and int(v1) > 0:
        return int(v1) / int(period1)
    return None


def cgroup_memory(root: Path = _CGROUP) -> tuple[int, int] | None:
    """(limit, used without reclaimable file cache) in bytes, None when unlimited."""
    for limit_name, used_name, stat_name, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        limit, used = _read(root / limit_name), _read(root / used_name)
        if not limit or not used or limit == "max" or int(limit) >= 1 << 60:
            continue
        rows = dict(line.split(" ", 1) for line in (_read(root / stat_name) or "").splitlines() if " " in line)
        return int(limit), max(0, int(used) - int(rows.get(cache_key, 0)))
    return None


def _cpu() -> tuple[str, frozenset[str]]:
    text = _read(Path("/proc/cpuinfo")) or ""
    rows: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            rows[key.strip()] = value.strip()
    return rows.get("model name") or platform.processor() or platform.machine(), frozenset(
        rows.get("flags", "").split()
    )


def detect() -> Host:
    """Read the host now; costs about a millisecond."""
    memory = psutil.virtual_memory()
    limit = cgroup_memory()
    available = memory.available if limit is None else min(memory.available, max(0, limit[0] - limit[1]))
    affinity = (
        tuple(sorted(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else tuple(range(os.cpu_count() or 1))
    )
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    numa = tuple(f"{n.name}: {_read(n / 'cpulist') or '?'}" for n in nodes)
    name, flags = _cpu()
    return Host(
        name,
        flags,
        psutil.cpu_count() or 1,
        psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        affinity,
        cgroup_quota(),
        memory.total,
        available,
        None if limit is None else limit[0],
        numa,
    )
