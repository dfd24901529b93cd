"""A short run of the template fuzzer with every test run."""

from __future__ import annotations

import fuzz_template


def test_mutated_templates() -> None:
    tried, fine = fuzz_template.run(seconds=20, seed=0, limit=1000)
    assert tried > 50
    assert fine > tried // 50  # or the mutations would only exercise the parser
