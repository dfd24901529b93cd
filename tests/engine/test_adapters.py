"""Adapters in the engine: the merged model's answers, the same bits in any company, separate prefixes, loading and unloading."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.analysis.synthetic import random_adapter
from paceline.assemble import native_isas
from paceline.core.engine import Engine
from paceline.core.errors import RequestError
from paceline.core.types import GREEDY, Output, Request

from .conftest import make_backend
from .tiny import CONFIG, request, run_all, tiny_engine, tiny_model

QWEN3 = {**CONFIG, "model_type": "qwen3", "num_hidden_layers": 2}
QWEN2 = {**CONFIG, "model_type": "qwen2"}
GEMMA2 = {
    **CONFIG,
    "model_type": "gemma2",
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}
OLMO2 = {**CONFIG, "model_type": "olmo2"}
PHI3 = {**CONFIG, "model_type": "phi3"}
GPT2 = {"model_type": "gpt2", "n_embd": 40, "n_head": 4, "n_layer": 2, "vocab_size": 97, "n_positions": 128}
MOE = {
    **CONFIG,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
FAMILIES = {
    "llama": CONFIG,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "gpt2": GPT2,
    "qwen3_moe": MOE,
}
PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, 97, 23)]


def strong(folder: Path, config: dict[str, Any], rank: int, seed: int, **options: Any) -> Path:
    """An adapter that changes every answer."""
    return random_adapter(folder, config, rank, seed, lora_alpha=8 * rank, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of the tiny llama: all linears; two of them; other ranks for some, odd ones."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "all": strong(root / "all", CONFIG, 4, 1),
        "qv": strong(root / "qv", CONFIG, 16, 2, target_modules=["q_proj", "v_proj"], use_rslora=True),
        "odd": strong(root / "odd", CONFIG, 3, 3, rank_pattern={"k_proj": 1, "down_proj": 7}),
    }


def logits(engine: Engine, tokens: list[int], adapter: str = "", chunk: str = "") -> np.ndarray:
    whole = Request(f"logits{chunk}", tuple(tokens), GREEDY, generate=False, pool="logits", adapter=adapter)
    return np.concatenate(run_all(engine, [whole])[whole.id].sequences[0].rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_merged_model(ops: Any, family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    folder = strong(tmp_path / "a", config, 5, 7)
    plain = tiny_model(ops, config, context=128)
    engine = tiny_engine(plain, adapters={"a": folder})
    want = logits(tiny_engine(tiny_model(ops, config, context=128, merged=folder)), PROMPT)
    got, base = logits(engine, PROMPT, "a"), logits(engine, PROMPT)
    assert np.abs(want - base).max() > 0.1 * base.std()
    assert np.abs(got - want).max() < 2e-4 * base.std()
    assert set(plain.sites_of(plain.config)) == engine.adapters.sites  # every site was exercised


@pytest.mark.parametrize("format", ["int8", "int4", "bfloat16"])
def test_quantised_base(format: str, tmp_path: Path) -> None:
    """Float adapters beside codes: the native core against the reference, which quantises alike."""
    found = {}
    folder = strong(tmp_path / "a", CONFIG, 4, 1)
    for backend in ("reference", "native"):
        try:
            model = tiny_model(make_backend(backend), format=format)
        except ImportError:
            pytest.skip("the native core is not built")
        engine = tiny_engine(model, adapters={"a": folder})
        found[backend] = logits(engine, PROMPT, "a"), logits(engine, PROMPT)
    (want, base), (got, _) = found["reference"], found["native"]
    assert np.abs(want - base).max() > 0.2 * base.std()
    assert (got - want).std() < 0.05 * base.std()  # int8 in groups multiplies as bfloat16 on tiles


def mixed(n_tokens: int = 12, **params: Any) -> list[Request]:
    """Twelve requests that take turns with the plain model and three adapters; prompts of many lengths."""
    rng = np.random.default_rng(5)
    names = ["", "all", "qv", "odd"]
    return [
        request(
            f"r{i}",
            rng.integers(0, 97, 3 + 5 * i).tolist(),
            adapter=names[i % 4],
            max_tokens=n_tokens,
            temperature=0.0,
            logprobs=0,
            **params,
        )
        for i in range(12)
    ]


def told(outputs: dict[str, Output]) -> dict[str, Any]:
    """Tokens and the bits of their log-probabilities."""
    return {
        name: [(c.token_ids, [lp.logprob for lp in c.logprobs or []]) for c in o.completions]
        for name, o in outputs.items()
    }


def alone(model: Any, folders: dict[str, Path], requests: list[Request]) -> dict[str, Any]:
    found = {}
    for r in requests:
        only = {r.adapter: folders[r.adapter]} if r.adapter else {}
        found |= told(run_all(tiny_engine(model, radix=False, adapters=only), [r]))
    return found


def test_a_row_has_its_bits_in_any_company(ops: Any, model: Any, folders: dict[str, Path]) -> None:
    """Alone with its adapter only, and among others in chunks; without one, in an engine that knows no adapters."""
    want = alone(model, folders, mixed())
    for options in ({}, {"chunk": 5}, {"max_rows": 7, "max_seqs": 3}):
        engine = tiny_engine(model, adapters=folders, **options)
        assert told(run_all(engine, mixed(), at=[i % 5 for i in range(12)])) == want
    answers = {str(want[f"r{i}"][0][0]) for i in range(12)}
    assert len(answers) == 12


def test_threads_do_not_matter(folders: dict[str, Path]) -> None:
    pytest.importorskip("paceline._native")
    first, second = (
        told(run_all(tiny_engine(tiny_model(make_backend("native", n), format="int4"), adapters=folders), mixed()))
        for n in (1, 2)
    )
    assert first == second


@pytest.mark.parametrize("isa", native_isas())
def test_every_instruction_set(isa: str, folders: dict[str, Path]) -> None:
    from paceline.ops.native import NativeOps

    for format in ("float32", "int4"):
        model = tiny_model(NativeOps(isa, 2), format=format)
        assert told(run_all(tiny_engine(model, adapters=folders, chunk=9), mixed(4))) == alone(model, folders, mixed(4))
    model = tiny_model(NativeOps(isa, 2))
    want = logits(tiny_engine(tiny_model(make_backend("reference"), merged=folders["odd"])), PROMPT)
    assert np.abs(logits(tiny_engine(model, adapters=folders), PROMPT, "odd") - want).max() < 2e-4 * want.std()


def test_preemption_and_replay(model: Any, folders: dict[str, Path]) -> None:
    want = alone(model, folders, mixed(30))
    engine = tiny_engine(model, adapters=folders, n_pages=40)
    assert told(run_all(engine, mixed(30))) == want
    assert engine.runner.scheduler.n_preempted > 0


def test_prefixes_are_not_shared_across_adapters(model: Any, folders: dict[str, Path]) -> None:
    engine = tiny_engine(model, adapters=folders)
    digest = engine.adapters.loaded["all"].digest
    names = ["", "all", "qv", "all", "", "qv"]
    seen: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        output = run_all(engine, [request(f"p{i}", PROMPT, adapter=name, max_tokens=4, temperature=0.0)])[f"p{i}"]
        assert output.n_cached == (20 if name in seen else 0)
        assert seen.setdefault(name, output.token_ids) == output.token_ids
    for salt in (digest, f"{digest}/", f"/{digest}", "/"):  # a client's salt is no way into an adapter's states
        r = replace(request(f"s{salt}", PROMPT, max_tokens=4, temperature=0.0), salt=salt)
        assert run_all(engine, [r])[r.id].n_cached == 0


def test_equal_adapters_share_prefixes_and_others_of_one_name_do_not(model: Any, folders: dict[str, Path]) -> None:
    engine = tiny_engine(model, adapters={"a": folders["all"], "b": folders["all"]})

    def ask(name: str, adapter: str) -> Output:
        return run_all(engine, [request(name, PROMPT, adapter=adapter, max_tokens=2, temperature=0.0)])[name]

    assert (ask("1", "a").n_cached, ask("2", "b").n_cached) == (0, 20)
    engine.unload_adapter("a")
    engine.load_adapter("a", folders["odd"])
    assert ask("3", "a").n_cached == 0


def test_several_completions_and_forks(model: Any, folders: dict[str, Path]) -> None:
    engine = tiny_engine(model, adapters=folders)
    many = run_all(engine, [request("n", PROMPT, adapter="odd", n=3, max_tokens=6, seed=4, logprobs=0)])
    again = run_all(
        tiny_engine(model, adapters=folders, radix=False),
        [request("n", PROMPT, adapter="odd", n=3, max_tokens=6, seed=4, logprobs=0)],
    )
    assert told(many) == told(again)
    parked = replace(request("p", PROMPT, adapter="all", max_tokens=1, temperature=0.0), park=True)
    seq = run_all(engine, [parked])["p"].sequences[0]
    fork = engine.fork(seq)
    assert fork is not None
    assert fork.adapter is seq.adapter
    for adapter, shared in (("all", True), ("odd", False), ("", False)):
        r = request(f"c{adapter}", seq.tokens, adapter=adapter, max_tokens=5, temperature=0.0, logprobs=0)
        cold = told(run_all(tiny_engine(model, adapters=folders, radix=False), [r]))
        no_radix = tiny_engine(model, adapters=folders, radix=False)
        parent = run_all(no_radix, [parked])["p"].sequences[0]
        no_radix.add(r, parent)
        out = run_all(no_radix, [])
        assert told(out) == cold
        assert (out[r.id].n_cached > 0) == shared


def test_pooled_states(model: Any, folders: dict[str, Path]) -> None:
    engine = tiny_engine(model, adapters=folders)
    pooled = {}
    for name in ("", "all"):
        r = Request(f"m{name}", tuple(PROMPT), GREEDY, generate=False, pool="mean", adapter=name)
        pooled[name] = run_all(engine, [r, replace(r, id="other", adapter="qv")])[r.id].sequences[0].pooled
    assert np.abs(pooled[""] - pooled["all"]).max() > 0.1


def test_unknown_names_are_refused(model: Any, folders: dict[str, Path]) -> None:
    engine = tiny_engine(model, adapters={"all": folders["all"]})
    with pytest.raises(RequestError, match=r"adapter = 'nobody': is not loaded; loaded are: all"):
        engine.add(request("r", PROMPT, adapter="nobody"))
    with pytest.raises(RequestError, match="loaded already"):
        engine.load_adapter("all", folders["qv"])
    for name in ("", "a" * 200, "new\nline", None):
        with pytest.raises(RequestError, match="printable"):
            engine.load_adapter(name, folders["qv"])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="is not loaded"):
        engine.unload_adapter("nobody")
    with pytest.raises(RequestError, match="without a reader"):
        Engine(
            model, engine.runner.cache, engine.runner.parts, engine.runner.scheduler.limits, engine.serving
        ).load_adapter("a", folders["qv"])
    assert not engine.has_work


def test_unloading_and_loading_while_serving(model: Any, folders: dict[str, Path]) -> None:
    """Who has begun keeps the adapter; a new one with other sites changes nobody's bits."""
    r = request("r", PROMPT, adapter="qv", max_tokens=20, temperature=0.0, logprobs=0)
    want = alone(model, folders, [r])
    engine = tiny_engine(model, adapters={"qv": folders["qv"]})
    engine.add(r)
    for _ in range(5):
        engine.step()
    engine.unload_adapter("qv")
    with pytest.raises(RequestError, match="loaded are: none"):
        engine.add(request("late", PROMPT, adapter="qv"))
    assert engine.adapters.n_bytes > 0
    engine.step()
    engine.load_adapter("all", folders["all"])
    engine.add(request("other", PROMPT[:9], adapter="all", max_tokens=3))
    assert told(run_all(engine, []))["r"] == want["r"]


