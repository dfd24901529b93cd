"""The safetensors reader and writer: round trips, agreement with the reference library, and every kind of damage."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_builders import safetensors_bytes, tensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.checkpoints import files
from paceline.checkpoints.safetensors import SafetensorsFile, SafetensorsWriter, save_safetensors
from paceline.core.errors import CheckpointError

F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "c": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "d": rng.integers(0, 255, 13, dtype=np.uint8),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3.5, np.float32),
    }


def refused(tmp_path: Path, content: bytes, *words: str) -> str:
    """The file is refused with a message that names it and says `words`."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as e:
        SafetensorsFile(path)
    for word in ("model.safetensors", *words):
        assert word in str(e.value), f"{word!r} not in {e.value}"
    return str(e.value)


@pytest.mark.parametrize("align", [1, 8, 64])
def test_round_trip(tmp_path: Path, align: int) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(path, arrays(), align=align, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert {n for n in file.entries if not n.startswith("__pad__")} == set(arrays())
    for name, a in arrays().items():
        b = file.read(name)
        assert b.dtype == a.dtype
        assert b.shape == a.shape
        assert b.tobytes() == a.tobytes()
        assert (file.entries[name].start) % align == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy", reason="needs the safetensors package")
    plain = {n: a for n, a in arrays().items() if a.dtype != ml_dtypes.bfloat16}
    save_safetensors(tmp_path / "x.safetensors", plain, align=64)
    loaded = reference.load_file(tmp_path / "x.safetensors")
    for name, a in plain.items():
        np.testing.assert_array_equal(loaded[name], a)


def test_we_read_what_the_reference_library_writes(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy", reason="needs the safetensors package")
    plain = {n: a for n, a in arrays().items() if a.dtype != ml_dtypes.bfloat16}
    reference.save_file(plain, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, a in plain.items():
        np.testing.assert_array_equal(file.read(name), a)


def test_views_are_of_the_file_and_read_only(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"a": np.ones((1000, 100), np.float32)}, align=64)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    a = file.read("a")
    assert not a.flags.owndata
    assert not a.flags.writeable
    assert a.ctypes.data % 64 == 0
    file.close()
    assert a.sum() == 100_000  # stays valid
    with pytest.raises(CheckpointError, match="closed"):
        file.read("a")


def test_misaligned_data_is_copied(tmp_path: Path) -> None:
    a = np.arange(4, dtype=np.float32)
    header = {"u": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {**F32_4, "data_offsets": [1, 17]}}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, b"\1" + a.tobytes()))
    b = SafetensorsFile(tmp_path / "x.safetensors").read("a")
    assert b.flags.aligned
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -1])
def test_truncated_at_any_point(tmp_path: Path, keep: int) -> None:
    refused(tmp_path, tensors_bytes(arrays())[:keep])


def test_trailing_bytes(tmp_path: Path) -> None:
    refused(tmp_path, tensors_bytes(arrays()) + b"x", "follow the last tensor")


@pytest.mark.parametrize("length", [(1 << 64) - 1, 1 << 63, 100_000_001, 1000])
def test_absurd_header_length(tmp_path: Path, length: int) -> None:
    refused(tmp_path, safetensors_bytes({"a": F32_4}, bytes(16), length=length), str(length))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b"\xff\xfe",
        b'{"a":}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"{}garbage",
        b'{"a": 1e999}',
    ],
)
def test_header_that_is_no_object(tmp_path: Path, header: bytes) -> None:
    refused(tmp_path, safetensors_bytes(header, bytes(16)))


def test_duplicate_tensor(tmp_path: Path) -> None:
    one = json.dumps(F32_4)
    refused(tmp_path, safetensors_bytes(f'{{"a": {one}, "a": {one}}}'.encode(), bytes(16)), "duplicate", "'a'")


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        (5, "dtype, shape and data_offsets"),
        ({}, "dtype, shape and data_offsets"),
        ({**F32_4, "extra": 1}, "dtype, shape and data_offsets"),
        ({**F32_4, "dtype": "F99"}, "F99"),
        ({**F32_4, "dtype": 7}, "dtype"),
        ({**F32_4, "dtype": ["F32"]}, "dtype"),
        ({**F32_4, "shape": 4}, "shape"),
        ({**F32_4, "shape": [-4]}, "shape"),
        ({**F32_4, "shape": [4.0]}, "shape"),
        ({**F32_4, "shape": [True]}, "shape"),
        ({**F32_4, "shape": ["4"]}, "shape"),
        ({**F32_4, "shape": [1] * 9}, "shape"),
        ({**F32_4, "shape": [5]}, "needs 20 bytes"),
        ({**F32_4, "shape": [1 << 62]}, "shape"),
        ({**F32_4, "shape": [1 << 32, 1 << 32]}, "needs"),
        ({**F32_4, "shape": [1 << 33, 1 << 31, 1]}, "needs"),
        ({**F32_4, "data_offsets": [0]}, "data_offsets"),
        ({**F32_4, "data_offsets": [16, 0]}, "data_offsets"),
        ({**F32_4, "data_offsets": [-16, 0]}, "data_offsets"),
        ({**F32_4, "data_offsets": [0.0, 16.0]}, "data_offsets"),
        ({**F32_4, "data_offsets": [0, 1 << 70]}, "data_offsets"),
        ({**F32_4, "data_offsets": [16, 32]}, "hole"),
        ({**F32_4, "shape": [400], "data_offsets": [0, 1600]}, "truncated"),
    ],
)
def test_bad_entry(tmp_path: Path, entry: Any, word: str) -> None:
    refused(tmp_path, safetensors_bytes({"some.weight": entry}, bytes(16)), "some.weight", word)


