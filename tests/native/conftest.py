"""Native ops for every instruction set this machine has; all of these tests need the compiled core."""

from __future__ import annotations

import pytest

try:
    from paceline import _native
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    ISAS: list[str] = []
else:
    ISAS = [name for name, problem in _native.instruction_sets() if not problem]


@pytest.fixture(scope="session", params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def ops(isa):
    from paceline.ops.native import NativeOps

    return NativeOps(isa=isa, n_threads=2)


@pytest.fixture(scope="session")
def ops1(isa):
    from paceline.ops.native import NativeOps

    return NativeOps(isa=isa, n_threads=1)
