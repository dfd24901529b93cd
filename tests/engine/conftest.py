"""Backends the engine tests run on."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.assemble import native_isas

from .tiny import WINDOWED, tiny_model

BACKENDS = ["reference"] + (["native"] if native_isas() else [])


def make_backend(name: str, threads: int = 1) -> Any:
    if name == "native":
        from paceline.ops.native import NativeOps

        return NativeOps(n_threads=threads)
    from paceline.ops.reference import ReferenceOps

    return ReferenceOps()


@pytest.fixture(scope="session", params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Any:
    return make_backend(request.param)


@pytest.fixture(scope="session")
def model(ops: Any) -> Any:
    return tiny_model(ops)


@pytest.fixture(scope="session")
def windowed(ops: Any) -> Any:
    return tiny_model(ops, WINDOWED)
