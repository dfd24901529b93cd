"""Plans: every problem at once, memory predicted, defaults dropped with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from paceline.core.config import EngineConfig, Machine, ModelFacts, resolve
from paceline.core.errors import ConfigError, OutOfMemory, RequestError
from paceline.core.recipe import Recipe
from paceline.core.specs import KV
from paceline.core.technique import Fact, Manifest, Technique, make, parse_use, tune
from paceline.core.types import SamplingParams

GIB = 1 << 30


@dataclass(frozen=True)
class Index(Technique):
    name = "serving/index"
    size: int = tune(8, 1, 100, help="pages")

    def manifest(self) -> Manifest:
        return Manifest(frozenset({"prefix"}), needs=frozenset({Fact.PREFIX_PURE}))


@dataclass(frozen=True)
class Evicting(Technique):
    name = "kvcache/evicting"
    ratio: float = tune(0.5, 0.0, 1.0)

    def manifest(self) -> Manifest:
        return Manifest(frozenset({"kv_policy"}), breaks=frozenset({Fact.PREFIX_PURE, Fact.EXACT}))


@dataclass(frozen=True)
class Picky(Technique):
    name = "serving/picky"

    def manifest(self) -> Manifest:
        return Manifest(frozenset({"logits"}))

    def why_not(self, context: Any) -> str | None:
        return "it needs the moon"


LOOKUP = {t.name: t for t in (Index, Evicting, Picky)}


def lookup(name: str) -> type[Technique]:
    if name not in LOOKUP:
        raise ConfigError(f"use = {name!r}: no such technique")
    return LOOKUP[name]


def facts(**changes: Any) -> ModelFacts:
    base = {
        "name": "m",
        "model_type": "llama",
        "context": 1024,
        "max_context": 4096,
        "position_bytes": 64,
        "n_vocab": 100,
        "d_model": 64,
        "d_widest": 256,
        "states": (KV(2, 32),) * 4,
        "n_params": 1000,
        "weight_bytes": GIB,
        "formats": "bf16",
        "dtype": "bfloat16",
    }
    return ModelFacts(**{**base, **changes})


MACHINE = Machine(2, 4 * GIB, ("avx2", "amx"))


def test_a_plain_plan() -> None:
    plan = resolve(EngineConfig(), facts(), MACHINE, lookup, ["serving/index"])
    assert (plan.backend, plan.isa, plan.threads, plan.context) == ("native", "amx", 2, 1024)
    assert plan.kv_dtype == "bfloat16"
    assert plan.kv_bytes_per_token == 4 * 2 * 2 * 32 * 2
    assert [t.name for t in plan.techniques] == ["serving/index"]
    assert plan.n_pages * plan.page_size >= plan.context
    assert plan.fingerprint == resolve(EngineConfig(), facts(), MACHINE, lookup, ["serving/index"]).fingerprint


def test_all_problems_come_in_one_message() -> None:
    config = EngineConfig(
        dtype="float8", isa="avx9", max_rows=0, context=5000, use=("serving/none", "serving/index:size=1000")
    )
    with pytest.raises(ConfigError) as e:
        resolve(config, facts(), MACHINE, lookup)
    text = str(e.value)
    for part in ("dtype = 'float8'", "isa = 'avx9'", "max_rows = 0", "context = 5000", "serving/none", "size = 1000"):
        assert part in text


def test_asked_techniques_that_conflict_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="`serving/index` needs PREFIX_PURE, which `kvcache/evicting` breaks"):
        resolve(EngineConfig(use=("serving/index", "kvcache/evicting")), facts(), MACHINE, lookup)


def test_a_default_gives_way_and_says_why() -> None:
    plan = resolve(EngineConfig(use=("kvcache/evicting",)), facts(), MACHINE, lookup, ["serving/index"])
    assert [t.name for t in plan.techniques] == ["kvcache/evicting"]
    assert "PREFIX_PURE" in plan.refused["serving/index"]


def test_a_default_can_be_switched_off() -> None:
    plan = resolve(EngineConfig(use=("no:serving/index",)), facts(), MACHINE, lookup, ["serving/index"])
    assert plan.techniques == ()
    assert plan.refused == {}


def test_a_technique_may_refuse() -> None:
    with pytest.raises(ConfigError, match="needs the moon"):
        resolve(EngineConfig(use=("serving/picky",)), facts(), MACHINE, lookup)


def test_memory_is_predicted() -> None:
    with pytest.raises(OutOfMemory, match="needs .* GiB"):
        resolve(EngineConfig(), facts(weight_bytes=5 * GIB), MACHINE, lookup)
    big = facts(context=1 << 22, max_context=1 << 22)
    plan = resolve(EngineConfig(), big, MACHINE, lookup)
    assert plan.context < 1 << 22
    assert any("context reduced" in n for n in plan.notes)
    with pytest.raises(OutOfMemory, match=f"largest context that fits is {plan.context}"):
        resolve(EngineConfig(context=1 << 22), big, MACHINE, lookup)
    assert resolve(EngineConfig(context=plan.context), big, MACHINE, lookup).context == plan.context


def test_without_a_native_core() -> None:
    bare = Machine(2, 4 * GIB)
    assert resolve(EngineConfig(), facts(), bare, lookup).backend == "reference"
    with pytest.raises(ConfigError, match="native core is not built"):
        resolve(EngineConfig(backend="native"), facts(), bare, lookup)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a/b", ("a/b", {})),
        ("a/b:x=1,y=0.5, z-z=true,s=hello", ("a/b", {"x": 1, "y": 0.5, "z_z": True, "s": "hello"})),
    ],
)
def test_the_text_form(text: str, want: Any) -> None:
    assert parse_use(text) == want


def test_bad_options_are_named() -> None:
    with pytest.raises(ConfigError, match="not key=value"):
        parse_use("a/b:oops")
    with pytest.raises(ConfigError, match="unknown option 'sise'"):
        make("serving/index", {"sise": 1}, lookup)
    assert make("kvcache/evicting", {"ratio": 1}, lookup).ratio == 1.0  # type: ignore[attr-defined]


def test_recipes_are_checked() -> None:
    assert Recipe.parse(Recipe("x", ("a/b:c=1",)).text(), "s") == Recipe("x", ("a/b:c=1",))
    for bad in ("use = 3", "use = [1]", "oops = 1", "= ="):
        with pytest.raises(ConfigError, match="recipe"):
            Recipe.parse(bad, "s")


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"max_tokens": 0},
        {"n": 5_000_000},
        {"n": 0},
        {"logprobs": 1000},
        {"prompt_logprobs": -1},
        {"stop": [""]},
        {"stop": ["x"] * 500},
        {"stop_token_ids": [-1]},
        {"logit_bias": {0: 1e9}},
        {"min_tokens": 5, "max_tokens": 2},
        {"seed": 1 << 70},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"top_k": 1.5},
        {"n": True},
    ],
)
def test_absurd_sampling_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)
