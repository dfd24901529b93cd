"""Sizes and durations as people write them."""

from __future__ import annotations

import math
import re

from paceline.core.errors import ConfigError

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*(k|m|g|t)?(i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*(ms|s|m|h|d)?", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def size(text: str | None, name: str) -> int | None:
    """Bytes of '2GiB', '512m' or a plain number. Raises ConfigError."""
    if text is None:
        return None
    m = _SIZE.fullmatch(text.strip())
    if m is None:
        raise ConfigError(f"{name} = {text!r}: must be a size such as 2GiB or 512MiB")
    return int(float(m[1]) * 1024 ** (" kmgt".index((m[2] or " ").lower())))


def seconds(text: str, name: str) -> float:
    """Seconds of '30s', '5m', '12h', '90d', '250ms' or a plain number. Raises ConfigError."""
    m = _DURATION.fullmatch(text.strip())
    value = float(m[1]) * _SECONDS[(m[2] or "s").lower()] if m else math.nan
    if math.isnan(value):
        raise ConfigError(f"{name} = {text!r}: must be a duration such as 30s, 5m, 12h or 90d")
    return value
