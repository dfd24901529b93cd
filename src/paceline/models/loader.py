"""From a checkpoint to a model: names and shapes are checked first, then weights are read and packed one by one.

Peak memory is the final size plus the parameter in hand: sources are views of the file, whose pages are given back after each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from paceline import models
from paceline.checkpoints.base import Checkpoint, TensorInfo
from paceline.core.errors import CheckpointError, ConfigError
from paceline.models.base import Model, ModelConfig, Param, coarse
from paceline.ops import Ops, formats
from paceline.ops.formats import Spec
from paceline.ops.formats.base import dequantise
from paceline.ops.packed import Codes, Packed

Progress = Callable[[int, int, str], None]
"""Called after each parameter with the bytes packed so far, the bytes expected in the end, and the parameter's name."""

Packer = Callable[[Any, str, "int | None", bool], Packed]
"""`Ops.pack`: a matrix, and the name, group and mins of its format."""

F32 = Spec("f32")
INT8 = Spec("int8", 32)
INT4 = Spec("int4", 32)

_FLOATS = {"f32", "f16", "bf16", "f64"}  # stored dtypes that are plain numbers
_MAX_SHOWN = 20


@dataclass(frozen=True)
class FormatChoice:
    """Which format each kind of parameter gets. None means as the checkpoint stores it.

    linear: the matrices of the layers. head: embedding and head; by default as `linear`, but int8 in groups of 32 where
    that is quantised, since they decide between tokens. Where both leave a matrix as it is, and it is stored as
    plain numbers, it becomes `dtype`. Routers are float32 (they are small and decide between experts), position tables
    stay in floating point, vectors are float32. overrides: (regular expression of a parameter's name, format), of
    which the first match wins.

    coarse_from: where the layers are quantised to 4 bits and the head to int8 in groups of 32, a head of so many outputs
    is kept in int4 as well, and its logits are computed in two passes (`Ops.rescored`); None: never.
    """

    linear: Spec | None = None
    head: Spec | None = None
    dtype: Spec | None = None
    overrides: tuple[tuple[str, Spec], ...] = ()
    coarse_from: int | None = 1 << 14

    @classmethod
    def parse(cls, format: str = "auto", dtype: str = "auto") -> FormatChoice:
        """From the texts a user gives; `dtype` is for matrices that are not quantised. Raises ConfigError."""
        linear, plain = (None if text == "auto" else formats.parse(text) for text in (format, dtype))
        return cls(linear, dtype=plain)

    def wanted(self, name: str, kind: str, stored: Iterable[str]) -> Spec | None:
        """What `name`, found as `stored` dtypes, should be kept in; None: as it comes."""
        if kind == "coarse":
            return INT4
        plain = set(stored) <= _FLOATS
        for pattern, override in self.overrides:
            if re.fullmatch(pattern, name):
                return override
        if kind == "router":
            return F32
        if kind == "position":
            return None if plain else F32
        asked = self.linear
        if kind in ("embed", "head"):
            quantised = asked is not None and formats.get(asked.name).quantised
            asked = self.head or (INT8 if quantised else asked)
        return asked or (self.dtype if plain else None)

    def coarse(self, name: str, p: Param, stored: Collection[str], as_stored: bool = False) -> bool:
        """Whether the head `name`, found as `stored` dtypes, gets a coarse copy, or keeps the one that is stored."""
        if self.coarse_from is None:
            return False
        kept = self.wanted(name, p.kind, stored)
        if self.linear is None:
            return as_stored and kept in (None, INT8) and set(stored) == {INT8.name}
        few_bits = formats.get(self.linear.name).quantised and self.linear.bits < 8
        return few_bits and kept == INT8 and p.shape[0] >= self.coarse_from


@dataclass(frozen=True)
class Sizes:
    """What loading will take, known before a weight is read. `params`: bytes by parameter."""

    params: Mapping[str, int]
    n_params: int
    formats: str
    dtype: str  # float32, float16 or bfloat16: the widest of the matrices that are not quantised

    @property
    def n_bytes(self) -> int:
        return sum(self.params.values())


