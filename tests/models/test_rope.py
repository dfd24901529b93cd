"""Rotary frequencies against transformers' own, and the tables' arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paceline.models import rope
from paceline.models.fields import Fields
from paceline.models.rope import RopeSpec

HEAD, CONTEXT = 64, 4096
ORIGINAL = {"original_max_position_embeddings": 1024}
FACTORS = {"short_factor": np.linspace(1, 2, 24).tolist(), "long_factor": np.linspace(1, 40, 24).tolist()}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 4.0, **ORIGINAL},
    "yarn-odd": {"factor": 40.0, "beta_fast": 20, "beta_slow": 2.5, "truncate": False, **ORIGINAL},
    "yarn-mscale": {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2, **ORIGINAL},
    "yarn-given": {"factor": 40.0, "attention_factor": 1.25, **ORIGINAL},
    "longrope": {**FACTORS, **ORIGINAL, "partial_rotary_factor": 0.75},
    "longrope-factor": {**FACTORS, **ORIGINAL, "factor": 16.0, "partial_rotary_factor": 0.75},
}


def read(raw: dict[str, Any]) -> RopeSpec:
    f = Fields(raw)
    spec = rope.read(f, HEAD, CONTEXT)
    f.check()
    return spec


@pytest.mark.parametrize("length", [512, 8192])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_those_of_transformers(case: str, length: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = case.split("-")[0]
    parameters = {"rope_type": kind, "rope_theta": 50000.0, **CASES[case]}
    config = transformers.LlamaConfig(
        hidden_size=HEAD * 2, num_attention_heads=2, max_position_embeddings=CONTEXT, rope_parameters=dict(parameters)
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    ours, our_factor = rope.inv_freq(read({"rope_parameters": parameters}), length)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert our_factor == pytest.approx(factor)


def test_default_and_static_ntk() -> None:
    plain, one = rope.inv_freq(read({"rope_theta": 500.0}), 1)
    np.testing.assert_allclose(plain, 500.0 ** (-np.arange(0, HEAD, 2) / HEAD), rtol=1e-6)
    assert one == 1.0
    ntk, _ = rope.inv_freq(read({"rope_scaling": {"type": "ntk", "factor": 4.0}}), 1)
    base = 10000.0 * 4.0 ** (HEAD / (HEAD - 2))
    np.testing.assert_allclose(ntk, base ** (-np.arange(0, HEAD, 2) / HEAD), rtol=1e-6)
    # the point of the method: the fastest pair keeps its speed, the slowest turns exactly `factor` times slower
    default, _ = rope.inv_freq(read({}), 1)
    assert ntk[0] == default[0]
    assert default[-1] / ntk[-1] == pytest.approx(4.0, rel=1e-5)


def test_dynamic_is_plain_within_the_trained_length() -> None:
    spec = read({"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    default, _ = rope.inv_freq(read({}), CONTEXT)
    np.testing.assert_array_equal(rope.inv_freq(spec, CONTEXT)[0], default)
    assert (rope.inv_freq(spec, CONTEXT * 2)[0][1:] < default[1:]).all()


def test_tables() -> None:
    spec = RopeSpec("yarn", 16, 1e4, 1024, factor=4.0)
    table = rope.tables(spec, 9000)  # more than one block of positions
    freq, factor = rope.inv_freq(spec, 9000)
    assert factor > 1.0
    assert table.dim == 16
    assert table.cos.shape == table.sin.shape == (9000, 8)
    for position in (0, 1, 8191, 8192, 8999):
        angle = (np.float32(position) * freq).astype(np.float64)
        np.testing.assert_allclose(table.cos[position], np.cos(angle) * factor, atol=1e-6)
        np.testing.assert_allclose(table.sin[position], np.sin(angle) * factor, atol=1e-6)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling.factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
        ({"rope_theta": 0}, "rope_theta = 0"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor = 19"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": None}}, "short_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "must exceed low_freq_factor",
        ),
    ],
)
def test_bad_settings_are_named(raw: dict[str, Any], named: str) -> None:
    f = Fields(raw)
    rope.read(f, HEAD, CONTEXT)
    assert len(f.problems) >= 1
    assert named in "\n".join(f.problems)
