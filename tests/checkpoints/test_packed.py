"""Our own quantised folders: what is written is what is mapped, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.checkpoints import files, open_checkpoint
from paceline.checkpoints.packed import PARTS, TABLE, layout, save_packed
from paceline.core.errors import CheckpointError
from paceline.ops import formats
from paceline.ops.packed import Packed

CONFIG = {"model_type": "llama", "hidden_size": 64}


def packed(form: str, shape: tuple[int, int], group: int = 0, *, mins: bool = False, seed: int = 0) -> Packed:
    """Random bytes in the layout of the format."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, (dims, dtype) in layout(form, shape, group, mins).items():
        n = int(np.prod(dims)) * dtype.itemsize
        arrays[part] = rng.integers(0, 255, n, dtype=np.uint8).view(dtype).reshape(dims)
    return Packed(form, shape, arrays["data"], arrays.get("scales"), arrays.get("mins"), group, arrays.get("factors"))


def model() -> dict[str, Any]:
    return {
        "embed": packed("bf16", (50, 70)),
        "norm": np.linspace(0, 1, 13, dtype=np.float32),
        "a": packed("int4g", (33, 128), 32),
        "b": packed("int4g", (16, 192), 128, mins=True),
        "b2": packed("int4", (40, 100), 32),
        "c": packed("int8", (20, 100)),
        "d": packed("int8", (20, 100), 64),
        "e": packed("f16", (5, 7)),
        "f": packed("f32", (5, 7)),
        "empty": np.zeros((0,), np.float32),
    }


def same(a: Any, b: Any) -> None:
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        return
    assert (a.format, a.shape, a.group) == (b.format, b.shape, b.group)
    for part in PARTS:
        x, y = getattr(a, part), getattr(b, part)
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def test_round_trip(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "awq"}}
    save_packed(tmp_path / "q", config, model().items(), form="mixed", generation={"eos_token_id": 2})
    c = open_checkpoint(tmp_path / "q")
    assert c.format == "packed"
    assert c.config == {**CONFIG, "paceline": {"version": 2, "format": "mixed", "groups": [32, 64, 128]}}
    assert c.generation == {"eos_token_id": 2}
    assert set(c.tensors()) == set(model())
    for name, tensor in model().items():
        same(c.read(name), tensor)
        info = c.tensors()[name]
        assert info.shape == tensor.shape
        assert info.nbytes == tensor.nbytes
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_arrays_are_mapped_and_aligned(tmp_path: Path) -> None:
    save_packed(tmp_path / "q", CONFIG, model().items(), form="mixed")
    c = open_checkpoint(tmp_path / "q")
    for name in model():
        tensor = c.read(name)
        arrays = [tensor] if isinstance(tensor, np.ndarray) else [getattr(tensor, p) for p in PARTS]
        for a in arrays:
            if a is not None and a.size:
                assert a.ctypes.data % 64 == 0
                assert not a.flags.owndata
                assert not a.flags.writeable


