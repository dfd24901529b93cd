"""The loader on checkpoints made in memory: what it checks, how it fuses, which formats come out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import backends, make_ops, run

from paceline import models
from paceline.checkpoints import open_checkpoint
from paceline.checkpoints.base import TensorInfo
from paceline.checkpoints.packed import save_packed
from paceline.core.errors import CheckpointError, ConfigError
from paceline.models.loader import INT8, FormatChoice, load, parameters, plan_sizes
from paceline.ops import formats
from paceline.ops.formats.base import dequantise
from paceline.ops.packed import Codes, Packed

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
Q, K, V = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


class Memory:
    """A checkpoint in memory that counts what is read."""

    path = Path("memory")

    def __init__(self, config: dict[str, Any], tensors: dict[str, Any]):
        self.config, self.weights, self.generation = dict(config), tensors, {}
        self.reads: list[str] = []

    def tensors(self) -> dict[str, TensorInfo]:
        names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
        out = {}
        for name, w in self.weights.items():
            if isinstance(w, Codes):
                out[name] = TensorInfo(w.q.shape, f"int{w.bits}", w.q.nbytes)
            elif isinstance(w, Packed):
                out[name] = TensorInfo(w.shape, w.format, w.nbytes)
            else:
                out[name] = TensorInfo(w.shape, names[w.dtype.name], w.nbytes)
        return out

    def read(self, name: str) -> Any:
        self.reads.append(name)
        return self.weights[name]

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def random_checkpoint(dtype: Any = np.float32, **changes: Any) -> Memory:
    config = {**CONFIG, **changes}
    rng = np.random.default_rng(0)
    c = models.read(config)
    tensors = {}
    for p in models.get(c.model_type).Net.params(c).values():
        for source, rows in zip(p.sources, p.rows_of(), strict=True):
            shape = (rows, *p.shape[1:])
            w = (
                rng.standard_normal(shape) / shape[-1] ** 0.5
                if len(shape) == 2
                else 1 + 0.1 * rng.standard_normal(shape)
            )
            tensors[source] = w.astype(dtype)
    return Memory(config, tensors)


def codes(n_out: int, n_in: int, bits: int, group: int, mins: bool, seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    shape = (n_out, n_in // group)
    low, high, dtype = (-127, 128, np.int8) if bits == 8 else (0, 16, np.uint8)
    scales = (rng.random(shape) * 0.02 + 0.001).astype(np.float16)
    least = (-rng.random(shape) * 0.1).astype(np.float16) if mins else None
    return Codes(bits, rng.integers(low, high, (n_out, n_in)).astype(dtype), scales, least, group)


def loaded(checkpoint: Memory, format: FormatChoice | None = None, context: int = 16) -> Any:
    return load(checkpoint, make_ops("reference"), format=format or FormatChoice(), context=context)


def same(a: Packed, b: Packed) -> bool:
    pairs = [(a.data, b.data), (a.scales, b.scales), (a.mins, b.mins)]
    equal = all((x is None and y is None) or np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)
    return equal and (a.format, a.shape, a.group) == (b.format, b.shape, b.group)


def test_parts_are_fused_in_order() -> None:
    checkpoint = random_checkpoint()
    model = loaded(checkpoint)
    fused = np.concatenate([checkpoint.weights[n] for n in (Q, K, V)])
    assert same(model.w["layers.0.attn.qkv"], formats.get("f32").pack(fused, group=0, mins=False))
    assert model.notes == ()


def test_everything_wrong_is_told_before_a_weight_is_read() -> None:
    checkpoint = random_checkpoint()
    del checkpoint.weights[K]
    checkpoint.weights[Q] = np.zeros((8, 64), np.float32)
    checkpoint.weights["model.layers.0.mystery"] = np.zeros(3, np.float32)
    checkpoint.weights["lm_head.weight"] = np.zeros((48, 64), np.float32)
    with pytest.raises(CheckpointError) as e:
        loaded(checkpoint)
    text = str(e.value)
    assert text.startswith("3 tensors")
    assert f"{K} is missing" in text
    assert "model.layers.0.mystery is unknown" in text
    assert "lm_head.weight has 48 rows, but vocab_size = 50: vocabulary mismatch" in text
    checkpoint.weights[K] = np.zeros((32, 64), np.float32)
    with pytest.raises(CheckpointError, match=re.escape(f"{Q} has shape (8, 64), expected (64, 64)")):
        loaded(checkpoint)
    assert checkpoint.reads == []


def test_many_problems_are_cut_short() -> None:
    checkpoint = random_checkpoint()
    checkpoint.weights |= {f"extra.{i}": np.zeros(1, np.float32) for i in range(500)}
    with pytest.raises(CheckpointError, match="and 480 more"):
        loaded(checkpoint)


def test_tied_heads_and_rotary_tables_are_ignored() -> None:
    checkpoint = random_checkpoint(tie_word_embeddings=True)
    checkpoint.weights["lm_head.weight"] = np.zeros((50, 64), np.float32)
    checkpoint.weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    loaded(checkpoint)
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & set(checkpoint.reads)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [V, "model.norm.weight"])
def test_weights_that_are_no_numbers_are_an_error(name: str, value: float, dtype: Any) -> None:
    checkpoint = random_checkpoint(dtype)
    checkpoint.weights[name].reshape(-1)[-1] = value
    with pytest.raises(CheckpointError, match=re.escape(name) + ".* holds? .*NaN"):
        loaded(checkpoint)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_numbers_are_fine(dtype: Any) -> None:
    checkpoint = random_checkpoint(dtype)
    checkpoint.weights["model.norm.weight"][0] = checkpoint.weights[V][0, 0] = ml_dtypes.finfo(dtype).max
    assert loaded(checkpoint).w["norm"][0] == np.float32(ml_dtypes.finfo(dtype).max)


def test_nan_scales_are_an_error() -> None:
    checkpoint = random_checkpoint()
    bad = codes(64, 64, 4, 32, False, 0)
    bad.scales[3, 1] = np.nan
    checkpoint.weights["model.layers.0.self_attn.o_proj.weight"] = bad
    with pytest.raises(CheckpointError, match=r"o_proj\.weight.* hold NaN"):
        loaded(checkpoint)


@pytest.mark.parametrize(("bits", "group", "mins"), [(4, 32, False), (4, 64, True), (8, 32, False)])
@pytest.mark.parametrize("format", ["auto", "own"])
def test_codes_are_kept_code_by_code(bits: int, group: int, mins: bool, format: str) -> None:
    checkpoint = random_checkpoint()
    parts = [codes(n, 64, bits, group, mins, i) for i, n in enumerate((64, 32, 32))]
    checkpoint.weights |= dict(zip((Q, K, V), parts, strict=True))
    choice = FormatChoice.parse("int8" if bits == 8 else "int4g") if format == "own" else FormatChoice()
    model = loaded(checkpoint, choice)
    fused = Codes(
        bits,
        np.concatenate([p.q for p in parts]),
        np.concatenate([p.scales for p in parts]),
        np.concatenate([p.mins for p in parts]) if mins else None,
        group,
    )
    expected = formats.get("int8" if bits == 8 else "int4g").pack(fused, group=group, mins=mins)
    assert same(model.w["layers.0.attn.qkv"], expected)
    assert model.notes == ()


def test_mixed_codes_are_decoded_and_said() -> None:
    checkpoint = random_checkpoint()
    checkpoint.weights[Q] = codes(64, 64, 4, 32, False, 1)
    checkpoint.weights[K] = codes(32, 64, 8, 32, False, 2)
    model = loaded(checkpoint)
    values = np.concatenate(
        [dequantise(checkpoint.weights[Q]), dequantise(checkpoint.weights[K]), checkpoint.weights[V]]
    )
    assert same(model.w["layers.0.attn.qkv"], formats.get("int8").pack(values, group=32, mins=False))
    assert len(model.notes) == 1
    assert "layers.0.attn.qkv" in model.notes[0]
    assert "int8:group=32" in model.notes[0]
    assert loaded(checkpoint, FormatChoice.parse("bf16")).w["layers.0.attn.qkv"].format == "bf16"


def test_dtype_is_for_plain_numbers_only() -> None:
    checkpoint = random_checkpoint(ml_dtypes.bfloat16)
    checkpoint.weights["model.layers.0.self_attn.o_proj.weight"] = codes(64, 64, 4, 32, False, 1)
    w = loaded(checkpoint, FormatChoice.parse("auto", "float32")).w
    assert (w["layers.0.attn.out"].format, w["layers.1.attn.out"].format, w["embed"].format) == ("int4g", "f32", "f32")
    w = loaded(checkpoint, FormatChoice.parse("f16", "float32")).w
    assert (w["layers.0.attn.out"].format, w["embed"].format) == ("f16", "f16")


def test_own_checkpoints_are_taken_as_they_are() -> None:
    model = loaded(random_checkpoint(), FormatChoice.parse("int4g:group=64,mins=1"))
    again = loaded(Memory(CONFIG, dict(model.w)))
    for name, w in model.w.items():
        assert again.w[name] is w or np.array_equal(again.w[name], w)
    assert np.array_equal(run(model, model.ops, [TOKENS]), run(again, again.ops, [TOKENS]))
    assert again.notes == ()
    other = loaded(Memory(CONFIG, dict(model.w)), FormatChoice.parse("bf16"))
    assert {w.format for w in other.w.values() if isinstance(w, Packed)} == {"bf16"}
    assert len(other.notes) == sum(isinstance(w, Packed) for w in model.w.values())


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.float32, "f32"), (np.float16, "f16"), (ml_dtypes.bfloat16, "bf16")]
)
def test_auto_keeps_the_stored_type(dtype: Any, expected: str) -> None:
    checkpoint = random_checkpoint(dtype)
    model = loaded(checkpoint)
    assert {w.format for w in model.w.values() if isinstance(w, Packed)} == {expected}
    assert all(w.dtype == np.float32 for w in model.w.values() if isinstance(w, np.ndarray))


@pytest.mark.parametrize(
    "text",
    ["auto", "f32", "float16", "bf16", "int8", "int8:group=0", "int4", "int4g:group=64,mins=1", "int4g:group=128"],
)
def test_sizes_are_foretold_to_the_byte(text: str) -> None:
    checkpoint = random_checkpoint(ml_dtypes.bfloat16)
    choice = FormatChoice.parse(text)
    sizes = plan_sizes(models.read(checkpoint.config), choice, checkpoint)
    assert checkpoint.reads == []
    model = loaded(checkpoint, choice)
    assert dict(sizes.params) == {name: w.nbytes for name, w in model.w.items()}
    assert ("int8:group=32 (embed, head)" in sizes.formats) == (text.startswith("int") and text != "int8")
    own = Memory(CONFIG, dict(model.w))
    for again in (FormatChoice(), choice):
        assert plan_sizes(models.read(CONFIG), again, own).params == sizes.params
    assert sizes.n_params == sum(w.size for w in checkpoint.weights.values())
    linear = {w.format for name, w in model.w.items() if isinstance(w, Packed) and ".attn." in name}
    assert linear == {"bf16" if text == "auto" else formats.parse(text).name}
    head = model.w["head"]
    assert (head.format, head.group) == (("int8", 32) if "int" in text else (linear.pop(), 0))
    assert sizes.dtype == {"f32": "float32", "float16": "float16"}.get(text, "bfloat16")


def test_overrides_and_progress() -> None:
    int4 = formats.Spec("int4", 32)
    choice = FormatChoice(int4, overrides=((r"layers\.1\..*", INT8), ("head", formats.Spec("f16"))))
    calls: list[tuple[int, int, str]] = []
    model = load(
        random_checkpoint(), make_ops("reference"), format=choice, context=8, progress=lambda *a: calls.append(a)
    )
    got = {name: w.format for name, w in model.w.items() if isinstance(w, Packed)}
    assert (got["layers.0.mlp.down"], got["layers.1.mlp.down"], got["head"]) == ("int4", "int8", "f16")
    assert [c[2] for c in calls] == list(model.w)
    assert calls[-1][0] == calls[-1][1] == sum(w.nbytes for w in model.w.values())


SPLIT = FormatChoice(formats.Spec("int4g", 64), coarse_from=32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", backends())
def test_a_coarse_copy_of_the_head(tied: bool, backend: str) -> None:
    checkpoint = random_checkpoint(ml_dtypes.bfloat16, tie_word_embeddings=tied)
    name, source = ("embed", "model.embed_tokens.weight") if tied else ("head", "lm_head.weight")
    config = models.read(checkpoint.config)
    sizes = plan_sizes(config, SPLIT, checkpoint)
    model = load(checkpoint, make_ops(backend), format=SPLIT, context=16)
    assert same(model.w[f"{name}.coarse"], formats.get("int4").pack(checkpoint.weights[source]))
    assert same(model.w[name], formats.get("int8").pack(checkpoint.weights[source]))
    assert dict(sizes.params) == {n: w.nbytes for n, w in model.w.items()}
    assert sizes.n_params == sum(w.size for w in checkpoint.weights.values())
    assert "int4:group=32 (coarse head)" in sizes.formats
    assert model.notes == ()
    one_pass = load(checkpoint, make_ops(backend), format=replace(SPLIT, coarse_from=None), context=16)
    assert f"{name}.coarse" not in one_pass.w  # all of its few outputs are computed again: the same bits
    assert np.array_equal(run(model, model.ops, [TOKENS]), run(one_pass, one_pass.ops, [TOKENS]))


def test_who_gets_a_coarse_copy() -> None:
    def copied(format: FormatChoice, **changes: Any) -> bool:
        sizes = plan_sizes(models.read({**CONFIG, **changes}), format)
        return "head.coarse" in sizes.params

    large = {"vocab_size": 1 << 14}
    for text, wanted in {"int4": 1, "int4g:group=64": 1, "int8": 0, "int8:group=0": 0, "bf16": 0, "auto": 0}.items():
        assert copied(FormatChoice.parse(text), **large) == wanted
    int4 = FormatChoice.parse("int4")
    assert not copied(int4, vocab_size=(1 << 14) - 1)
    assert not copied(replace(int4, coarse_from=None), **large)
    assert not copied(replace(int4, overrides=(("head", formats.Spec("bf16")),)), **large)
    assert not copied(replace(int4, head=formats.Spec("int8", 64)), **large)
    assert copied(replace(int4, overrides=(("head", INT8),)), **large)


def test_own_checkpoints_hold_the_coarse_copy_or_go_without() -> None:
    model = loaded(random_checkpoint(), SPLIT)
    own = Memory(CONFIG, dict(model.w))
    for format in (FormatChoice(), SPLIT):
        again = loaded(own, format)
        assert again.w["head.coarse"] is model.w["head.coarse"]
        assert plan_sizes(models.read(CONFIG), format, own).params == {n: w.nbytes for n, w in model.w.items()}
        assert again.notes == ()
    for format in (FormatChoice.parse("bf16"), FormatChoice.parse("int8"), replace(SPLIT, coarse_from=None)):
        own.reads.clear()
        assert "head.coarse" not in loaded(own, format).w
        assert "head.coarse" not in own.reads
    del own.weights["head.coarse"]  # as written before there were any
    for format in (FormatChoice(), SPLIT):
        assert "head.coarse" not in loaded(own, format).w


@pytest.mark.parametrize("backend", backends())
def test_a_coarse_copy_survives_the_disk(tmp_path: Path, backend: str) -> None:
    checkpoint = random_checkpoint(vocab_size=1200, tie_word_embeddings=True)
    choice = replace(SPLIT, coarse_from=1200)
    config = models.read(checkpoint.config)
    save_packed(tmp_path / "own", checkpoint.config, parameters(checkpoint, config, choice, []), form="int4g")
    own = open_checkpoint(tmp_path / "own")
    a, b = (load(c, make_ops(backend), format=f, context=16) for c, f in ((checkpoint, choice), (own, FormatChoice())))
    assert same(a.w["embed.coarse"], b.w["embed.coarse"])
    assert plan_sizes(config, FormatChoice(), own).params == {name: w.nbytes for name, w in a.w.items()}
    logits = run(a, a.ops, [TOKENS])
    assert np.array_equal(run(b, b.ops, [TOKENS]), logits)
    plain = load(checkpoint, make_ops(backend), format=replace(choice, coarse_from=None), context=16)
    exact = run(plain, plain.ops, [TOKENS])
    again = logits == exact  # 64 of the 75 blocks, the likeliest among them
    assert (again.sum(axis=1) >= 1024).all()
    assert not again.all()
    assert again[np.arange(len(TOKENS)), logits.argmax(axis=1)].all()
    own.close()


def test_context_and_backend_refusals() -> None:
    for context in (0, 33):
        with pytest.raises(ConfigError, match=f"context = {context}: must be from 1 to 32"):
            loaded(random_checkpoint(), context=context)
    ops = make_ops("reference")
    ops.why_not = lambda w: "no f16 kernel" if w.format == "f16" else None
    with pytest.raises(ConfigError, match=r"f16 of embed: reference ops refuse it: no f16 kernel"):
        load(random_checkpoint(), ops, format=FormatChoice.parse("f16"), context=8)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("text", ["f16", "bf16", "int8", "int8:group=0", "int4", "int4g:group=64,mins=1"])
def test_other_formats_stay_close(text: str, backend: str) -> None:
    exact = loaded(random_checkpoint())
    ops = make_ops(backend)
    close = load(random_checkpoint(), ops, format=FormatChoice.parse(text), context=16)
    a, b = run(exact, exact.ops, [TOKENS]), run(close, ops, [TOKENS])
    bound = 0.5 if text.startswith("int4") else 0.05
    assert 0 < np.abs(a - b).max() < bound * np.abs(a).max()
    same_format = loaded(random_checkpoint(), FormatChoice.parse(text))
    on_tiles = text == "int8" and getattr(ops, "isa", "").startswith("amx")  # activations in bfloat16 there
    assert (
        np.abs(run(same_format, same_format.ops, [TOKENS]) - b).max() < (0.03 if on_tiles else 0.01) * np.abs(a).max()
    )


def test_routers_and_positions_stay_in_floating_point() -> None:
    mixture = random_checkpoint(ml_dtypes.bfloat16, model_type="mixtral", num_local_experts=3)
    w = loaded(mixture, FormatChoice.parse("int4")).w
    assert w["layers.0.moe.router"].format == "f32"
    assert w["layers.0.moe.2.down"].format == "int4"
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 32}
    c = models.read({**gpt2, "vocab_size": 50})
    rng = np.random.default_rng(0)
    tensors = {}
    for p in models.get("gpt2").Net.params(c).values():
        shape = p.shape[::-1] if p.transpose else p.shape
        tensors[p.sources[0]] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    checkpoint = Memory({**gpt2, "vocab_size": 50}, tensors)
    w = loaded(checkpoint, FormatChoice.parse("int8")).w
    assert (w["positions"].format, w["embed"].format) == ("bf16", "int8")
