"""GPTQ checkpoints: qweight int32 (n_in * bits / 32, n_out), qzeros int32 (n_groups, n_out * bits / 32), scales
(n_groups, n_out), g_idx int32 (n_in,): the group of each input.

Words hold neighbouring inputs (qweight) or outputs (qzeros) from their low end; value = scale * (q - zero). Files of
the first format version store zero - 1 (modulo 2^bits), "gptq_v2" stores zero. (arXiv:2210.17323; layout of AutoGPTQ
and GPTQModel.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.checkpoints.grouped import check_parts, check_scales, dequantise, to_codes, unpack
from paceline.core.errors import CheckpointError
from paceline.ops.packed import Codes


@dataclass(frozen=True)
class Gptq:
    """How the folder's quantised matrices are stored; group -1 means one group per row."""

    bits: int
    group: int
    zero_offset: int  # added to a stored zero point
    name = "GPTQ"
    parts = ("qweight", "qzeros", "scales")
    optional_parts = ("g_idx",)

    def shape(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[int, int]:
        """(n_out, n_in) from the parts' shapes, which must agree."""
        if len(shapes["qweight"]) != 2:
            raise CheckpointError(
                f"{where}.qweight: shape {shapes['qweight']} must be (n_in * {self.bits} / 32, n_out)"
            )
        per_word = 32 // self.bits
        n_in, n_out = shapes["qweight"][0] * per_word, shapes["qweight"][1]
        n_groups = 1 if self.group == -1 else -(-n_in // self.group)
        expected: dict[str, tuple[int, ...]] = {
            "qzeros": (n_groups, -(-n_out // per_word)),
            "scales": (n_groups, n_out),
        }
        if "g_idx" in shapes:
            expected["g_idx"] = (n_in,)
        check_parts(where, dict(shapes), expected)
        return n_out, n_in

    def read(self, parts: Mapping[str, np.ndarray], where: str, notes: list[str]) -> Codes | np.ndarray:
        words = parts["qweight"]
        # unpack works along columns; the inputs of qweight run along rows
        q = np.ascontiguousarray(unpack(np.ascontiguousarray(words.T), self.bits).T)
        n_in, n_out = q.shape
        scales = check_scales(where, parts["scales"])
        top = (1 << self.bits) - 1
        zeros = (unpack(parts["qzeros"], self.bits)[:, :n_out].astype(np.int16) + self.zero_offset) & top
        group = n_in if self.group == -1 else self.group
        plain = np.arange(n_in) // group
        g_idx = parts.get("g_idx")
        if g_idx is not None and not np.array_equal(g_idx, plain):
            if g_idx.min(initial=0) < 0 or g_idx.max(initial=0) >= scales.shape[0]:
                raise CheckpointError(
                    f"{where}.g_idx: names a group outside 0..{scales.shape[0] - 1}; the checkpoint is damaged"
                )
            _tell(
                notes,
                "this GPTQ checkpoint orders its groups by activation (desc_act): its matrices are read as float16",
            )
            return dequantise(q, zeros.astype(np.uint8), scales, g_idx)
        out = to_codes(q, zeros.astype(np.uint8), scales, self.bits, group)
        if isinstance(out, np.ndarray):
            _tell(
                notes,
                "some of this GPTQ checkpoint's matrices have no equal in our int8 or int4: they are read as float16",
            )
        return out


def _tell(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


def options(raw: Mapping[str, Any], where: str) -> Gptq:
    """From `quantization_config` or quantize_config.json. Raises CheckpointError for what is not covered, with the
    reason.
    """
    bits, group = raw.get("bits"), raw.get("group_size", 128)
    form = raw.get("checkpoint_format", "gptq")
    if bits not in (4, 8):
        raise CheckpointError(
            f"{where}: bits = {bits!r}: GPTQ checkpoints of 4 and 8 bits are read (2 and 3 bits straddle words "
            "and have no kernel here); "
            "take a 4-bit one or the unquantised model"
        )
    if type(group) is not int or (group != -1 and not 0 < group <= 1 << 20):
        raise CheckpointError(f"{where}: group_size = {group!r}: must be -1 or a positive integer")
    if form not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        raise CheckpointError(
            f"{where}: checkpoint_format = {form!r}: 'gptq' and 'gptq_v2' are read; take a checkpoint in one of these"
        )
    if raw.get("dynamic"):
        raise CheckpointError(
            f"{where}: dynamic: options per module are not supported; take a uniformly quantised checkpoint"
        )
    return Gptq(int(bits), group, 0 if form == "gptq_v2" else 1)