def test_the_reference_library_reads_the_shards(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors", reason="needs the safetensors package")
    save_packed(
        tmp_path / "q", CONFIG, [("a", packed("int8", (20, 100), 64)), ("v", np.ones(3, np.float32))], form="int8"
    )
    with reference.safe_open(tmp_path / "q" / "paceline-00001-of-00001.safetensors", "np") as f:
        assert {k for k in f.keys() if not k.startswith("__pad__")} == {"a.data", "a.scales", "v"}  # noqa: SIM118
        assert f.get_tensor("v").tolist() == [1, 1, 1]


def test_many_shards(tmp_path: Path) -> None:
    tensors = [(f"layer.{i}", packed("int8", (16, 64), seed=i)) for i in range(40)]
    save_packed(tmp_path / "by_size", CONFIG, tensors, form="int8", max_shard=5000)
    assert len(list((tmp_path / "by_size").glob("*.safetensors"))) == 10
    c = open_checkpoint(tmp_path / "by_size")
    for name, tensor in tensors:
        same(c.read(name), tensor)
    named = [(f"layer.{'x' * 3000}.{i}", np.full(3, i, np.float32)) for i in range(40)]  # the header fills first
    save_packed(tmp_path / "by_names", CONFIG, named, form="f32")
    assert len(list((tmp_path / "by_names").glob("*.safetensors"))) == 3
    c = open_checkpoint(tmp_path / "by_names")
    for name, tensor in named:
        same(c.read(name), tensor)


def test_it_streams(tmp_path: Path) -> None:
    """Never more than one tensor is alive: each is freed before the next is asked for."""
    alive: list[Any] = []

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for i in range(5):
            a = np.full(1000, i, np.float32)
            alive.append(weakref.ref(a))
            yield f"v{i}", a
            del a
            if i:
                assert alive[i - 1]() is None

    save_packed(tmp_path / "q", CONFIG, tensors(), form="f32")
    assert len(open_checkpoint(tmp_path / "q").tensors()) == 5


def test_tokenizer_files_and_callback(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("x")
    (source / "secret.txt").write_text("not copied")
    save_packed(
        tmp_path / "q",
        CONFIG,
        [("v", np.ones(1, np.float32))],
        form="f32",
        source=source,
        write_tokenizer=lambda folder: (folder / "extra.json").write_text("[]") and None,
    )
    names = {p.name for p in (tmp_path / "q").iterdir()}
    assert names == {
        "tokenizer.json",
        "chat_template.jinja",
        "extra.json",
        "config.json",
        TABLE,
        "paceline-00001-of-00001.safetensors",
    }


def nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", np.ones(5000, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_packed(tmp_path / "q", CONFIG, tensors(), form="f32", max_shard=100)
    nothing_left(tmp_path)
    with pytest.raises(CheckpointError, match="twice"):
        save_packed(tmp_path / "q", CONFIG, [("a", np.ones(1, np.float32))] * 2, form="f32")
    nothing_left(tmp_path)
    with pytest.raises(CheckpointError, match="nothing to write"):
        save_packed(tmp_path / "q", CONFIG, [], form="f32")
    nothing_left(tmp_path)
    with pytest.raises(CheckpointError, match="'nf4' is unknown"):
        save_packed(tmp_path / "q", CONFIG, [("w", Packed("nf4", (1, 1), np.zeros(1)))], form="nf4")
    nothing_left(tmp_path)


@pytest.mark.parametrize("fails", ["write", "fsync", "callback", "mkdir"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options: dict[str, Any] = {}
    if fails == "write":
        opened = files.AtomicFile.__init__

        def limited(self: files.AtomicFile, path: Path) -> None:
            opened(self, path)
            inner = self._file
            self._file = SimpleNamespace(write=full, close=inner.close, flush=inner.flush)  # type: ignore[assignment]

        monkeypatch.setattr(files.AtomicFile, "__init__", limited)
    elif fails == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    elif fails == "callback":
        options["write_tokenizer"] = full
    else:
        monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_packed(tmp_path / "q", CONFIG, model().items(), form="mixed", **options)
    nothing_left(tmp_path)


def test_a_real_limit_on_the_file_size(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="needs POSIX resource limits")
    program = """
import resource, signal, sys, pathlib, numpy as np
from paceline.checkpoints.packed import save_packed
from paceline.core.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
tensors = ((f"v{i}", np.ones(9000, np.float32)) for i in range(9))
try:
    save_packed(pathlib.Path(sys.argv[1]) / "q", {}, tensors, form="f32")
except CheckpointError as e:
    print("refused:", e)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=env, timeout=60
    )
    assert out.stdout.startswith("refused:"), out.stderr
    nothing_left(tmp_path)


def test_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    asked: list[int] = []

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        asked.append(1)
        yield "a", np.ones(1, np.float32)

    with pytest.raises(CheckpointError, match="needs"):
        save_packed(tmp_path / "q", CONFIG, tensors(), form="f32", expected_bytes=2 << 20)
    assert asked == []
    nothing_left(tmp_path)


def test_what_exists_is_replaced_only_when_asked_and_ours(tmp_path: Path) -> None:
    one, two = [("v", np.ones(1, np.float32))], [("v", np.full(1, 2, np.float32))]
    save_packed(tmp_path / "q", CONFIG, one, form="f32")
    with pytest.raises(CheckpointError, match="exists"):
        save_packed(tmp_path / "q", CONFIG, two, form="f32")
    assert np.asarray(open_checkpoint(tmp_path / "q").read("v")) == 1
    save_packed(tmp_path / "q", CONFIG, two, form="f32", overwrite=True)
    assert np.asarray(open_checkpoint(tmp_path / "q").read("v")) == 2
    with pytest.raises(CheckpointError, match="nothing to write"):
        save_packed(tmp_path / "q", CONFIG, [], form="f32", overwrite=True)
    assert np.asarray(open_checkpoint(tmp_path / "q").read("v")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not replaced"):
        save_packed(tmp_path / "mine", CONFIG, two, form="f32", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "void").mkdir()
    save_packed(tmp_path / "void", CONFIG, two, form="f32")


# damage


def damaged(folder: Path, change: Any) -> None:
    table = json.loads((folder / TABLE).read_text())
    change(table)
    (folder / TABLE).write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("a", "format", "int3"),
        ("a", "format", None),
        ("a", "format", 5),
        ("a", "shape", [33]),
        ("a", "shape", [49, 128]),
        ("a", "shape", [33, -1]),
        ("a", "shape", "x"),
        ("a", "shape", [1 << 61, 1 << 61]),
        ("a", "group", 64),
        ("a", "group", -1),
        ("a", "group", 33),
        ("a", "group", 1 << 61),
        ("a", "file", 2),
        ("a", "file", 0),
        ("a", "file", "1"),
        ("norm", "shape", [14]),
        ("norm", "format", "f32"),
        ("c", "group", 64),
        ("e", "format", "bf16"),
    ],
)
def test_a_table_that_contradicts_the_shards(tmp_path: Path, name: str, field: str, value: Any) -> None:
    save_packed(tmp_path / "q", CONFIG, model().items(), form="mixed")
    damaged(tmp_path / "q", lambda t: t["tensors"][name].update({field: value}))
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(tmp_path / "q")
    assert name in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(version=1),
        lambda t: t.update(version=None),
        lambda t: t.update(files=0),
        lambda t: t.update(files=1 << 40),
        lambda t: t.update(files=2),
        lambda t: t.update(tensors=[]),
        lambda t: t["tensors"].update(a=5),
        lambda t: t["tensors"].update(z={"shape": [2], "file": 1}),
    ],
)
def test_a_broken_table(tmp_path: Path, change: Any) -> None:
    save_packed(tmp_path / "q", CONFIG, model().items(), form="mixed")
    damaged(tmp_path / "q", change)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "q")


def test_missing_and_truncated_shards_and_unknown_parameters(tmp_path: Path) -> None:
    save_packed(tmp_path / "q", CONFIG, model().items(), form="mixed")
    shard = tmp_path / "q" / "paceline-00001-of-00001.safetensors"
    with pytest.raises(CheckpointError, match="no parameter 'z'"):
        open_checkpoint(tmp_path / "q").read("z")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path / "q")
    shard.unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        open_checkpoint(tmp_path / "q")


@given(
    st.sampled_from(["f32", "f16", "bf16", "int8", "int4g"]),
    st.integers(1, 100),
    st.integers(1, 300),
    st.sampled_from([0, 32, 64, 128]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_round_trips(
    tmp_path_factory: pytest.TempPathFactory, form: str, n_out: int, n_in: int, group: int, mins: bool
) -> None:
    if form == "int4g" and not group:
        group = 32
    if form in ("f32", "f16", "bf16"):
        group = 0
    mins = mins and form == "int4g"
    tensor = packed(form, (n_out, n_in), group, mins=mins)
    folder = tmp_path_factory.mktemp("p") / "q"
    save_packed(folder, CONFIG, [("w", tensor)], form=form)
    same(open_checkpoint(folder).read("w"), tensor)


def test_a_model_of_many_parameters_opens_at_once(tmp_path: Path) -> None:
    """As many tensors as a 1B model has (16 layers), opened in well under a second whatever their size."""
    tensors = ((f"layers.{i}.w{j}", packed("int4g", (64, 256), 64)) for i in range(16) for j in range(9))
    save_packed(tmp_path / "q", CONFIG, tensors, form="int4g:group=64")
    start = time.process_time()
    c = open_checkpoint(tmp_path / "q")
    for name in c.tensors():
        c.read(name)
    assert time.process_time() - start < 0.5


def test_the_example_in_the_documentation() -> None:
    """The NumPy lines of docs/checkpoint-format.md give the numbers that the format stands for."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "checkpoint-format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    w = np.random.default_rng(0).standard_normal((37, 200)).astype(np.float32)
    for group in (32, 64, 128):
        p = formats.get("int4g").pack(w, group)
        assert p.scales is not None
        names: dict[str, Any] = {"np": np, "data": p.data, "scales": p.scales, "group": group, "n_out": 37, "n_in": 200}
        names |= {"NB": p.data.shape[0], "K": p.data.shape[1] * 64}
        exec(code, names)
        np.testing.assert_array_equal(names["w"], formats.get("int4g").unpack(p))


def test_a_real_matrix_survives(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((70, 300)).astype(np.float32)
    for form in ("f32", "f16", "bf16", "int8", "int4g:group=64", "int4g:group=32,mins"):
        spec = formats.parse(form)
        folder = tmp_path / form.replace(":", "_")
        p = spec.pack(w)
        save_packed(folder, CONFIG, [("w", p)], form=form)
        q = open_checkpoint(folder).read("w")
        assert isinstance(q, Packed)
        np.testing.assert_array_equal(formats.get(spec.name).unpack(q), formats.get(spec.name).unpack(p))
