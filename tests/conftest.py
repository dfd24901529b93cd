"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

# before NumPy is imported: many threads on a small or busy machine make its products up to a hundred times slower
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real test data beside the repository; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared test data beside the repository")
    return SHARED
