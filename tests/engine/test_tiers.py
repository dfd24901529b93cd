"""KV beyond memory: what comes back from a tier is bit for bit what was computed, in any composition, and no tier can do harm."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline import LLM
from paceline.core import readahead
from paceline.core import tiers as core_tiers
from paceline.core.engine import Engine
from paceline.core.errors import ConfigError, RequestError
from paceline.core.kvcache import KVCache, make_groups
from paceline.core.runner import Parts
from paceline.core.sequence import Sequence
from paceline.core.tier import BURST, N_ENOUGH, PROBE, Tier
from paceline.core.tiers import Tiers
from paceline.core.types import Request, SamplingParams
from paceline.techniques.kvcache.disk import DiskStore
from paceline.techniques.kvcache.ram import RamStore

from .test_engine import GREEDY, alone, prompts
from .tiny import CONFIG, WINDOWED, request, run_all, tiny_engine, tiny_model

HOUR = 3600.0
N_WORKLOADS = int(os.environ.get("PACELINE_TEST_SCHEDULES", "12"))
KINDS = ("float32", "bfloat16", "int8")


def ram(n_bytes: int = 1 << 24, **options: Any) -> Tier:
    return Tier(RamStore(n_bytes), **{"fetch": "always", **options})


def on_disk(folder: Path, n_bytes: int = 1 << 24, **options: Any) -> Tier:
    return Tier(DiskStore(folder, n_bytes, HOUR), **{"fetch": "always", "through": True, **options})


class Remote(RamStore):
    """A store on another machine: read ahead, and never asked by the engine's thread."""

    name = "remote"
    near = False
    ahead = True

    def __init__(self, n_bytes: int = 1 << 24):
        super().__init__(n_bytes)
        self.asked_by: set[str] = set()
        self.wait = threading.Event()
        self.wait.set()

    def get(self, key: bytes, n_bytes: int) -> bytes | None:
        self.asked_by.add(threading.current_thread().name)
        self.wait.wait(30)
        return super().get(key, n_bytes)


def of(engine: Engine) -> Tiers:
    tiers = engine.runner.parts.tiers
    assert tiers is not None
    return tiers


def served(engine: Engine, tokens: list[int], salt: str = "", **params: Any) -> Any:
    params = {**GREEDY, "logprobs": 1, **params}
    out = run_all(engine, [Request("x", tuple(tokens), SamplingParams(**params), salt=salt)])["x"]
    of(engine).flush()
    return out


def empty_cache(engine: Engine) -> None:
    """Make the prefix index give up all it holds."""
    prefix, cache = engine.runner.parts.prefix, engine.runner.cache
    assert prefix is not None
    for g, pool in enumerate(cache.pools):
        prefix.evict(pool.n_pages, g)
    of(engine).flush()
    assert all(pool.n_used == 0 for pool in cache.pools)


def same(a: Any, b: Any) -> bool:
    return [(c.token_ids, c.logprobs) for c in a.completions] == [(c.token_ids, c.logprobs) for c in b.completions]


def sound(engine: Engine) -> None:
    prefix = engine.runner.parts.prefix
    assert prefix is not None
    prefix.check()
    engine.runner.cache.check_integrity([], prefix.held())  # type: ignore[attr-defined]
    tiers = of(engine)
    assert tiers._resident == {link.key for link in tiers._links.values()}
    assert set(tiers._links) == set(prefix.held()[0])  # type: ignore[attr-defined]
    assert not tiers._pending
    assert tiers._n_pending == tiers._reader.n_staged == 0
    assert not tiers._jobs


