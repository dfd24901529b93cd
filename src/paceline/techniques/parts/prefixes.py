"""What techniques that build on the prefix index share."""

from __future__ import annotations

from typing import Any


def why_no_prefix(plan: Any) -> str | None:
    """The reason when a plan has no prefix index."""
    if any("prefix" in t.manifest().seams for t in plan.techniques):
        return None
    return "it keeps what a prefix index gives up, and none is on; leave serving/radix on"
