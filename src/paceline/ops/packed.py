"""A weight matrix as the kernels read it, and its neutral quantised form.

Tile layout, the same for every ISA and on disk, so that a stored checkpoint is used by mmap. Outputs come in blocks of 16
(N padded up to 16*NB with zeros); the 16 outputs of a block are the lanes of a vector, so each output accumulates in the order of k
alone, whatever the batch:

    f32        data (NB, K,    16)        float32
    f16, bf16  data (NB, K/2,  16, 2)     float16 / bfloat16, K padded to a multiple of 32
    int8       data (NB, K/4,  16, 4)     int8, K padded to a multiple of 64 (and of the group)
    int4       data (NB, K/64, 8, 16, 4)  uint8: in each block of 64 k's, byte (r, n, j) holds code k = 4r+j in its low and
    int4g                                 code k = 32+4r+j in its high nibble; K padded as for int8

All padding (outputs, k's and whole groups of them) is zero bytes in every array.

Quantised values: int8 is `scale * q`, q in [-127, 127]; int4g is `scale * (q - 8)` without mins and `scale * q + min` with,
q in [0, 15]. Scales (and mins) are float16 (NB, G, 16) with one group per `group` k's; per channel (group 0, int8 only)
scales are float32 (NB, 1, 16). int4 is `scale * factor * (q - 8)`: float32 scales (NB, 1, 16) per output, factors int8 (NB, G, 16)
in [-15, 15] per group of 32.

Blocks of 16 outputs are also what `Ops.rescored` computes again from a finer matrix: one is one run of memory.

A linear with quantised weights quantises its activations too: per row and group of k's (per row when group is 0, and for int4) symmetric
int8, scale = max|x| / 127 (1 where the maximum is 0), q = round-half-even(x * (1 / scale)); products are summed exactly in int32 per group,
then scaled and summed in float32 in the order of the groups. f16 weights multiply float32 activations; bf16 weights multiply
activations rounded to bfloat16 (nearest even); both sum in float32. On AMX int8 in groups, heads excepted, multiplies as
bfloat16 too, its weights rounded from their exact values (ties away from zero): an integer sum per group would have to leave
the tiles after each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LANES = 16


@dataclass(frozen=True)
class Packed:
    """A matrix W of shape (n_out, n_in) in one of the formats above; arrays are 64-byte aligned or mmapped."""

    format: str
    shape: tuple[int, int]
    data: np.ndarray
    scales: np.ndarray | None = None
    mins: np.ndarray | None = None
    group: int = 0
    factors: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.data, self.scales, self.mins, self.factors) if a is not None)


@dataclass(frozen=True)
class Codes:
    """Quantised values in plain row-major order, as other tools' checkpoints give them (AWQ, GPTQ, GGUF Q4_0, Q8_0, ...).

    q (n_out, n_in): int8 codes (bits 8) or uint8 codes 0..15 (bits 4); scales, mins (n_out, n_in / group) float16;
    value = scale * q for 8 bits, scale * (q - 8) for 4 bits without mins, scale * q + min with.
    """

    bits: int
    q: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None
    group: int