# ---------------------------------------------------------------- what is where


def _params(config: ModelConfig, format: FormatChoice, infos: Mapping[str, TensorInfo]) -> dict[str, Param]:
    """The program's parameters, and the coarse copy of its head where there is to be one.

    Our own checkpoints hold the copy or go without: making it would read all of the head. Others give it from the
    head's own sources.
    """
    params = models.get(config.model_type).Net.params(config)
    name = config.output
    p, copy = params[name], coarse(name)
    if name in infos:
        wanted = copy in infos and format.coarse(name, p, [infos[name].dtype], as_stored=True)
    else:
        wanted = format.coarse(name, p, {infos[s].dtype for s in p.sources if s in infos})
    return {**params, copy: replace(p, kind="coarse")} if wanted else params


def _places(params: Mapping[str, Param], infos: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    """The checkpoint's tensors for each parameter: itself in our own checkpoints, else its Hugging Face sources."""
    return {name: (name,) if name in infos else p.sources for name, p in params.items()}


def check(net: type[Model], config: ModelConfig, params: Mapping[str, Param], infos: Mapping[str, TensorInfo]) -> None:
    """Names, shapes and vocabulary against the program, before weights are read.

    Raises CheckpointError with every problem.
    """
    places = {
        name: sources
        for name, sources in _places(params, infos).items()
        if params[name].kind != "coarse" or sources == (name,)  # else it comes from what the head is checked for
    }
    problems: list[str] = []
    for name in places:
        p = params[name]
        missing = [s for s in places[name] if s not in infos]
        problems += [f"{s} is missing (for {name})" for s in missing]
        if not missing:
            problems += _shape_problems(p, places[name], infos, config)
    used = {s for sources in places.values() for s in sources}
    ignored = [*net.ignored, r".*\.rotary_emb\.inv_freq", *([r"lm_head\.weight"] if config.tied else [])]
    ignored.append(re.escape(coarse(config.output)))  # of a head that is kept otherwise than it is stored
    unknown = [n for n in infos if n not in used and not any(re.fullmatch(pattern, n) for pattern in ignored)]
    problems += [f"{n} is unknown to model_type {config.model_type}" for n in unknown]
    if not problems:
        return
    n = len(problems)
    shown = problems[:_MAX_SHOWN] + ([f"... and {n - _MAX_SHOWN} more"] if n > _MAX_SHOWN else [])
    head = f"{n} tensor{'s do' if n > 1 else ' does'} not fit config.json; fetch all files of the model again:"
    raise CheckpointError("\n".join([head, *(f"- {s}" for s in shown)]))


def _shape_problems(
    p: Param, sources: Sequence[str], infos: Mapping[str, TensorInfo], config: ModelConfig
) -> Iterator[str]:
    stored_fused = sources != p.sources
    for source, n in zip(sources, (p.shape[0],) if stored_fused else p.rows_of(), strict=True):
        expected = (n, *p.shape[1:])
        if p.transpose and not stored_fused:
            expected = expected[::-1]
        found = infos[source].shape
        if found == expected:
            continue
        if p.kind in ("embed", "head") and found[1:] == expected[1:]:
            yield f"{source} has {found[0]} rows, but vocab_size = {config.n_vocab}: vocabulary mismatch"
        else:
            yield f"{source} has shape {found}, expected {expected}"


def plan_sizes(config: ModelConfig, format: FormatChoice, checkpoint: Checkpoint | None = None) -> Sizes:
    """What the parameters will take, without reading weights. "As stored" is the checkpoint's dtype (else float32)."""
    infos = checkpoint.tensors() if checkpoint else {}
    params = _params(config, format, infos)
    sizes: dict[str, int] = {}
    used: dict[str, set[str]] = {}  # format -> the kinds of parameters in it
    floats: set[str] = set()
    for name, sources in _places(params, infos).items():
        p = params[name]
        if p.kind == "vector":
            sizes[name] = 4 * p.shape[0]
            continue
        stored = {infos[s].dtype for s in sources if s in infos}
        wanted = format.wanted(name, p.kind, stored)
        as_is = stored == {wanted.name} if wanted and name in infos else wanted is None and not stored <= _FLOATS
        target = wanted or _widest(stored)
        sizes[name] = sum(infos[s].nbytes for s in sources) if as_is else target.nbytes(_matrix_shape(p))
        if p.kind == "coarse":
            continue
        used.setdefault(" + ".join(sorted(stored)) if as_is else str(target), set()).add(p.kind)
        if not as_is and p.kind in ("linear", "embed", "head"):
            floats.add(target.name)
    dtype = "float32" if "f32" in floats else "float16" if "f16" in floats else "bfloat16"
    n_params = sum(math.prod(p.shape) for p in params.values() if p.kind != "coarse")
    told = [text if "linear" in kinds else f"{text} ({', '.join(sorted(kinds))})" for text, kinds in used.items()]
    told += [f"{INT4} (coarse head)"] if coarse(config.output) in params else []
    return Sizes(sizes, n_params, ", ".join(told), dtype)


def _matrix_shape(p: Param) -> tuple[int, int]:
    n_out, n_in = p.shape
    return n_out, n_in


def _widest(stored: Iterable[str]) -> Spec:
    """The float format that holds all of `stored` exactly."""
    kinds = set(stored)
    return Spec(kinds.pop()) if len(kinds) == 1 and kinds <= {"f16", "bf16"} else F32


# ---------------------------------------------------------------- reading


def load(
    checkpoint: Checkpoint, ops: Ops, *, format: FormatChoice, context: int, progress: Progress | None = None
) -> Model:
    """The model of a checkpoint with room for `context` positions; `Model.notes` says what was not done as asked.

    Raises CheckpointError (config, names, shapes, NaN or infinite weights) and ConfigError (context, a format that the
    backend refuses).
    """
    config = models.read(checkpoint.config)
    if not 1 <= context <= config.max_context:
        raise ConfigError(f"context = {context}: must be from 1 to {config.max_context}, the reach of its positions")
    weights: dict[str, Packed | np.ndarray] = {}
    notes: list[str] = []
    for name, w in parameters(checkpoint, config, format, notes, progress, ops.pack):
        if isinstance(w, Packed) and (why := ops.why_not(w)) is not None:
            raise ConfigError(f"format {w.format} of {name}: {ops.name} ops refuse it: {why}; choose another format")
        weights[name] = w
    model = models.get(config.model_type).Net(config, ops, weights, context)
    model.notes = tuple(notes)
    return model


def parameters(
    checkpoint: Checkpoint,
    config: ModelConfig,
    format: FormatChoice,
    notes: list[str],
    progress: Progress | None = None,
    pack: Packer = formats.pack,
) -> Iterator[tuple[str, Packed | np.ndarray]]:
    """Every parameter of the program by name, read and packed one at a time: float32 vectors and `Packed` matrices.

    What is not kept as asked is said in `notes`; `pack` is the backend's (all give the same bits). Raises
    CheckpointError: names and shapes first, then each weight.
    """
    net = models.get(config.model_type).Net
    infos = checkpoint.tensors()
    params = _params(config, format, infos)
    check(net, config, params, infos)
    total = plan_sizes(config, format, checkpoint).n_bytes
    done = 0
    for name, sources in _places(params, infos).items():
        p = params[name]
        parts = [_Part.read(checkpoint, s, infos[s].dtype, p.transpose and s != name) for s in sources]
        if p.kind == "vector":
            w: Packed | np.ndarray = _vector(parts)
        else:
            w = _matrix(name, parts, format.wanted(name, p.kind, {part.dtype for part in parts}), notes, pack)
        del parts
        yield name, w
        checkpoint.release()
        done += w.nbytes
        if progress:
            progress(done, max(total, done), name)


@dataclass(frozen=True)
class _Part:
    """One source of a parameter. `dtype` is what the checkpoint says of it."""

    source: str
    dtype: str
    w: np.ndarray | Codes | Packed

    @classmethod
    def read(cls, checkpoint: Checkpoint, source: str, dtype: str, transpose: bool) -> _Part:
        w = checkpoint.read(source)
        return cls(source, dtype, w.T if transpose and isinstance(w, np.ndarray) else w)

    @property
    def form(self) -> Spec | None:
        """The format its codes are in; None for plain numbers."""
        if not isinstance(self.w, Codes):
            return None
        return Spec("int8" if self.w.bits == 8 else "int4g", self.w.group, self.w.mins is not None)

    @property
    def finite(self) -> bool:
        """Free of NaN and infinity."""
        arrays = [self.w] if isinstance(self.w, np.ndarray) else [self.w.scales, self.w.mins]
        return all(bool(np.isfinite(a).all()) for a in arrays if a is not None)


def _vector(parts: Sequence[_Part]) -> np.ndarray:
    for part in parts:
        if not part.finite:
            raise CheckpointError(f"{part.source} holds NaN or infinite values: the file is damaged; fetch it again")
    return np.concatenate([cast(np.ndarray, part.w).astype(np.float32) for part in parts])


def _matrix(name: str, parts: Sequence[_Part], wanted: Spec | None, notes: list[str], pack: Packer) -> Packed:
    """The parts below each other in the wanted format, or in their own."""
    stored = parts[0].w
    if isinstance(stored, Packed):
        return _kept(name, parts, stored, wanted, notes, pack)
    forms = {part.form for part in parts}
    form = forms.pop() if len(forms) == 1 else None
    if form is not None and (wanted is None or wanted.name == form.name):
        return _pack(parts, form, _joined([cast(Codes, part.w) for part in parts]), formats.pack)
    if forms:
        notes.append(
            f"{name}: its parts are stored in different formats; they were decoded, and kept as {wanted or INT8}"
        )
    if wanted is None:
        dtypes = {part.dtype for part in parts}
        wanted = _widest(dtypes) if dtypes <= _FLOATS else INT8
    arrays = [dequantise(part.w) if isinstance(part.w, Codes) else cast(np.ndarray, part.w) for part in parts]
    if len({a.dtype for a in arrays}) > 1:
        arrays = [a.astype(np.float32) for a in arrays]
    return _pack(parts, wanted, arrays[0] if len(arrays) == 1 else np.concatenate(arrays), pack)


def _kept(name: str, parts: Sequence[_Part], w: Packed, wanted: Spec | None, notes: list[str], pack: Packer) -> Packed:
    """A matrix of our own checkpoints: mapped from the file (checked when it was written), or as asked."""
    if wanted is None or wanted.name == w.format:
        return w
    notes.append(f"{name}: stored as {w.format}, decoded and kept as {wanted}, as asked")
    return _pack(parts, wanted, formats.get(w.format).unpack(w), pack)


def _pack(parts: Sequence[_Part], form: Spec, w: np.ndarray | Codes, pack: Packer) -> Packed:
    try:
        return pack(w, form.name, form.group, form.mins)
    except CheckpointError as e:
        named = next((part.source for part in parts if not part.finite), ", ".join(part.source for part in parts))
        raise CheckpointError(f"{named}: {e}") from None


def _joined(codes: Sequence[Codes]) -> Codes:
    """Codes of one form below each other."""
    if len(codes) == 1:
        return codes[0]
    mins = None if codes[0].mins is None else np.concatenate([c.mins for c in codes if c.mins is not None])
    q, scales = (np.concatenate(arrays) for arrays in ([c.q for c in codes], [c.scales for c in codes]))
    return replace(codes[0], q=q, scales=scales, mins=mins)
