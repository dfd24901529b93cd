"""Options in, plan out. `resolve` is pure: it reads no weights, changes nothing, and reports every problem at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from paceline.core import adapters, entries
from paceline.core import recipe as recipes
from paceline.core.errors import ConfigError, OutOfMemory
from paceline.core.scheduler import Limits
from paceline.core.specs import StateSpec
from paceline.core.technique import Technique, conflicts, make, parse_use

GIB = 1 << 30
RUNTIME_BYTES = 150 << 20  # interpreter, libraries, tokenizer and activations


@dataclass(frozen=True)
class Machine:
    """What the engine may use. memory: bytes available now, cgroup limits included."""

    n_cores: int
    memory: int
    isas: tuple[str, ...] = ()  # the native core's, best last; empty: no native core
    cpu: str = ""


@dataclass(frozen=True)
class EngineConfig:
    """Everything a user may set, all optional. Text values are those of the command line."""

    dtype: str = "auto"  # of unquantised weights: auto (as stored), float32, float16, bfloat16
    format: str = "auto"  # of matrices: auto, or a weight format such as int8, int4g:group=64
    kv_dtype: str = "auto"
    context: int | None = None
    kv_memory: int | None = None  # bytes
    page_size: int = 32
    max_rows: int = 512
    max_seqs: int = 64
    chunk: int | None = None
    threads: int | None = None
    backend: str = "auto"  # auto, native, reference, torch
    isa: str | None = None
    use: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()  # name=path of each that is loaded at start
    adapter_dtype: str = "auto"  # auto (as stored; float16 becomes float32), float32, bfloat16
    adapter_memory: int | None = None  # bytes for adapters, those loaded later included; None: what `adapters` take
    seed: int | None = None
    offline: bool | None = None
    chat_template: str | None = None

    def problems(self) -> list[str]:
        out = []

        def bounded(name: str, low: int, high: int) -> None:
            v = getattr(self, name)
            if v is not None and (isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high):
                out.append(f"{name} = {v!r}: must be an integer from {low} to {high}")

        bounded("context", 1, 1 << 24)
        bounded("kv_memory", 1 << 16, 1 << 46)
        bounded("adapter_memory", 0, 1 << 46)
        bounded("page_size", 1, 256)
        bounded("max_rows", 1, 1 << 16)
        bounded("max_seqs", 1, 4096)
        bounded("chunk", 1, 1 << 16)
        bounded("threads", 1, 1024)
        for name, known in (("dtype", tuple(entries.FLOATS)), ("kv_dtype", entries.KINDS)):
            if getattr(self, name) not in ("auto", *known):
                out.append(f"{name} = {getattr(self, name)!r}: must be auto, {', '.join(known)}")
        out += adapters.problems(self.adapters)
        if self.adapter_dtype not in adapters.DTYPES:
            out.append(f"adapter_dtype = {self.adapter_dtype!r}: must be {', '.join(adapters.DTYPES)}")
        if self.backend not in ("auto", "native", "reference", "torch"):
            out.append(f"backend = {self.backend!r}: must be auto, native, reference or torch")
        return out


@dataclass(frozen=True)
class ModelFacts:
    """What `resolve` must know of a model, all of it read without touching weights."""

    name: str
    model_type: str
    context: int  # what it was made for
    max_context: int  # as far as its positions reach
    position_bytes: int  # tables per position of the context (rotary)
    n_vocab: int
    d_model: int
    d_widest: int  # columns of the widest activation
    states: tuple[StateSpec, ...]
    n_params: int
    weight_bytes: int
    formats: str
    dtype: str  # of the unquantised weights as they will be kept
    notes: tuple[str, ...] = ()
    digest: str = ""  # of the weights
    adapter_bytes: int = 0  # of the adapters loaded at start


@dataclass(frozen=True)
class Plan:
    """The resolved configuration: what will run, and why."""

    model: ModelFacts
    machine: Machine
    backend: str
    isa: str | None
    threads: int
    context: int
    kv_dtype: str
    kv_bytes_per_token: int
    page_size: int
    n_pages: int
    limits: Limits
    techniques: tuple[Technique, ...] = ()
    notes: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    adapter_bytes: int = 0  # kept for adapters

    @property
    def kv_bytes(self) -> int:
        return self.kv_bytes_per_token * self.page_size * self.n_pages

    @property
    def peak_bytes(self) -> int:
        fixed = activation_bytes(self.model, self.limits) + self.context * self.model.position_bytes + RUNTIME_BYTES
        return self.model.weight_bytes + self.adapter_bytes + self.kv_bytes + fixed

    def describe(self) -> dict[str, Any]:
        """Plain data for JSON and tables."""
        return {
            "model": self.model.name,
            "model_type": self.model.model_type,
            "digest": self.model.digest,
            "parameters": self.model.n_params,
            "formats": self.model.formats,
            "weight_bytes": self.model.weight_bytes,
            "backend": self.backend,
            "isa": self.isa,
            "threads": self.threads,
            "context": self.context,
            "kv_dtype": self.kv_dtype,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_tokens": self.n_pages * self.page_size,
            "kv_bytes": self.kv_bytes,
            "adapter_bytes": self.adapter_bytes,
            "peak_bytes": self.peak_bytes,
            "limits": asdict(self.limits),
            "techniques": [describe(t) for t in self.techniques],
            "notes": list(self.notes) + list(self.model.notes),
            "refused": dict(self.refused),
        }

    @property
    def fingerprint(self) -> str:
        """A short hash of everything that can change an answer: not of sizes, which differ with the memory that is free."""
        sizes = ("kv_tokens", "kv_bytes", "peak_bytes", "adapter_bytes", "notes")
        text = json.dumps({k: v for k, v in self.describe().items() if k not in sizes}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(t: Technique) -> str:
    """`area/name:key=value,...` with the options that differ from their defaults; the values of secret ones are left out."""
    fields = type(t).__dataclass_fields__
    changed = [
        f"{k}={'***' if fields[k].metadata.get('secret') else v}"
        for k, v in asdict(t).items()
        if v != fields[k].default
    ]
    return t.name + (":" + ",".join(changed) if changed else "")


def activation_bytes(model: ModelFacts, limits: Limits) -> int:
    return 4 * limits.max_rows * (4 * model.d_model + 2 * model.d_widest) + 4 * limits.max_wanted * model.n_vocab


def kv_bytes_per_token(states: Sequence[StateSpec], dtype: str) -> int:
    return sum(2 * s.heads * entries.n_bytes(dtype, s.dim) for s in states)


def resolve(
    config: EngineConfig,
    model: ModelFacts,
    machine: Machine,
    lookup: Callable[[str], type[Technique]],
    defaults: Sequence[str] = (),
) -> Plan:
    """The plan, or ConfigError/OutOfMemory with everything that stands against it."""
    problems = config.problems()
    backend, isa = _backend(config, machine, problems)
    techniques, dropped = _techniques(config, lookup, defaults, problems)
    kv_dtype = config.kv_dtype if config.kv_dtype != "auto" else ("float32" if model.dtype == "float32" else "bfloat16")
    if config.context is not None and config.context > model.max_context:
        problems.append(f"context = {config.context}: the model's positions reach to {model.max_context}; ask for less")
    adapter_bytes = model.adapter_bytes if config.adapter_memory is None else config.adapter_memory
    if adapter_bytes < model.adapter_bytes:
        problems.append(f"adapter_memory = {adapter_bytes}: the adapters to be loaded take {model.adapter_bytes} bytes")
    if problems:
        raise ConfigError(problems)
    per_token = kv_bytes_per_token(model.states, kv_dtype)
    max_wanted = max(16, min(config.max_rows, (64 << 20) // (4 * model.n_vocab)))
    limits = Limits(config.max_rows, config.max_seqs, config.chunk or config.max_rows, max_wanted)
    context, n_pages, notes = _memory(config, model, machine, per_token, limits, adapter_bytes)
    if backend == "reference" and config.backend == "auto":
        notes.append(
            "the native core is not built, so this runs on the slow reference ops (`paceline doctor` says how to mend it)"
        )
    plan = Plan(
        model,
        machine,
        backend,
        isa,
        config.threads or machine.n_cores,
        context,
        kv_dtype,
        per_token,
        config.page_size,
        n_pages,
        limits,
        tuple(techniques),
        tuple(notes),
        dropped,
        adapter_bytes,
    )
    refused = [f"`{t.name}`: {why}" for t in techniques if (why := t.why_not(plan)) is not None]
    if refused:
        raise ConfigError(refused)
    return plan


def problems_without_model(
    config: EngineConfig, machine: Machine, lookup: Callable[[str], type[Technique]], defaults: Sequence[str] = ()
) -> list[str]:
    """Everything that stands against these options whatever the model, so that it is told before one is looked for."""
    problems = config.problems()
    _backend(config, machine, problems)
    _techniques(config, lookup, defaults, problems)
    return problems


def _backend(config: EngineConfig, machine: Machine, problems: list[str]) -> tuple[str, str | None]:
    backend = config.backend
    if backend == "auto":
        backend = "native" if machine.isas else "reference"
    if backend == "native" and not machine.isas:
        problems.append(
            "backend = 'native': the native core is not built; reinstall with a C++ compiler, or use backend=reference"
        )
        return backend, None
    if backend != "native":
        return backend, None
    isa = config.isa or machine.isas[-1]
    if isa not in machine.isas:
        problems.append(f"isa = {isa!r}: this machine has {', '.join(machine.isas)}")
    return backend, isa


def _techniques(
    config: EngineConfig, lookup: Callable[[str], type[Technique]], defaults: Sequence[str], problems: list[str]
) -> tuple[list[Technique], dict[str, str]]:
    """Asked techniques must work together; a default that does not fit them is dropped, with its reason."""
    kept, asked_texts = recipes.merge(defaults, config.use)
    asked: list[Technique] = []
    for text in asked_texts:
        try:
            asked.append(make(*parse_use(text), lookup))
        except ConfigError as e:
            problems += e.problems
    problems += conflicts(asked)
    dropped: dict[str, str] = {}
    chosen = list(asked)
    for text in kept:
        candidate = make(*parse_use(text), lookup)
        against = conflicts([*chosen, candidate])
        if against and not conflicts(chosen):
            dropped[candidate.name] = "; ".join(against)
        else:
            chosen.append(candidate)
    return chosen, dropped


def _memory(
    config: EngineConfig, model: ModelFacts, machine: Machine, per_token: int, limits: Limits, adapter_bytes: int
) -> tuple[int, int, list[str]]:
    """(context, pages, notes). The pool holds at least one full context and at most half of the memory left."""
    notes: list[str] = []
    fixed = model.weight_bytes + adapter_bytes + activation_bytes(model, limits) + RUNTIME_BYTES
    left = machine.memory - fixed
    page_bytes = max(1, (per_token + model.position_bytes) * config.page_size)
    fits = max(0, (left if config.kv_memory is None else min(left, config.kv_memory)) // page_bytes) * config.page_size
    wanted = config.context or model.context
    if left < 0 or fits < min(wanted, config.page_size):
        raise OutOfMemory(
            f"{model.name}: needs {fixed / GIB:.2f} GiB for weights ({model.weight_bytes / GIB:.2f}) and working memory, and "
            f"{machine.memory / GIB:.2f} GiB are available; use a smaller format (for example --format int4) or a smaller model"
        )
    if wanted > fits:
        if config.context is not None:
            raise OutOfMemory(
                f"context = {wanted}: its KV cache needs {wanted * per_token / GIB:.2f} GiB beside {fixed / GIB:.2f} GiB of weights "
                f"and working memory, and {machine.memory / GIB:.2f} GiB are available; the largest context that fits is {fits}"
            )
        notes.append(f"context reduced from {wanted} to {fits}: that is what fits in memory")
        wanted = int(fits)
    pool = fits if config.kv_memory is not None else max(wanted, min(limits.max_seqs * wanted, fits // 2))
    n_pages = -(-int(pool) // config.page_size) + 1
    return wanted, n_pages, notes
