"""Layers import downwards only, and nothing heavy comes with the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "src" / "paceline"
BELOW = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "lab": {"core", "lab"},
    "checkpoints": {"core", "ops", "checkpoints"},
    "models": {"core", "ops", "checkpoints", "models"},
    "techniques": {"core", "ops", "checkpoints", "models", "techniques"},
    "server": {"core", "ops", "checkpoints", "models", "techniques", "analysis", "assemble", "llm", "server"},
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] in BELOW)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "paceline" else [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("paceline.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    above = imported(path) - BELOW[layer] - {"_native", "__version__"}
    assert not above, f"{layer} must not import {above}"


def test_importing_the_package_is_light() -> None:
    code = "import paceline, sys; print([m for m in ('numpy', 'torch', 'typer', 'tokenizers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None)
    assert out.stdout.strip() == "[]"


def test_no_torch_in_core_and_no_pickle_anywhere() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not names & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, path
        if path.relative_to(ROOT).parts[0] == "core":
            assert "torch" not in names, path
