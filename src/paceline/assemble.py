"""The composition root: from a model's name and options to a running engine. The only module that knows all layers.

`inspect` reads no weights; `assemble` loads them as the plan says.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from paceline import __version__, lab, models, techniques
from paceline.analysis.hardware import host
from paceline.checkpoints import open_checkpoint
from paceline.checkpoints.base import Checkpoint
from paceline.checkpoints.detokenize import Detokenizer, StopScanner
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core import adapters as names
from paceline.core.adapters import Adapters
from paceline.core.clock import Clock
from paceline.core.config import EngineConfig, Machine, ModelFacts, Plan, describe, problems_without_model, resolve
from paceline.core.engine import Engine, Serving
from paceline.core.errors import CheckpointError, ConfigError
from paceline.core.kvcache import KVCache, make_groups
from paceline.core.recipe import Recipe
from paceline.core.runner import Parts
from paceline.core.tiers import Tiers
from paceline.core.types import SamplingParams
from paceline.models import adapters, loader
from paceline.models.base import Model, ModelConfig
from paceline.ops import Ops

Progress = Callable[[int, int, str], None]


@dataclass
class Inspected:
    """A model looked at but not loaded: its checkpoint, hyper-parameters, tokenizer and the plan to run it."""

    checkpoint: Checkpoint
    config: ModelConfig
    formats: loader.FormatChoice
    tokenizer: Tokenizer | None
    plan: Plan


def default_use() -> tuple[str, ...]:
    """The techniques that run unless told otherwise (recipes/default.toml)."""
    text = resources.files("paceline").joinpath("recipes/default.toml").read_text(encoding="utf-8")
    return Recipe.parse(text, "default").use


def machine() -> Machine:
    h = host.detect()
    return Machine(h.n_cores, h.memory_available, native_isas(), h.cpu)


def native_isas() -> tuple[str, ...]:
    """ISAs of the native core on this machine, best last; empty when it was not built."""
    try:
        from paceline import _native
    except ImportError:
        return ()
    return tuple(name for name, problem in _native.instruction_sets() if not problem and not name.endswith("_emulated"))


def locate(model: str | Path | None) -> str | Path:
    """None and the names of embedded models stand for the packaged folders."""
    if model is None:
        return lab.path()
    return lab.path(model) if isinstance(model, str) and model in lab.names() else model


def open_model(model: str | Path | Checkpoint | None, config: EngineConfig) -> Checkpoint:
    if model is None or isinstance(model, (str, Path)):
        return open_checkpoint(locate(model), offline=config.offline)
    return model


def inspect(model: str | Path | Checkpoint | None, config: EngineConfig, progress: Any = None) -> Inspected:
    """Everything that can be known and refused before a weight is read. Raises PacelineError subclasses."""
    here = machine()
    problems = problems_without_model(config, here, techniques.get, default_use())
    try:
        formats = loader.FormatChoice.parse(config.format)
    except ConfigError as e:
        problems += e.problems
    if problems:
        raise ConfigError(problems)
    formats = loader.FormatChoice.parse(config.format, config.dtype)
    checkpoint = open_model(model, config)
    model_config = models.read(checkpoint.config)
    sizes = loader.plan_sizes(model_config, formats, checkpoint)
    tokenizer = read_tokenizer(checkpoint)
    if tokenizer is not None:
        tokenizer.check(model_config.n_vocab)
    facts = ModelFacts(
        name=str(model) if isinstance(model, (str, Path)) else checkpoint.path.name,
        model_type=model_config.model_type,
        context=model_config.context,
        max_context=max(model_config.context, model_config.max_context),
        position_bytes=sum(4 * spec.dim for spec in model_config.rope.values()),
        n_vocab=model_config.n_vocab,
        d_model=model_config.d_model,
        d_widest=max(2 * model_config.d_ff, model_config.n_heads * model_config.head_dim * 3),
        states=model_config.states,
        n_params=sizes.n_params,
        weight_bytes=sizes.n_bytes,
        formats=sizes.formats,
        dtype=sizes.dtype,
        notes=tuple(getattr(checkpoint, "notes", ())),
        digest=checkpoint.digest(),
        adapter_bytes=sum(
            adapters.size(path, model_config, config.adapter_dtype) for _, path in map(names.parse, config.adapters)
        ),
    )
    plan = resolve(config, facts, here, techniques.get, default_use())
    return Inspected(checkpoint, model_config, formats, tokenizer, plan)


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The model's tokenizer; None when it has none (token ids in, token ids out)."""
    metadata = getattr(checkpoint, "metadata", None)
    if metadata and "tokenizer.ggml.tokens" in metadata:
        return Tokenizer.from_gguf(metadata)
    if not checkpoint.path.exists():
        return None
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    return Tokenizer.from_folder(folder) if any((folder / n).exists() for n in names) else None


