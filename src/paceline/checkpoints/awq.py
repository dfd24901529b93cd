"""AWQ checkpoints (gemm layout): qweight int32 (n_in, n_out / 8), qzeros int32 (n_in / group, n_out / 8), scales (n_in
/ group, n_out).

Each word holds eight neighbouring outputs in the order 0 2 4 6 1 3 5 7 from its low end; value = scale * (q - zero).
(arXiv:2306.00978; the layout is that of AutoAWQ's WQLinear_GEMM.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.checkpoints.grouped import check_parts, check_scales, to_codes, unpack
from paceline.core.errors import CheckpointError
from paceline.ops.packed import Codes

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq:
    """How the folder's quantised matrices are stored; group -1 means one group per row."""

    group: int
    name = "AWQ"
    bits = 4
    parts = ("qweight", "qzeros", "scales")
    optional_parts: tuple[str, ...] = ()

    def shape(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[int, int]:
        """(n_out, n_in) from the parts' shapes, which must agree."""
        if len(shapes["qweight"]) != 2:
            raise CheckpointError(f"{where}.qweight: shape {shapes['qweight']} must be (n_in, n_out / 8)")
        n_in, words = shapes["qweight"]
        group = n_in if self.group == -1 else self.group
        if not group or n_in % group:
            raise CheckpointError(f"{where}: n_in = {n_in} is not a multiple of group_size = {self.group}")
        check_parts(where, dict(shapes), {"qzeros": (n_in // group, words), "scales": (n_in // group, words * 8)})
        return words * 8, n_in

    def read(self, parts: Mapping[str, np.ndarray], where: str, notes: list[str]) -> Codes | np.ndarray:
        q = unpack(parts["qweight"], 4, ORDER)
        zeros = unpack(parts["qzeros"], 4, ORDER)
        group = q.shape[0] if self.group == -1 else self.group
        return to_codes(q, zeros, check_scales(where, parts["scales"]), 4, group)


def options(raw: Mapping[str, Any], where: str) -> Awq:
    """From `quantization_config`. Raises CheckpointError for what AWQ's gemm layout does not cover."""
    bits, group = raw.get("bits", raw.get("w_bit")), raw.get("group_size", raw.get("q_group_size", 128))
    version = str(raw.get("version", "gemm")).lower()
    if bits != 4:
        raise CheckpointError(
            f"{where}: bits = {bits!r}: AWQ checkpoints of 4 bits are read; take a 4-bit one or the unquantised model"
        )
    if version != "gemm":
        raise CheckpointError(
            f"{where}: version = {version!r}: only the 'gemm' layout is read; take a GEMM checkpoint of this model"
        )
    if raw.get("zero_point", True) is not True:
        raise CheckpointError(f"{where}: zero_point = {raw['zero_point']!r}: AWQ's gemm layout always has zero points")
    if type(group) is not int or (group != -1 and not 0 < group <= 1 << 20):
        raise CheckpointError(f"{where}: group_size = {group!r}: must be -1 or a positive integer")
    return Awq(group)
