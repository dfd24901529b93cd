"""Paged attention of every instruction set against float64, and its promise of the same bits however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
from paged import DTYPES, Cache, Text, exact, read, stored, text

from paceline.core.specs import AttnSpec


def spec(n_heads: int, n_kv: int, dim: int, window: int | None = None, softcap: float | None = None) -> AttnSpec:
    return AttnSpec(n_heads, n_kv, dim, dim**-0.5, window, softcap)


PAIRS = ("avx512_bf16", "amx", "amx_emulated")  # where bfloat16 and int8 pools are multiplied by bfloat16 instructions


def check(ops, got: np.ndarray, t: Text, s: AttnSpec, dtype: str, rows=None, seen=None) -> None:
    """Against float64. Float32 paths: 4e-6. On pairs of bfloat16 weights w are rounded, by at most u = 2^-8 each, and their sum is of
    the rounded ones, so the result is off by at most u / (1 - u) sum w |v - out| more; the same rounding of the queries is in the
    reference."""
    pairs = dtype in ("bfloat16", "int8") and ops.isa in PAIRS
    want, spread = exact(t, s, dtype, rows, seen, pairs)
    limit = 4e-6 + pairs * spread * 2**-8 / (1 - 2**-8)
    over = abs(got - want) - limit
    assert np.isfinite(got).all()
    assert (over <= 0).all(), f"{over.max()} beyond {limit.min()} .. {limit.max()}"


CASES = [
    (spec(4, 4, 8), 1, "float32"),
    (spec(4, 2, 16), 2, "bfloat16"),
    (spec(9, 3, 64), 16, "bfloat16"),
    (spec(4, 1, 80), 32, "float16"),
    (spec(2, 2, 128, window=20), 8, "float32"),
    (spec(8, 2, 32, softcap=2.0), 256, "float16"),
    (spec(4, 2, 96, window=7, softcap=5.0), 4, "bfloat16"),
    (spec(2, 1, 256), 64, "bfloat16"),
    (spec(8, 1, 33, window=50), 5, "bfloat16"),  # an odd dimension, and windows that begin and end within pairs of keys
    (spec(3, 3, 7), 3, "float16"),  # an odd dimension, and pages that are no power of two
    (spec(4, 2, 64), 16, "int8"),
    (spec(12, 2, 33, window=70), 5, "int8"),
    (spec(6, 1, 80, softcap=3.0), 64, "int8"),
    (spec(130, 1, 8), 16, "float32"),  # more query heads than a unit of work has pairs
]


@pytest.mark.parametrize(("s", "page_size", "dtype"), CASES, ids=str)
def test_against_float64(ops, s, page_size, dtype):
    """Ragged prefill, then single rows, of sequences that start at different times."""
    cache, texts = Cache(s, 600, [page_size], dtype), [text(i, n, s) for i, n in enumerate((1, 33, 130, 64))]
    got = [[] for _ in texts]
    at = [0] * len(texts)
    for sizes in ((1, 20, 100, 0), (0, 1, 1, 63), (0, 12, 29, 1)):
        parts = [(i, texts[i][at[i] : at[i] + n]) for i, n in enumerate(sizes) if n]
        for (i, t), rows in zip(parts, cache.step(ops, parts), strict=True):
            got[i].append(rows)
            at[i] += len(t)
    for t, rows in zip(texts, got, strict=True):
        check(ops, np.concatenate(rows), t, s, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_rounded_to_nearest_even(ops, dtype):
    s = spec(2, 2, 24)
    cache, t = Cache(s, 64, dtype=dtype), text(5, 40, s)
    t.k[3, :6] = [1 + 2**-8, 1 + 3 * 2**-8, 1e-6, 65504, 1e-40, -0.0]  # ties in bfloat16, subnormals
    cache.step(ops, [(0, t)])
    for pool, x in ((cache.k[0], t.k), (cache.v[0], t.v)):
        want = stored(x.reshape(40, 2, 24), dtype)
        for i in range(40):
            page, at = divmod(cache.slot(0, 0, i), 16)
            assert pool[page, :, at].tobytes() == want[i].tobytes()
    k = read(cache.k[0], dtype)
    assert np.isnan(k).sum() == k.size - t.k.size  # and nothing else was touched


def walk(
    ops,
    t: Text,
    s: AttnSpec,
    chunks: list[int],
    page_size: int = 16,
    dtype: str = "bfloat16",
    seed: int = 0,
    others: int = 0,
    heads=None,
) -> np.ndarray:
    """The text in chunks, in each step beside `others` unrelated sequences."""
    n_groups = len(heads) if heads else 1
    cache = Cache(s, (others + 1) * (len(t) + 40), [page_size * 2**g for g in range(n_groups)], dtype, heads, seed)
    out, at = [], 0
    for step, n in enumerate(chunks):
        parts = [(i, text(1000 * i + step, 1 + (step + i) % 5, s)) for i in range(1, others + 1)]
        parts.insert(others // 2, (0, t[at : at + n]))
        out.append(cache.step(ops, parts)[others // 2])
        at += n
    assert at == len(t)
    return np.concatenate(out)


def cut(seed: int, n: int) -> list[int]:
    rng, sizes = np.random.default_rng(seed), []
    while sum(sizes) < n:
        sizes.append(min(n - sum(sizes), int(rng.choice([1, 2, 7, 30, 64, 100, 333, 700]))))
    return sizes


@pytest.mark.parametrize("s", [spec(6, 2, 16), spec(6, 2, 16, window=150), spec(3, 1, 40, softcap=3.0)], ids=str)
def test_same_bits(ops, ops1, isa, s):
    """Alone or in a batch, in one piece or in chunks, whatever the pages and threads; crosses a boundary of 1024 indices."""
    t = text(1, 1100 if isa != "generic" else 1030, s)
    whole = walk(ops1, t, s, [len(t)])
    assert np.isfinite(whole).all()
    check(ops, whole[::97], t, s, "bfloat16", range(0, len(t), 97))
    for seed in range(3) if isa != "generic" else [1]:
        for o in (ops, ops1):
            got = walk(o, t, s, cut(seed, len(t)), page_size=[1, 16, 256][seed], seed=seed, others=[0, 3, 1][seed])
            assert got.tobytes() == whole.tobytes(), (seed, o.n_threads)


@pytest.mark.parametrize("window", [None, 1500])
def test_same_bits_when_a_long_unit_is_cut(ops, ops1, isa, window):
    """One row over several chunks of 1024: with two threads each chunk is a task of its own."""
    if isa == "generic":
        pytest.skip("slow without vectors; the code is the same")
    s = spec(4, 1, 64, window)
    t = text(2, 5000, s)
    results = []
    for o in (ops1, ops):
        cache = Cache(s, 5100, [64], "bfloat16")
        cache.step(o, [(0, t[:4997])])
        results.append(np.concatenate([cache.step(o, [(0, t[i : i + 1])])[0] for i in range(4997, 5000)]))
    assert results[0].tobytes() == results[1].tobytes()
    assert walk(ops1, t, s, [5000], 32)[4997:].tobytes() == results[0].tobytes()
    check(ops, results[0], t, s, "bfloat16", range(4997, 5000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_instruction_set(ops, isa, dtype):
    """Of the float32 path; the bits on pairs of bfloat16 belong to the instruction."""
    from paceline.ops.native import NativeOps

    if dtype in ("bfloat16", "int8") and isa in PAIRS:
        pytest.skip("pairs of bfloat16")
    s = spec(6, 2, 24, softcap=4.0)
    t = text(3, 90, s)
    want = walk(NativeOps("generic", 1), t, s, [90], dtype=dtype)
    assert walk(ops, t, s, [80, 10], dtype=dtype).tobytes() == want.tobytes()


def test_heads_in_groups_of_their_own(ops):
    s = spec(6, 3, 16)
    t = text(4, 100, s)
    one = walk(ops, t, s, [60, 40])
    assert walk(ops, t, s, [60, 40], heads=[[1], [0, 2]]).tobytes() == one.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [29, 30])
@pytest.mark.parametrize("chunks", [[50], [20, 12, 18]], ids=["many rows", "few rows"])
def test_later_rows_cannot_matter(ops, n, dtype, chunks):
    """Infinite or NaN entries of later rows in the same block, or the same pair of keys, change no bit of the earlier ones."""
    s = spec(4, 2, 16)
    t = text(6, 50, s)
    clean = walk(ops, t, s, chunks, dtype=dtype)
    t.k[n:], t.v[n:] = np.nan, np.inf
    got = walk(ops, t, s, chunks, dtype=dtype)
    assert got[:n].tobytes() == clean[:n].tobytes()
    assert np.isnan(got[n:]).all()


@pytest.mark.parametrize("n", [29, 30])
def test_what_left_the_window_cannot_matter(ops, n):
    """Infinite entries are seen by the rows whose window they are in, and change no bit of the others."""
    s = spec(4, 2, 16, window=40)
    t = text(12, 120, s)
    clean = walk(ops, t, s, [120])
    t.v[n] = np.inf
    got = walk(ops, t, s, [120])
    assert not np.isfinite(got[n : n + 40]).any()
    for rows in (slice(0, n), slice(n + 40, 120)):
        assert got[rows].tobytes() == clean[rows].tobytes()


def test_pages_behind_the_window_may_be_gone(ops):
    s = spec(4, 2, 16, window=40)
    t = text(7, 200, s)
    kept = walk(ops, t, s, [199, 1])[199:]
    cache = Cache(s, 400, [8], "bfloat16")
    cache.step(ops, [(0, t[:199])])
    for page in cache.pages[0][0][: (199 - 40) // 8]:
        cache.k[0][page] = cache.v[0][page] = np.nan
    cache.pages[0][0][: (199 - 40) // 8] = [-1] * ((199 - 40) // 8)
    assert cache.step(ops, [(0, t[199:])])[0].tobytes() == kept.tobytes()


PARENTS = [-1, 0, 0, 1, 1, 2, 5, -1, 7, 3]  # a draft tree


def paths() -> list[list[int]]:
    chains: list[list[int]] = []
    for i, p in enumerate(PARENTS):
        chains.append([*(chains[p] if p >= 0 else []), i])
    return chains


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("n_text", [1, 60, 1020])
def test_trees_against_float64_and_chains(ops, isa, n_text, window):
    """Each node gives the bits that its path gives as plain text."""
    s = spec(4, 2, 16, window)
    t, n = text(8, n_text + len(PARENTS), s), n_text
    other = text(9, 70, s)
    cache = Cache(s, 1400, dtype="bfloat16")
    cache.step(ops, [(0, t[: n - 1]), (1, other[:3])] if n > 1 else [(1, other[:3])])
    masks = [1, *(1 | sum(2 << j for j in path) for path in paths())]  # the last real row, then the draft
    _, got = cache.step(ops, [(1, other[3:10]), (0, t[n - 1 :])], [[(2 << i) - 1 for i in range(7)], masks])
    for i, path in enumerate(paths()):
        rows = [*range(n), *(n + j for j in path)]
        seen = np.arange(len(rows))[-window:] if window else np.arange(len(rows))
        check(ops, got[1 + i][None], t[rows], s, "bfloat16", [len(rows) - 1], lambda _, seen=seen: seen)
        chain = Cache(s, 1400, dtype="bfloat16", seed=1)
        if isa != "generic" or n < 1000:
            assert chain.step(ops, [(0, t[rows])])[0][-1].tobytes() == got[1 + i].tobytes()
    cache.drop(0, len(PARENTS))
    again = cache.step(ops, [(0, t[n : n + 1])])[0]
    assert again[0].tobytes() == got[1].tobytes()


def test_a_mask_of_zero_is_causal(ops):
    s = spec(2, 1, 16)
    t, long = text(10, 5, s), text(11, 100, s)
    cache = Cache(s, 300, dtype="bfloat16")
    got = cache.step(ops, [(0, t), (1, long)], [[(2 << i) - 1 for i in range(5)], [0] * 100])
    assert got[1].tobytes() == walk(ops, long, s, [100]).tobytes()
    assert got[0].tobytes() == walk(ops, t, s, [5]).tobytes()