# ---- a page as bytes


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("head_split", [None, 1])
def test_pages_come_back_bit_for_bit(ops: Any, kind: str, head_split: int | None) -> None:
    model = tiny_model(ops, WINDOWED)
    cache = KVCache(make_groups(model.config.states, 4, head_split), ops, kind, 10)
    rng = np.random.default_rng(0)
    for pool in [p for g in range(len(cache.groups)) for p in (*cache.k[g], *cache.v[g])]:
        raw = ops.numpy(pool)
        raw.reshape(-1).view(np.uint8)[:] = rng.integers(0, 256, raw.nbytes, np.uint8)  # any bits, NaN included
    a, b = cache.new(), cache.new()
    assert cache.reserve(a, range(8)) is not None
    cache.settle(a)
    blocks = [cache.dump([kv[i] for kv in map(a.pages, range(len(cache.groups)))]) for i in range(2)]
    assert [len(x) for x in blocks] == [cache.block_bytes] * 2
    assert cache.load(b, [bytes(x) for x in blocks])
    for g, group in enumerate(cache.groups):
        for pool in (*cache.k[g], *cache.v[g]):
            raw = ops.numpy(pool)
            assert raw[b.pages(g)].tobytes() == raw[a.pages(g)].tobytes()
        assert cache.positions[g][b.pages(g)].ravel().tolist() == list(range(8))
        assert b.lens[g] == 8
        assert group.page_size == 4
    cache.check_integrity([a, b])
    assert not cache.load(b, blocks * 4)  # ten pages hold four and no eight more
    cache.check_integrity([a, b])
    assert cache.load(b, blocks)
    assert cache.positions[0][b.pages(0)].ravel().tolist() == list(range(16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_a_restored_prefix_gives_the_same_tokens_and_bits(ops: Any, config: Any, kind: str, tmp_path: Path) -> None:
    model = tiny_model(ops, config)
    prompt = prompts(1, 3)[0] + list(range(40))
    want = alone(model, Request("x", tuple(prompt), SamplingParams(logprobs=1, **GREEDY)), kv_dtype=kind)
    for tier in (ram(), on_disk(tmp_path / "kv"), Tier(Remote(), "always")):
        engine = tiny_engine(model, kv_dtype=kind, tiers=[tier])
        assert same(served(engine, prompt), want)
        empty_cache(engine)
        got = served(engine, prompt)
        assert same(got, want)
        assert got.n_cached == (len(prompt) - 1) // 4 * 4
        assert of(engine).stats()["n_restored_tokens"] == got.n_cached
        sound(engine)
        of(engine).close()


# ---- composition


def workload(model: Any, seed: int, folder: Path) -> None:
    """A random schedule over a small cache with tiers gives what each request gives alone without any."""
    rng = random.Random(seed)
    remote = Remote(rng.choice([1 << 16, 1 << 24]))
    chain = [
        ram(rng.choice([2_000, 20_000, 1 << 24])),
        on_disk(folder, rng.choice([5_000, 1 << 24])),
        Tier(remote, "always"),
    ]
    chain = [t for t in chain if rng.random() < 0.7] or chain[:1]
    for tier in chain:
        tier.through = rng.random() < 0.5
    kind = rng.choice(KINDS)
    options: dict[str, Any] = {
        "page_size": rng.choice([2, 4, 4]),
        "head_split": rng.choice([None, 1]),
        "kv_dtype": kind,
    }
    requests = [
        Request(
            f"r{i}",
            tuple(p),
            SamplingParams(temperature=rng.choice([0.0, 0.9]), seed=i, logprobs=1, max_tokens=rng.randint(1, 14), n=rng.choice([1, 1, 2])),
            salt=rng.choice(["", "", "b"]),
        )
        for i, p in enumerate(prompts(rng.randint(3, 8), seed, longest=36))
    ]  # fmt: skip
    engine = tiny_engine(
        model, n_pages=rng.choice([48, 60]) if options["page_size"] == 2 else rng.choice([24, 40]),
        max_rows=rng.choice([5, 16, 64]), chunk=rng.choice([1, 3, 7, 64]), max_seqs=rng.choice([2, 16]), tiers=chain, **options,
    )  # fmt: skip
    outputs = run_all(engine, requests, at=[rng.randint(0, 12) for _ in requests])
    again = run_all(engine, requests)
    for r in requests:
        want = alone(model, r, **options)
        assert same(outputs[r.id], want)
        assert same(again[r.id], want)
    of(engine).flush()
    sound(engine)
    assert all(t["n_corrupt"] == 0 for t in of(engine).stats()["tiers"].values())
    assert remote.asked_by <= {"kv-tier-read_0"}
    of(engine).close()


@pytest.mark.parametrize("seed", range(N_WORKLOADS))
def test_random_workloads(model: Any, seed: int, tmp_path: Path) -> None:
    workload(model, seed, tmp_path / "kv")


@pytest.mark.parametrize("seed", range(N_WORKLOADS // 2))
def test_random_workloads_with_windows(windowed: Any, seed: int, tmp_path: Path) -> None:
    workload(windowed, 1000 + seed, tmp_path / "kv")


def test_a_preempted_sequence_comes_back_from_a_tier(model: Any) -> None:
    requests = [
        request(f"r{i}", p, seed=i, temperature=0.7, logprobs=0, max_tokens=30) for i, p in enumerate(prompts(8, 5))
    ]
    plain, tiered = tiny_engine(model, n_pages=40), tiny_engine(model, n_pages=40, tiers=[ram()])
    outputs = run_all(tiered, requests)
    assert tiered.runner.scheduler.n_preempted > 0
    assert of(tiered).stats()["n_restored"] > 0
    for r in requests:
        assert same(outputs[r.id], alone(model, r, n_pages=40))
    of(tiered).flush()
    sound(tiered)
    assert run_all(plain, requests).keys() == outputs.keys()


class DropMiddle:
    """An eviction that leaves the first five entries and the last four: what follows is no prefix's state any more."""

    def after_commit(self, seq: Sequence, cache: KVCache) -> None:
        for g in range(len(cache.groups)):
            n = seq.kv.lens[g]
            if n > 12:
                cache.keep(seq.kv, g, [*range(5), *range(n - 4, n)])


def test_what_an_eviction_has_changed_is_not_offered(model: Any) -> None:
    """Every block in a tier is one that the plain engine would have computed."""
    texts = prompts(6, 11)
    plain = tiny_engine(model, tiers=[ram(through=True)])
    evicting = tiny_engine(model, tiers=[ram(through=True)], parts=Parts(kv_policy=[DropMiddle()]), chunk=8)
    for tokens in texts:
        served(evicting, served(plain, tokens).prompt_token_ids)
        empty_cache(evicting)
    known, found = (of(e).tiers[0].store for e in (plain, evicting))
    keys = list(found.keys(None))
    assert keys
    for key in keys:
        assert found.get(key, 1 << 20) == known.get(key, 1 << 20)
    assert len(keys) < len(list(known.keys(None)))


def test_requests_that_look_at_every_row_bypass_the_tiers(model: Any) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    remote = Remote()
    engine = tiny_engine(model, tiers=[Tier(remote, "always", through=True)])
    served(engine, prompt)
    empty_cache(engine)
    remote.asked_by.clear()
    served(engine, prompt, prompt_logprobs=0)
    assert not remote.asked_by
    assert of(engine).stats()["n_restored"] == 0


# ---- identity


def test_identities_never_share(model: Any, tmp_path: Path) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    engine = tiny_engine(model, tiers=[ram(), on_disk(tmp_path / "kv")])
    served(engine, prompt, salt="a")
    empty_cache(engine)
    assert served(engine, prompt, salt="b").n_cached == 0
    assert served(engine, prompt, salt="").n_cached == 0
    assert served(engine, prompt, salt="a").n_cached > 0
    tiers = of(engine)
    assert tiers.lookup(prompt, "c").result() == {"cache": 0, "ram": 0, "disk": 0}
    owners = {key[:16] for key in tiers.tiers[1].store.keys(None)}
    assert len(owners) == 3


def test_a_restart_finds_the_prefixes_of_the_same_model_only(model: Any, tmp_path: Path) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    first = tiny_engine(model, tiers=[on_disk(tmp_path / "kv")])
    want = served(first, prompt)  # never given up by the cache, never closed: as if killed
    again = tiny_engine(model, tiers=[on_disk(tmp_path / "kv")])
    got = served(again, prompt)
    assert same(got, want)
    assert got.n_cached == (len(prompt) - 1) // 4 * 4
    for other in (
        tiny_engine(model, tiers=[on_disk(tmp_path / "kv")], identity=b"another model"),
        tiny_engine(model, tiers=[on_disk(tmp_path / "kv")], kv_dtype="bfloat16"),
        tiny_engine(model, tiers=[on_disk(tmp_path / "kv")], head_split=1),
        tiny_engine(model, tiers=[on_disk(tmp_path / "kv")], page_size=8),
    ):
        assert served(other, prompt).n_cached == 0


def test_a_models_digest_tells_models_apart(ops: Any) -> None:
    model, config = tiny_model(ops), {**WINDOWED, "sliding_window": 28}
    digest = model.digest()
    assert tiny_model(ops).digest() == digest
    assert tiny_model(ops, context=256).digest() == digest  # the same state at every position they share
    others = [tiny_model(ops, WINDOWED), tiny_model(ops, config), tiny_model(ops, format="bfloat16")]
    name = next(n for n, w in model.w.items() if isinstance(w, np.ndarray))
    touched = tiny_model(ops)
    touched.w = {**touched.w, name: touched.w[name] + np.float32(1e-6) * (np.arange(len(touched.w[name])) == 3)}
    assert len({digest, touched.digest(), *(m.digest() for m in others)}) == 5


# ---- damage


def blocks_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen", "empty", "foreign", "replaced"])
def test_damaged_blocks_are_dropped_and_never_used(model: Any, tmp_path: Path, damage: str) -> None:
    rng = random.Random(1)
    prompt = prompts(1, 3)[0] + list(range(40))
    folder = tmp_path / "kv"
    want = served(tiny_engine(model, tiers=[on_disk(folder)]), prompt)
    files = blocks_of(folder)
    rest = [f.read_bytes() for f in files]
    for i, file in enumerate(files):
        raw = bytearray(rest[i])
        if damage == "flip":
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif damage == "foreign":
            raw[16:48] = bytes(32)
        elif damage == "replaced":
            raw = bytearray(rest[i - 1])
        else:
            raw = {"truncate": raw[: rng.randrange(len(raw))], "lengthen": raw + b"x", "empty": bytearray()}[damage]
        file.write_bytes(raw)
    engine = tiny_engine(model, tiers=[on_disk(folder)])
    got = served(engine, prompt)
    assert same(got, want)
    assert got.n_cached == 0
    assert of(engine).stats()["tiers"]["disk"]["n_corrupt"] >= 1
    assert [f.read_bytes() for f in blocks_of(folder)] == rest or damage in (
        "flip",
        "truncate",
        "lengthen",
        "empty",
        "foreign",
        "replaced",
    )
    assert served(tiny_engine(model, tiers=[on_disk(folder)]), prompt).n_cached < len(prompt)


def test_the_chain_ends_at_a_hole(model: Any, tmp_path: Path) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    tier = on_disk(tmp_path / "kv")
    engine = tiny_engine(model, tiers=[tier])
    want = served(engine, prompt)
    empty_cache(engine)
    tiers = of(engine)
    assert tier.store.delete(tiers._keys(prompt, "")[3])
    assert tiers.lookup(prompt).result()["disk"] == 12
    got = served(engine, prompt)
    assert got.n_cached == 12
    assert same(got, want)
    sound(engine)


class Failing(RamStore):
    """Refuses every block, and raises where no store should."""

    def put(self, key: bytes, raw: bytes) -> list[tuple[bytes, bytes]]:
        raise RuntimeError("a bug")


def test_a_store_with_a_bug_does_not_stop_the_server(model: Any, caplog: Any) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    engine = tiny_engine(model, tiers=[Tier(Failing(1000), "always", through=True)])
    assert same(served(engine, prompt), alone(model, request("x", prompt, logprobs=1, **GREEDY)))
    assert "could not be written" in caplog.text
    sound(engine)


# ---- order of tiers, bounds, time


def test_what_a_tier_gives_up_goes_to_the_next(model: Any, tmp_path: Path) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    n_pages = len(prompt) // 4
    engine = tiny_engine(model, tiers=[ram(), on_disk(tmp_path / "kv", through=False)])
    size = of(engine).n_block
    of(engine).tiers[0].store.capacity = 3 * size  # type: ignore[attr-defined]
    want = served(engine, prompt, max_tokens=1)
    assert blocks_of(tmp_path / "kv") == []  # not written through
    empty_cache(engine)
    stats = of(engine).stats()["tiers"]
    assert stats["ram"]["n_blocks"] == 3
    assert stats["disk"]["n_blocks"] == n_pages - 3
    assert of(engine).lookup(prompt).result() == {"cache": 0, "ram": 12, "disk": 0}  # tails go first, heads stay near
    got = served(engine, prompt, max_tokens=1)
    assert same(got, want)
    assert got.n_cached == (len(prompt) - 1) // 4 * 4


def test_the_queue_of_writes_is_bounded(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(core_tiers, "PENDING_BYTES", 3_000)
    prompt = prompts(1, 3)[0] + list(range(40))
    engine = tiny_engine(model, tiers=[ram(through=True)])
    gate = threading.Event()
    of(engine)._writer.submit(gate.wait)
    run_all(engine, [request("x", prompt, **GREEDY)])
    stats = of(engine).stats()
    assert 0 < stats["pending_bytes"] <= 3_000
    assert stats["n_queue_full"] > 0
    gate.set()
    of(engine).flush()
    assert of(engine).stats()["pending_bytes"] == 0
    sound(engine)


def test_blocks_on_their_way_are_found(model: Any) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    engine = tiny_engine(model, tiers=[ram()])
    gate = threading.Event()
    of(engine)._writer.submit(gate.wait)
    want = run_all(engine, [request("x", prompt, logprobs=1, **GREEDY)])["x"]
    for g, pool in enumerate(engine.runner.cache.pools):
        engine.runner.parts.prefix.evict(pool.n_pages, g)  # type: ignore[union-attr]
    got = run_all(engine, [request("x", prompt, logprobs=1, **GREEDY)])["x"]
    gate.set()
    assert same(got, want)
    assert got.n_cached == (len(prompt) - 1) // 4 * 4


def test_a_silent_store_delays_a_request_and_no_more(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(readahead, "PATIENCE", 0.02)
    prompt = prompts(1, 3)[0] + list(range(40))
    remote = Remote()
    engine = tiny_engine(model, tiers=[Tier(remote, "always", through=True)])
    want = served(engine, prompt)
    empty_cache(engine)
    remote.wait.clear()
    got = run_all(engine, [request("x", prompt, logprobs=1, **GREEDY), request("y", prompt, logprobs=1, **GREEDY)])
    assert same(got["x"], want)
    assert same(got["y"], want)
    assert min(got["x"].n_cached, got["y"].n_cached) == 0
    remote.wait.set()
    of(engine).close()
    sound(engine)


def test_others_run_while_one_waits_for_its_blocks(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(readahead, "PATIENCE", 30.0)
    prompt = prompts(1, 3)[0] + list(range(40))
    remote = Remote()
    engine = tiny_engine(model, tiers=[Tier(remote, "always", through=True)])
    want = served(engine, prompt)
    other = [90, 91, 92]
    running = served(engine, other, max_tokens=30)
    empty_cache(engine)
    engine.add(request("a", other, logprobs=1, **{**GREEDY, "max_tokens": 30}))
    engine.step()
    remote.wait.clear()
    engine.add(request("b", prompt, logprobs=1, **GREEDY))
    outputs = {}
    while engine.live.keys() != {"b"}:
        outputs.update({o.id: o for o in engine.step()[1]})
    assert outputs["a"].token_ids == running.token_ids
    assert len(engine.runner.scheduler.waiting) == 1
    remote.wait.set()
    while engine.has_work:
        outputs.update({o.id: o for o in engine.step()[1]})
    assert same(outputs["b"], want)
    assert outputs["b"].n_cached == (len(prompt) - 1) // 4 * 4
    of(engine).close()


def test_aborted_while_waiting(model: Any) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    remote = Remote()
    engine = tiny_engine(model, tiers=[Tier(remote, "always", through=True)])
    served(engine, prompt)
    empty_cache(engine)
    remote.wait.clear()
    engine.add(request("b", prompt, **GREEDY))
    engine.abort("b")
    remote.wait.set()
    of(engine).close()
    sound(engine)


def test_a_tier_slower_than_computing_is_not_used_but_asked_now_and_then() -> None:
    tier = ram(fetch="measured")
    assert tier.is_worth(None, 0.0)
    for _ in range(N_ENOUGH):
        assert tier.is_worth(0.001, 0.0)  # not enough is known of it yet
        tier.measured(0.010)
    assert tier.is_worth(0.011, 0.0)
    assert not tier.is_worth(0.011, 0.002)
    asked = [tier.is_worth(0.001, 0.0) for _ in range(3 * (PROBE - 1 + BURST) - 1)]
    assert asked.count(True) == 3 * BURST
    tier.measured(0.0001)
    assert not tier.is_worth(0.001, 0.0)  # one quick read says as little as a slow one
    for _ in range(BURST):
        tier.measured(0.0001)
    tier.measured(5.0)
    assert tier.is_worth(0.001, 0.0)
    never, always = ram(fetch="never"), ram(fetch="always")
    for _ in range(N_ENOUGH):
        always.measured(1e9)
    assert always.is_worth(0.0, 0.0)
    assert not never.is_worth(None, 0.0)


class FarMemory:
    """As a device's: what is read of it is a copy."""

    def empty(self, shape: Any, dtype: str) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def move(self, pool: Any, src: Any, dst: Any) -> None: ...

    def numpy(self, x: Any) -> np.ndarray:
        return np.array(x)


def test_a_cache_in_a_devices_memory_is_refused(model: Any) -> None:
    cache = KVCache(make_groups(model.config.states, 4), FarMemory(), "float32", 4)
    with pytest.raises(ConfigError, match="device's memory"):
        Tiers(cache, [ram()], b"")


def test_the_cost_of_computing_is_learnt_from_steps(model: Any) -> None:
    tiers = Tiers(KVCache(make_groups(model.config.states, 4), model.ops, "float32", 4), [ram()], b"")
    assert tiers.stats()["computed_tokens_per_second"] is None
    tiers.computed(1, 5.0)  # a decode
    assert tiers.stats()["computed_tokens_per_second"] is None
    tiers.computed(100, 1.0)
    assert tiers.stats()["computed_tokens_per_second"] == pytest.approx(100)
    for _ in range(100):
        tiers.computed(400, 2.0)
    assert tiers.stats()["computed_tokens_per_second"] == pytest.approx(200, rel=1e-3)


# ---- control


def test_lookup_pin_move_clear(model: Any, tmp_path: Path) -> None:
    prompt, other = [*range(40)], [*range(50, 90)]
    engine = tiny_engine(model, tiers=[ram(), on_disk(tmp_path / "kv", through=False)])
    tiers = of(engine)
    served(engine, prompt, max_tokens=1)
    assert tiers.lookup(prompt).result() == {"cache": 40, "ram": 0, "disk": 0}
    empty_cache(engine)
    assert tiers.lookup(prompt).result() == {"cache": 0, "ram": 40, "disk": 0}
    assert tiers.move(prompt[:21], "ram", "disk").result() == 20
    assert tiers.lookup(prompt).result() == {"cache": 0, "ram": 0, "disk": 20}
    assert tiers.move(prompt, "disk", "ram").result() == 20
    assert tiers.move(prompt, "ram", "ram").result() == 0
    assert tiers.lookup(prompt).result() == {"cache": 0, "ram": 40, "disk": 0}
    assert tiers.pin(prompt) == 40
    tiers.tiers[0].store.capacity = 10 * tiers.n_block  # type: ignore[attr-defined]
    served(engine, other, max_tokens=1)
    empty_cache(engine)
    assert tiers.lookup(prompt).result()["ram"] == 40  # the other went past it
    assert tiers.lookup(other).result()["disk"] == 40
    assert tiers.unpin(prompt) == 40
    assert tiers.unpin(prompt) == 0
    served(engine, other, salt="b", max_tokens=1)
    empty_cache(engine)
    assert tiers.lookup(other, "b").result()["ram"] == 40
    assert tiers.clear("ram", "b").result() == 10
    assert tiers.lookup(other).result()["disk"] == 40
    assert tiers.clear("disk").result() > 0
    assert tiers.clear().result() == 0
    assert tiers.lookup(other).result() == {"cache": 0, "ram": 0, "disk": 0}
    for wrong in (lambda: tiers.move(prompt, "ram", "tape"), lambda: tiers.clear("tape")):
        with pytest.raises(RequestError, match="tape"):
            wrong()
    sound(engine)


def test_pins_are_bounded(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(core_tiers, "MAX_PINNED", 5)
    tiers = of(tiny_engine(model, tiers=[ram()]))
    assert tiers.pin([*range(20)]) == 20
    assert tiers.pin([*range(20)]) == 20
    with pytest.raises(RequestError, match="unpin"):
        tiers.pin([*range(50, 60)])


def test_clearing_while_reading_ahead(model: Any) -> None:
    prompt = prompts(1, 3)[0] + list(range(40))
    remote = Remote()
    engine = tiny_engine(model, tiers=[Tier(remote, "always", through=True)])
    want = served(engine, prompt)
    empty_cache(engine)
    engine.add(request("x", prompt, logprobs=1, **GREEDY))
    assert of(engine).clear().result() > 0
    outputs = {}
    while engine.has_work:
        outputs.update({o.id: o for o in engine.step()[1]})
    assert same(outputs["x"], want)
    assert outputs["x"].n_cached == 0
    of(engine).close()
    sound(engine)


def test_clearing_the_index_forgets_its_pages(model: Any) -> None:
    engine = tiny_engine(model, tiers=[ram()])
    served(engine, [*range(40)])
    engine.runner.parts.prefix.clear()  # type: ignore[union-attr]
    assert of(engine).lookup([*range(40)]).result() == {"cache": 0, "ram": 0}
    served(engine, [*range(40)])
    sound(engine)


# ---- assembled


def llm(use: Seq[str], **options: Any) -> LLM:
    return LLM("lab-1m", use=tuple(use), context=512, kv_memory=1 << 22, **options)


def test_an_llm_finds_its_prefixes_after_a_restart(tmp_path: Path) -> None:
    text, use = "def f(x):\n    return x\n" * 12, [f"kvcache/disk:path={tmp_path / 'kv'},fetch=always"]
    for kind in KINDS:
        with llm([], kv_dtype=kind) as plain:
            want = plain.generate(text, SamplingParams(temperature=0, max_tokens=8))[0]
        with llm(use, kv_dtype=kind) as first:
            assert first.generate(text, SamplingParams(temperature=0, max_tokens=8))[0].token_ids == want.token_ids
        with llm(use, kv_dtype=kind) as again:
            got = again.generate(text, SamplingParams(temperature=0, max_tokens=8))[0]
        assert got.token_ids == want.token_ids
        assert got.n_cached == (len(got.prompt_token_ids) - 1) // 32 * 32
    with llm(use, kv_dtype="float32", format="int8") as quantised:
        assert quantised.generate(text, SamplingParams(temperature=0, max_tokens=1))[0].n_cached == 0


def test_tiers_are_refused_where_they_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="serving/radix"):
        llm(["no:serving/radix", "kvcache/ram:size_mib=1"])
    with pytest.raises(ConfigError, match="size_mib"):
        llm(["kvcache/ram:size_mib=16000000"])
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        llm([f"kvcache/disk:path={tmp_path / 'open'}"])
    with pytest.raises(ConfigError, match="fetch"):
        llm(["kvcache/ram:fetch=sometimes"])


def test_a_password_is_in_no_plan() -> None:
    pytest.importorskip("redis")
    with llm(["kvcache/redis:url=redis://u:hunter2@127.0.0.1:1/0"]) as model:
        assert len(model.generate([1, 2, 3] * 30, SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
        assert "hunter2" not in str(model.plan.describe()) + repr(model.plan) + str(
            model.engine.runner.parts.tiers.stats()
        )  # type: ignore[union-attr]