def make_ops(plan: Plan) -> Ops:
    """The backend the plan names."""
    if plan.backend == "native":
        from paceline.ops.native import NativeOps

        return NativeOps(plan.isa, plan.threads)
    from paceline.ops.reference import ReferenceOps

    n_decoded = plan.model.n_params + plan.model.n_vocab * plan.model.d_model  # a coarse copy of the head comes on top
    if plan.backend == "torch":
        try:
            import torch
        except ImportError:
            raise ConfigError("backend = 'torch': PyTorch is not installed; pip install 'paceline[torch]'") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return ReferenceOps(xp=torch, device=device, cache_bytes=4 * n_decoded, invariant=device == "cpu")
    decoded = 4 * n_decoded  # every matrix as float32, so that it is unpacked once
    return ReferenceOps(cache_bytes=decoded if decoded < (plan.machine.memory - plan.peak_bytes) // 2 else 0)


class StreamText:
    """Detokeniser and stop scanner of one completion (`core.engine.TextStream`)."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._words = Detokenizer(tokenizer, params.skip_special_tokens, params.show_special)
        self._scanner = StopScanner(params.stop, include_stop=params.include_stop) if params.stop else None
        self._stopped = False

    def push(self, token: int) -> tuple[str, str | None]:
        text = self._words.push([token])
        if self._scanner is None:
            return text, None
        text, matched = self._scanner.push(text)
        self._stopped = self._stopped or matched is not None
        return text, matched

    def finish(self) -> str:
        if self._stopped:
            return ""
        text = self._words.finish()
        if self._scanner is None:
            return text
        shown, matched = self._scanner.push(text)
        return shown if matched is not None else shown + self._scanner.finish()


@dataclass
class Assembled:
    inspected: Inspected
    model: Model
    engine: Engine


def assemble(
    model: str | Path | Checkpoint | None,
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Assembled:
    """Load a model and build its engine. Raises PacelineError subclasses before or while loading; nothing is left behind."""
    seen = inspect(model, config, progress)
    plan, tokenizer = seen.plan, seen.tokenizer
    ops = make_ops(plan)
    told = None if progress is None else under("loading weights", progress)
    net = loader.load(seen.checkpoint, ops, format=seen.formats, context=plan.context, progress=told)
    groups = make_groups(seen.config.states, plan.page_size)
    cache = KVCache(groups, ops, plan.kv_dtype, plan.n_pages)
    eos = end_tokens(seen)
    parts = build_parts(BuildContext(plan, cache, tokenizer, eos), net)
    capacity = min(plan.context, (plan.n_pages - 1) * plan.page_size)
    serving = Serving(seen.config.n_vocab, capacity, eos, "the context" if capacity == plan.context else "the KV cache")
    text: dict[str, Any] = {} if tokenizer is None else {"text": lambda p: StreamText(tokenizer, p)}
    read = functools.partial(adapters.load, config=seen.config, ops=ops, dtype=config.adapter_dtype)
    loaded = Adapters(read, plan.adapter_bytes)
    engine = Engine(net, cache, parts, plan.limits, serving, clock=clock, adapters=loaded, **text)
    for name, path in map(names.parse, config.adapters):
        engine.load_adapter(name, path)
    return Assembled(seen, net, engine)


def under(title: str, progress: Progress) -> Progress:
    """The same progress under one title, whatever part is in hand."""
    return lambda done, total, part: progress(done, total, title)


@dataclass(frozen=True)
class BuildContext:
    """What a technique's `build` may use."""

    plan: Plan
    cache: KVCache
    tokenizer: Tokenizer | None
    eos: frozenset[int]


def build_parts(context: BuildContext, net: Model) -> Parts:
    parts = Parts()
    for technique in context.plan.techniques:
        seams = sorted(technique.manifest().seams)
        built = technique.build(context)
        for seam, part in (built if isinstance(built, dict) else {seams[0]: built}).items():
            held = getattr(parts, seam)
            if isinstance(held, list):
                held.append(part)
            else:
                setattr(parts, seam, part)
    if parts.kv_tier:
        assert parts.prefix is not None  # each tier's `why_not` has seen to it
        parts.tiers = parts.prefix.watcher = Tiers(context.cache, parts.kv_tier, identity(context.plan, net))
    return parts


def identity(plan: Plan, net: Model) -> bytes:
    """Stands for all that decides the bits of a token's state, but for the cache's layout: model, formats, kernels, techniques."""
    beside = {
        "prefix",
        "schedule",
        "budget",
        "drafter",
        "acceptor",
        "controller",
        "logits",
        "kv_tier",
    }  # leave state as it is
    within = [describe(t) for t in plan.techniques if not t.manifest().seams <= beside]
    facts = (__version__, plan.backend, plan.isa, within)
    return hashlib.sha256(repr(facts).encode() + net.digest()).digest()


def end_tokens(seen: Inspected) -> frozenset[int]:
    """Tokens that end an answer: generation_config.json's, else the model's, and the tokenizer's end of turn."""
    from_file = seen.checkpoint.generation.get("eos_token_id")
    if isinstance(from_file, int):
        from_file = [from_file]
    ids = set(from_file or seen.config.eos)
    if seen.tokenizer is not None:
        ids |= seen.tokenizer.ends
    bad = [t for t in ids if not isinstance(t, int) or not 0 <= t < seen.config.n_vocab]
    if bad:
        raise CheckpointError(
            f"eos_token_id = {bad[0]!r}: must be from 0 to {seen.config.n_vocab - 1}; mend generation_config.json"
        )
    return frozenset(ids)


def environment(name: str) -> str | None:
    """PACELINE_<NAME>, empty meaning unset."""
    return os.environ.get(f"PACELINE_{name.upper()}") or None
