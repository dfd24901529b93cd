"""AWQ and GPTQ checkpoints, packed by an independent packer, read as codes and compared value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_builders import write_folder

from paceline.checkpoints import open_checkpoint
from paceline.core.errors import CheckpointError
from paceline.ops.packed import Codes

STEM = "model.layers.0.mlp.down_proj"
NAME = STEM + ".weight"
N_IN, N_OUT = 256, 48
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # field i of a word holds this one of its eight columns


def words(fields: list[int], bits: int) -> int:
    """One signed 32-bit word, first field lowest."""
    total = sum(int(f) << (bits * i) for i, f in enumerate(fields))
    return total - (1 << 32) if total >= 1 << 31 else total


def pack_columns(a: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """(r, c) -> int32 (r, c * bits / 32), word by word."""
    n = 32 // bits
    order = order or list(range(n))
    a = np.pad(a, ((0, 0), (0, -a.shape[1] % n)))
    rows = [[words([row[w + order[i]] for i in range(n)], bits) for w in range(0, len(row), n)] for row in a]
    return np.array(rows, np.int32)


def problem(bits: int, n_groups: int, *, symmetric: bool, seed: int = 0, low: int = 0) -> tuple[np.ndarray, ...]:
    """q (n_in, n_out), zeros and scales (n_groups, n_out)."""
    rng = np.random.default_rng(seed)
    q = rng.integers(low, 1 << bits, (N_IN, N_OUT))
    zeros = np.full((n_groups, N_OUT), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (n_groups, N_OUT))
    return q, zeros, (rng.random((n_groups, N_OUT)) + 0.1).astype(np.float16)


def expected(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n_out, n_in) float64"""
    return ((q - zeros[groups]) * scales[groups].astype(np.float64)).T