def test_overlap_and_hole(tmp_path: Path) -> None:
    b = {**F32_4, "data_offsets": [8, 24]}
    refused(tmp_path, safetensors_bytes({"a": F32_4, "b": b}, bytes(24)), "overlaps", "'b'")
    b = {**F32_4, "data_offsets": [20, 36]}
    refused(tmp_path, safetensors_bytes({"a": F32_4, "b": b}, bytes(36)), "hole", "'b'")


@pytest.mark.parametrize("metadata", [5, {"a": 1}, [], {"a": {}}])
def test_bad_metadata(tmp_path: Path, metadata: Any) -> None:
    refused(tmp_path, safetensors_bytes({"__metadata__": metadata, "a": F32_4}, bytes(16)), "__metadata__")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_unsupported_dtype_says_so_on_reading(tmp_path: Path, dtype: str) -> None:
    header = {"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, bytes(4)))
    with pytest.raises(CheckpointError, match=rf"'w'.*{dtype}.*BF16"):
        SafetensorsFile(tmp_path / "x.safetensors").read("w")


def test_missing_folder_pipe_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="regular"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="regular"):
        SafetensorsFile(tmp_path / "pipe.safetensors")


def test_a_file_that_shrinks_while_open_is_refused_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"a": np.ones(100_000, np.float32)})
    file = SafetensorsFile(path)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match="truncated while in use"):
        file.read("a")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda x: (
            st.lists(x, max_size=4)
            | st.dictionaries(
                st.sampled_from(["a", "b", "__metadata__", "dtype", "shape", "data_offsets"]), x, max_size=4
            )
        ),
    ),
    st.binary(max_size=32),
)
@settings(max_examples=150, deadline=None)
def test_any_json_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, data))
    try:
        SafetensorsFile(path)
    except CheckpointError:
        return
    assert isinstance(header, dict)


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "BOOL"]),
        "shape": st.lists(st.integers(0, 6) | st.just(1 << 40), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)


@given(st.dictionaries(st.sampled_from("abc"), entries, max_size=3), st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_what_opens_is_inside_the_file(tmp_path_factory: pytest.TempPathFactory, header: Any, n_data: int) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(n_data)))
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name, entry in header.items():
        if entry["dtype"] != "F4":
            assert file.read(name).shape == tuple(entry["shape"])


def test_opening_many_tensors_is_fast(tmp_path: Path) -> None:
    n = 30_000
    header = {f"model.layers.{i}.weight": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(n)}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, bytes(n)))
    start = time.process_time()
    SafetensorsFile(tmp_path / "x.safetensors")
    assert time.process_time() - start < 5


# writing


class _Full:
    """A file on a disk with room for `n` bytes."""

    def __init__(self, inner: Any, n: int):
        self.inner, self.left = inner, n

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= size
        return self.inner.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    init = files.AtomicFile.__init__

    def limited(self: files.AtomicFile, path: Path) -> None:
        init(self, path)
        self._file = _Full(self._file, room)  # type: ignore[assignment]

    monkeypatch.setattr(files.AtomicFile, "__init__", limited)
    with pytest.raises(CheckpointError, match=r"No space left.*nothing was left behind"):
        save_safetensors(tmp_path / "x.safetensors", {"a": np.ones(2000, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_a_real_limit_on_the_file_size(tmp_path: Path) -> None:
    """The kernel itself refuses the write (RLIMIT_FSIZE), in a process of its own."""
    pytest.importorskip("resource", reason="needs POSIX resource limits")
    program = """
import resource, signal, sys, pathlib, numpy as np
from paceline.checkpoints.safetensors import save_safetensors
from paceline.core.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    save_safetensors(pathlib.Path(sys.argv[1]) / "x.safetensors", {"a": np.ones(100000, np.float32)})
except CheckpointError as e:
    print("refused:", e)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=env, timeout=60
    )
    assert out.stdout.startswith("refused:"), out.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="free"):
        save_safetensors(tmp_path / "x.safetensors", {"a": np.ones(2000, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"a": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match="complex"):
        save_safetensors(path, {"a": np.ones(3, np.float32), "z": np.ones(3, np.complex128)})
    assert SafetensorsFile(path).read("a").tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_streaming_writer_refuses_duplicates_and_a_full_header(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x.safetensors", room=1000)
    writer.add("a", np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="twice"):
        writer.add("a", np.ones(3, np.float32))
    writer = SafetensorsWriter(tmp_path / "x.safetensors", room=300)
    assert not writer.fits({"n" * 200: np.ones(1)})
    with pytest.raises(CheckpointError, match="room"):
        writer.add("n" * 200, np.ones(1))
    assert list(tmp_path.iterdir()) == []


@given(
    st.dictionaries(st.text(min_size=1, max_size=30), st.lists(st.integers(0, 5), max_size=4), max_size=12),
    st.sampled_from([1, 8, 64]),
)
@settings(max_examples=60, deadline=None)
def test_any_names_and_shapes_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], align: int
) -> None:
    shapes.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    given_arrays = {n: np.full(s, i, np.float32) for i, (n, s) in enumerate(shapes.items())}
    if any(0xD800 <= ord(c) < 0xE000 for n in shapes for c in n):
        return
    save_safetensors(path, given_arrays, align=align)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % align == 0
    file = SafetensorsFile(path)
    for name, a in given_arrays.items():
        np.testing.assert_array_equal(file.read(name), a)
