"""Random numbers that depend on (seed, position) alone: a replayed, preempted or batched sequence draws the same.

SplitMix64 (Steele, Lea, Flood 2014) over a mix of seed, position and stream.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A float in [0, 1) with 53 random bits, a pure function of its arguments."""
    z = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    z = _mix((z + (position + 1) * 0x9E3779B97F4A7C15) & _MASK)
    z = _mix((z ^ (stream * 0xD1342543DE82EF95)) & _MASK)
    return (z >> 11) * 2.0**-53


def child_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request; completion 0 keeps the request's own."""
    return seed & _MASK if index == 0 else _mix((seed + index * 0xA0761D6478BD642F) & _MASK)