def test_memory_is_bounded_and_comes_back(model: Any, folders: dict[str, Path]) -> None:
    sizes = {name: tiny_engine(model, adapters={name: path}).adapters.n_bytes for name, path in folders.items()}
    assert all(size > 0 for size in sizes.values())
    engine = tiny_engine(model, adapters={"all": folders["all"]}, adapter_memory=sizes["all"] + sizes["qv"] - 1)
    with pytest.raises(RequestError, match="adapter_memory"):
        engine.load_adapter("qv", folders["qv"])
    assert list(engine.adapters.loaded) == ["all"]
    output = run_all(engine, [request("r", PROMPT, adapter="all", max_tokens=2)])
    engine.unload_adapter("all")
    gc.collect()
    assert output["r"].sequences
    assert engine.adapters.n_bytes == 0
    engine.load_adapter("qv", folders["qv"])


def test_bytes_are_those_of_the_arrays(model: Any, folders: dict[str, Path]) -> None:
    """What the plan counts is what the native core holds."""
    native = pytest.importorskip("paceline.ops.native")
    from paceline.models import adapters

    held: list[int] = []

    class Spy:
        def adapter(self, sites: Any) -> None:
            for a, scale, parts in map(native._site, sites):
                held.append(a.nbytes + scale.nbytes + sum(b.nbytes for b, _, _ in parts))

    for dtype in ("auto", "bfloat16"):
        for path in folders.values():
            held.clear()
            adapter = adapters.load("x", path, 1 << 30, config=model.config, ops=Spy(), dtype=dtype)  # type: ignore[arg-type]
            assert sum(held) == adapter.n_bytes == adapters.size(path, model.config, dtype)


def test_no_adapters_no_cost(model: Any, folders: dict[str, Path]) -> None:
    """Steps in which nobody has one run the plain program."""
    engine = tiny_engine(model, adapters=folders)
    engine.runner.adapted = None  # would fail if it were used
    run_all(engine, [request("r", PROMPT, max_tokens=3)])
