"""The routes. Each file of this folder is one API (or family of routes) with a list `ROUTES`; adding a file adds its routes."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from paceline.server.api.base import Call, Route

__all__ = ["Call", "Route", "routes"]


@cache
def routes() -> tuple[Route, ...]:
    """Every route, found by walking the folder."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return tuple(route for module in modules for route in getattr(module, "ROUTES", ()))