def values(t: Any) -> np.ndarray:
    """What `read` gave, as float64."""
    if isinstance(t, np.ndarray):
        return t.astype(np.float64)
    assert isinstance(t, Codes)
    n_out, n_in = t.q.shape
    assert t.q.dtype == (np.uint8 if t.bits == 4 else np.int8)
    assert t.scales.dtype == np.float16
    assert t.scales.shape == (n_out, n_in // t.group)
    wide = np.repeat(t.scales.astype(np.float64), t.group, axis=1)
    if t.mins is not None:
        assert t.mins.dtype == np.float16
        return wide * t.q + np.repeat(t.mins.astype(np.float64), t.group, axis=1)
    return wide * (t.q.astype(np.float64) - (8 if t.bits == 4 else 0))


def close(t: Any, wanted: np.ndarray) -> None:
    """Equal, but for the rounding of -scale * zero, or of the value itself, to float16."""
    exact = isinstance(t, Codes) and t.mins is None
    np.testing.assert_allclose(values(t), wanted, rtol=0, atol=0 if exact else np.abs(wanted).max() * 2**-10)


def awq_folder(path: Path, group: int, *, symmetric: bool = False, **changes: Any) -> tuple[Path, np.ndarray]:
    g = N_IN if group == -1 else group
    q, zeros, scales = problem(4, N_IN // g, symmetric=symmetric)
    arrays = {
        f"{STEM}.qweight": pack_columns(q, 4, AWQ_COLUMNS),
        f"{STEM}.qzeros": pack_columns(zeros, 4, AWQ_COLUMNS),
        f"{STEM}.scales": scales,
        "model.norm.weight": np.ones(4, np.float16),
    }
    for name, value in changes.pop("arrays", {}).items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value
    qc = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True, **changes}
    qc["modules_to_not_convert"] = ["lm_head"]
    folder = write_folder(path, {"model_type": "llama", "quantization_config": qc}, arrays)
    return folder, expected(q, zeros, scales, np.arange(N_IN) // g)


def gptq_folder(
    path: Path,
    group: int,
    bits: int = 4,
    *,
    symmetric: bool = False,
    v2: bool = False,
    g_idx: Any = "plain",
    low: int = 0,
    **changes: Any,
) -> tuple[Path, np.ndarray]:
    g = N_IN if group == -1 else group
    q, zeros, scales = problem(bits, -(-N_IN // g), symmetric=symmetric, low=low)
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    index = np.arange(N_IN) // g if isinstance(g_idx, str) else g_idx
    arrays = {
        f"{STEM}.qweight": np.ascontiguousarray(pack_columns(q.T, bits).T),
        f"{STEM}.qzeros": pack_columns(stored, bits),
        f"{STEM}.scales": scales,
    }
    if index is not None:
        arrays[f"{STEM}.g_idx"] = index.astype(np.int32)
    for name, value in changes.pop("arrays", {}).items():
        arrays[name] = value
    qc = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": symmetric, **changes}
    if v2:
        qc["checkpoint_format"] = "gptq_v2"
    folder = write_folder(path, {"model_type": "llama", "quantization_config": qc}, arrays)
    return folder, expected(q, zeros, scales, np.arange(N_IN) // g if index is None else index)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_awq(tmp_path: Path, group: int, symmetric: bool) -> None:
    folder, wanted = awq_folder(tmp_path / "m", group, symmetric=symmetric)
    c = open_checkpoint(folder)
    info = c.tensors()
    assert set(info) == {NAME, "model.norm.weight"}
    assert (info[NAME].shape, info[NAME].dtype) == ((N_OUT, N_IN), "awq-int4")
    t = c.read(NAME)
    assert isinstance(t, Codes)
    assert (t.mins is None) == symmetric
    assert t.group == {32: 32, 64: 64}.get(group, 128)
    close(t, wanted)
    assert c.read("model.norm.weight").dtype == np.float16


def test_awq_group_that_no_kernel_takes_is_dequantised(tmp_path: Path) -> None:
    folder, wanted = awq_folder(tmp_path / "m", 16)
    t = open_checkpoint(folder).read(NAME)
    assert isinstance(t, np.ndarray)
    assert t.dtype == np.float16
    close(t, wanted)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_gptq_4_bits(tmp_path: Path, group: int, symmetric: bool, v2: bool) -> None:
    folder, wanted = gptq_folder(tmp_path / "m", group, symmetric=symmetric, v2=v2)
    c = open_checkpoint(folder)
    t = c.read(NAME)
    assert c.tensors()[NAME].shape == (N_OUT, N_IN)
    assert isinstance(t, Codes)
    assert (t.mins is None) == symmetric
    close(t, wanted)
    assert c.notes == []


def test_gptq_without_g_idx(tmp_path: Path) -> None:
    folder, wanted = gptq_folder(tmp_path / "m", 64, g_idx=None)
    close(open_checkpoint(folder).read(NAME), wanted)


def test_gptq_8_bits(tmp_path: Path) -> None:
    folder, wanted = gptq_folder(tmp_path / "codes", 64, 8, symmetric=True, low=1)
    t = open_checkpoint(folder).read(NAME)
    assert isinstance(t, Codes)
    assert (t.bits, t.mins, t.q.min()) == (8, None, -127)
    close(t, wanted)
    for name, options in {"-128": {"symmetric": True}, "zeros": {"symmetric": False}}.items():
        folder, wanted = gptq_folder(tmp_path / name, 64, 8, **options)
        c = open_checkpoint(folder)
        t = c.read(NAME)
        assert isinstance(t, np.ndarray)
        close(t, wanted)
        assert "float16" in c.notes[0]


def test_gptq_desc_act(tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(np.arange(N_IN) // 64)
    folder, wanted = gptq_folder(tmp_path / "m", 64, g_idx=order, desc_act=True)
    c = open_checkpoint(folder)
    t = c.read(NAME)
    assert isinstance(t, np.ndarray)
    assert t.dtype == np.float16
    close(t, wanted)
    assert "desc_act" in c.notes[0]
    c.read(NAME)
    assert len(c.notes) == 1


def test_older_gptq_folders_keep_their_options_apart(tmp_path: Path) -> None:
    folder, wanted = gptq_folder(tmp_path / "m", 64)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="no quantization_config"):
        open_checkpoint(folder)
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 64, "desc_act": false, "sym": false}')
    close(open_checkpoint(folder).read(NAME), wanted)


def refused(folder: Path, *names: str) -> None:
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(folder).read(NAME)
    for name in names:
        assert name in str(e.value), f"{name!r} not in {e.value}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 3),
        ("bits", None),
        ("bits", "4"),
        ("version", "gemv"),
        ("version", "exllama"),
        ("zero_point", False),
        ("group_size", 0),
        ("group_size", -2),
        ("group_size", "x"),
        ("group_size", 1.5),
        ("group_size", True),
    ],
)
def test_awq_options_refused(tmp_path: Path, field: str, value: Any) -> None:
    refused(awq_folder(tmp_path / "m", 64, **{field: value})[0], field, "quantization_config")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 3),
        ("bits", 2),
        ("bits", None),
        ("group_size", 0),
        ("checkpoint_format", "marlin"),
        ("checkpoint_format", 5),
        ("is_marlin_format", True),
        ("dynamic", {"-:x": {}}),
    ],
)
def test_gptq_options_refused(tmp_path: Path, field: str, value: Any) -> None:
    word = "checkpoint_format" if field == "is_marlin_format" else field
    folder, _ = gptq_folder(tmp_path / "m", 64, **({field: value} if field not in ("bits", "group_size") else {}))
    if field in ("bits", "group_size"):
        text = (folder / "config.json").read_text()
        old = '"bits": 4' if field == "bits" else '"group_size": 64'
        new = "null" if value is None else str(value)
        (folder / "config.json").write_text(text.replace(old, f'"{field}": {new}'))
    refused(folder, word)


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    refused(awq_folder(tmp_path / "a", 64, arrays={f"{STEM}.qzeros": None})[0], STEM, "qzeros", "incomplete")
    refused(
        awq_folder(tmp_path / "b", 64, arrays={f"{STEM}.scales": np.ones((3, N_OUT), np.float16)})[0],
        f"{STEM}.scales",
        "(3, 48)",
    )
    folder = awq_folder(tmp_path / "c", 64)[0]
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("64", "48"))
    refused(folder, "group_size = 48", "256")
    refused(awq_folder(tmp_path / "d", 64, arrays={f"{STEM}.qweight": np.ones(8, np.int32)})[0], f"{STEM}.qweight")
    refused(awq_folder(tmp_path / "e", 64, arrays={f"{STEM}.qweight": np.ones((N_IN, 6), np.float32)})[0], "F32", "I32")
    refused(awq_folder(tmp_path / "f", 64, arrays={NAME: np.ones((2, 2), np.float32)})[0], NAME, "twice")
    refused(gptq_folder(tmp_path / "g", 64, arrays={f"{STEM}.g_idx": np.zeros(5, np.int32)})[0], "g_idx", "(5,)")
    refused(
        gptq_folder(tmp_path / "h", 64, g_idx=np.full(N_IN, 3), arrays={f"{STEM}.g_idx": np.full(N_IN, 9, np.int32)})[
            0
        ],
        "g_idx",
        "0..3",
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_scales(tmp_path: Path, bad: float) -> None:
    scales = np.ones((4, N_OUT), np.float16)
    scales[1, 3] = bad
    refused(awq_folder(tmp_path / "m", 64, arrays={f"{STEM}.scales": scales})[0], STEM, "scales")


def test_config_without_quantised_tensors(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}}
    refused(write_folder(tmp_path / "m", config, {"a": np.ones(2, np.float32)}), "AWQ", ".qweight")
