"""The models a server offers: how each is opened, what the front keeps of it, and which of them are in memory.

The front has a model's tokenizer, templates and plan; its weights are in its worker. Models are loaded when asked for; when memory
is short the one longest unused gives way, as soon as nobody is served by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from paceline.assemble import end_tokens, inspect
from paceline.checkpoints import templates
from paceline.checkpoints.pooling import Pooling, read_pooling
from paceline.checkpoints.template_meter import Limits
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core import adapters
from paceline.core.config import EngineConfig, Plan
from paceline.core.errors import ConfigError, OutOfMemory, PacelineError, RequestError
from paceline.core.types import SamplingParams
from paceline.llm import params_from
from paceline.server import dialects, wire
from paceline.server.dialects import reasoning
from paceline.server.dialects.reasoning import Tags
from paceline.server.errors import ApiError, Unavailable
from paceline.server.supervisor import Restarts, Supervisor
from paceline.techniques.parts.grammar import Grammars

log = logging.getLogger("paceline.server")

CONSTRAINTS = "output/llguidance"
LONG_TEXT = 4096  # characters from which on encoding leaves the event loop
CHARACTERS = 16  # that a token stands for, more than in any real text


@dataclass(frozen=True)
class Offer:
    """A model as the server was told of it. names: under which requests ask for it, the first being its own."""

    names: tuple[str, ...]
    model: str | None
    config: EngineConfig

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of its adapters, which requests may ask for as models."""
        return tuple(adapters.parse(text)[0] for text in self.config.adapters)


@dataclass
class Front:
    """What the front keeps of a model: everything but its weights."""

    tokenizer: Tokenizer | None
    template: templates.ChatTemplate | None
    why_no_template: str
    dialect: str  # how calls of tools are written
    tags: Tags | None  # how thoughts are marked
    reads_parts: bool  # whether the template takes content as parts only
    defaults: SamplingParams
    pooling: Pooling  # how embeddings are made of it
    plan: Plan
    eos: frozenset[int]

    @cached_property
    def grammars(self) -> Grammars:
        """Checks constraints. For a model with a tokenizer."""
        assert self.tokenizer is not None
        return Grammars(self.tokenizer, self.eos)


def open_front(offer: Offer, limits: Limits | None = None) -> Front:
    """Read what the front needs. limits: of rendering a template.

    Raises PacelineError naming everything that stands against this model and configuration."""
    seen = inspect(offer.model, offer.config)
    with contextlib.closing(seen.checkpoint):
        template, why = None, "this model has no tokenizer; send token ids to /v1/completions"
        if seen.tokenizer is not None:
            try:
                template = templates.chat_template(seen.tokenizer, offer.config.chat_template)
                template.limits = limits or template.limits
            except PacelineError as e:
                if offer.config.chat_template is not None:
                    raise
                why = str(e)
        defaults = params_from(seen.checkpoint.generation)
        pooling = read_pooling(seen.checkpoint.path)
    sources = None if template is None else template.sources
    return Front(
        seen.tokenizer,
        template,
        why,
        dialects.detect(sources),
        reasoning.tags(dialects.text_of(sources)),
        dialects.reads_parts(sources),
        defaults,
        pooling,
        seen.plan,
        end_tokens(seen),
    )


def _render_by(source: str, model: Model, messages: Any, arguments: dict[str, Any]) -> str:
    own = model.front.template
    made = templates.ChatTemplate(source, model.tokenizer.special_tokens, limits=own.limits if own else None)
    return made.render(messages, **arguments)


@dataclass(eq=False)
class Model:
    """A loaded model: the front's part and its supervisor. adapter: the one that requests for it are served with; see `adapted`."""

    offer: Offer
    front: Front
    supervisor: Supervisor
    loaded: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)  # one measurement of operators at a time
    adapter: str = ""
    base: Model | None = None  # of a view under an adapter's name
    n_calls: int = 0  # that use it, also those that are still being prepared or written out
    _encoding: int = 0  # texts being encoded in other threads
    _checks: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "constraints"))

    @property
    def name(self) -> str:
        return self.adapter or self.offer.names[0]

    def adapted(self, adapter: str) -> Model:
        """The same model under the name of one of its adapters."""
        view = copy.copy(self)
        view.adapter, view.base = adapter, self
        return view

    @property
    def whole(self) -> Model:
        """The model itself, whatever name it goes by here."""
        return self.base or self

    @property
    def ready(self) -> wire.Ready:
        if self.supervisor.ready is None:
            raise Unavailable("the model is being loaded")
        return self.supervisor.ready

    @property
    def fingerprint(self) -> str:
        own = self.ready.fingerprint
        return f"pl-{own}-{self.ready.adapters[self.adapter][:8]}" if self.adapter else f"pl-{own}"

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError for a model that has none."""
        if self.front.tokenizer is None:
            raise RequestError("prompt: this model has no tokenizer; send token ids")
        return self.front.tokenizer

    async def encode(self, text: str, **how: Any) -> list[int]:
        """Token ids of a text; long ones away from the event loop, and short ones too while the tokenizer is busy."""
        if len(text) < LONG_TEXT and not self._encoding:
            return self.tokenizer.encode(text, **how)
        self._encoding += 1
        try:
            return await asyncio.to_thread(self.tokenizer.encode, text, **how)
        finally:
            self._encoding -= 1

    async def prompt(self, text: str, **how: Any) -> list[int]:
        """Token ids of a text that is to be served; one that is far too long is refused after its beginning.

        Raises ApiError 400 context_length_exceeded.
        """
        capacity = self.ready.serving.capacity
        n = CHARACTERS * capacity
        while n < len(text):
            least = len(await self.encode(text[:n], **how))
            if least > 2 * capacity:  # twice: where the beginning is cut, it may have tokens that the whole has not
                raise ApiError(
                    400,
                    f"the prompt has more than {least} tokens; {capacity - 1} fit",
                    param="messages",
                    code="context_length_exceeded",
                )
            n *= 2
        return await self.encode(text, **how)

    async def render(self, messages: Sequence[Mapping[str, Any]], source: str | None = None, **arguments: Any) -> str:
        """The text of a conversation, by the template `source` if given.

        Raises RequestError when this model has no template, TemplateError when the template objects.
        """
        if source is not None:
            return await asyncio.to_thread(_render_by, source, self, messages, arguments)
        template = self.front.template
        if template is None:
            raise RequestError(f"messages: {self.front.why_no_template}")
        return await asyncio.to_thread(template.render, messages, **arguments)

    async def check_constraint(self, params: SamplingParams) -> None:
        """Raise RequestError for a constraint that cannot be kept to, before anything is queued."""
        if params.constraint is None:
            return
        if not any(t.name == CONSTRAINTS for t in self.front.plan.techniques):
            raise RequestError(
                f"response_format: this server runs without {CONSTRAINTS}; nothing else keeps to a constraint"
            )
        assert self.tokenizer is not None  # raises for a model that has none
        grammars = self.front.grammars
        if not grammars.passed(params.constraint):  # a hostile text takes seconds: those wait among themselves
            await asyncio.get_running_loop().run_in_executor(self._checks, grammars.check, params.constraint)

    async def stop(self) -> None:
        """End its processes."""
        await self.supervisor.stop()
        self._checks.shutdown(wait=False, cancel_futures=True)
        if "grammars" in vars(self.front):
            await asyncio.to_thread(self.front.grammars.close)

    def text_of(self, token: int) -> str:
        return "" if self.front.tokenizer is None else self.front.tokenizer.decode([token], skip_special_tokens=False)


class Models:
    """Every model on offer.

    memory: bytes that loaded models may plan for together (None: each sees to itself). observe: called with a model's name, which load of
    it this is, and what its worker says. limits: of rendering a conversation.
    """

    def __init__(
        self,
        offers: Sequence[Offer],
        restarts: Restarts | None = None,
        memory: int | None = None,
        observe: Callable[[str, int, wire.Stepped], None] = lambda name, load, stepped: None,
        limits: Limits | None = None,
    ):
        self.offers = {name: offer for offer in offers for name in offer.names}
        self.adapters = {name: offer for offer in offers for name in offer.adapters}
        clash = sorted(set(self.offers) & set(self.adapters))
        if clash:
            raise ConfigError([f"adapters: {name!r} is the name of a model, too; choose another" for name in clash])
        self.first = offers[0]
        self.loaded: dict[str, Model] = {}
        self._restarts, self._memory, self._observe, self._limits = restarts, memory, observe, limits
        self._lock = asyncio.Lock()
        self._loads = itertools.count()
        self._leaving: set[asyncio.Future[None]] = set()  # replaced models that finish what they have

    async def get(self, name: str | None) -> Model:
        """The model of this name (None: the first), loaded if need be. Raises ApiError 404 for one that is not on offer."""
        offer = self.first if name is None else self.offers.get(name) or self.adapters.get(name)
        if offer is None:
            known = ", ".join(sorted({o.names[0] for o in self.offers.values()} | set(self.adapters)))
            raise ApiError(
                404, f"model: there is no {str(name)[:200]!r} here, only {known}", param="model", code="model_not_found"
            )
        model = self.loaded.get(offer.names[0])
        if model is None:
            async with self._lock:
                model = self.loaded.get(offer.names[0]) or await self._load(offer)
        model.used = time.monotonic()
        return model.adapted(name) if name in self.adapters else model

    async def load_adapter(self, base: str | None, name: str, path: str) -> None:
        """Offer an adapter of a model from now on, also after its worker has been started again.

        Raises ApiError 404 for an unknown model and RequestError for an adapter that cannot be had.
        """
        if name in self.offers or name in self.adapters:
            raise RequestError(
                f"lora_name = {name!r}: is a model or an adapter here already; choose another name, or unload it"
            )
        model = await self.get(base)
        digest = await model.supervisor.ask("load_adapter", timeout_s=600, name=name, path=path)
        model.ready.adapters[name] = digest
        self._reconfigure(model.offer, (*model.offer.config.adapters, f"{name}={path}"))

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter back; requests that have begun keep it. Raises ApiError 404 for one that is not there."""
        offer = self.adapters.get(name)
        if offer is None:
            raise ApiError(404, f"lora_name: there is no adapter {name[:200]!r} here", param="lora_name")
        model = self.loaded.get(offer.names[0])
        if model is not None:
            await model.supervisor.ask("unload_adapter", name=name)
        self._reconfigure(offer, tuple(t for t in offer.config.adapters if adapters.parse(t)[0] != name))

    def _reconfigure(self, old: Offer, texts: tuple[str, ...]) -> None:
        """An offer with other adapters, for the next time its worker is started, too."""
        offer = replace(old, config=replace(old.config, adapters=texts))
        self.offers |= dict.fromkeys(offer.names, offer)
        self.first = offer if self.first is old else self.first
        self.adapters = {n: o for n, o in self.adapters.items() if o is not old} | dict.fromkeys(offer.adapters, offer)
        model = self.loaded.get(offer.names[0])
        if model is not None:
            model.offer, model.supervisor.config = offer, offer.config

    async def _load(self, offer: Offer) -> Model:
        name = offer.names[0]
        observe = partial(self._observe, name, next(self._loads))
        supervisor = Supervisor(offer.model, offer.config, self._restarts, observe)
        if self.loaded:  # the plan counts memory that is free now, so make room before
            front = await asyncio.to_thread(open_front, offer, self._limits)
            await self._make_room(front.plan.peak_bytes)
            starting = asyncio.ensure_future(supervisor.start())
        else:  # side by side: the first start is what people wait for
            starting = asyncio.ensure_future(supervisor.start())
            try:
                front = await asyncio.to_thread(open_front, offer, self._limits)
            except BaseException:
                starting.cancel()
                await supervisor.stop()
                raise
        try:
            await starting
        except BaseException:
            await supervisor.stop()
            raise
        model = self.loaded[name] = Model(offer, front, supervisor)
        return model

    async def _make_room(self, n_bytes: int) -> None:
        """Unload what is longest unused until so much may be planned for. Raises Unavailable while all of it is in use."""
        if self._memory is None:
            return
        if n_bytes > self._memory:
            raise ApiError(
                503, f"this model needs {n_bytes >> 20} MiB, more than the {self._memory >> 20} MiB for all models"
            )
        while sum(m.front.plan.peak_bytes for m in self.loaded.values()) + n_bytes > self._memory:
            idle = [m for m in self.loaded.values() if not m.n_calls]
            if not idle:
                raise Unavailable("memory is full of models that are in use; try again later")
            await self.unload(min(idle, key=lambda m: m.used).name)

    async def unload(self, name: str, drain_s: float = 0.0) -> None:
        """Take a model out of memory; what it is answering may go on for drain_s seconds."""
        model = self.loaded.pop(name, None)
        if model is not None:
            log.info("unloading %s", name)
            await _until_idle([model], drain_s)
            await model.stop()

    async def reload(self, name: str, path: str | None, drain_s: float) -> Model:
        """Serve a name from what lies at `path` (None: where it came from) now. Requests in hand are finished by the old model.

        Both are in memory for a while, where they fit; else new requests wait until the old one is done. Raises ApiError 404 for
        an unknown name and the PacelineError that loading meets; the old model is then served on.
        """
        old_offer = self.offers.get(name)
        if old_offer is None:
            raise ApiError(404, f"model: there is no {name[:200]!r} here", param="model", code="model_not_found")
        offer = replace(old_offer, model=old_offer.model if path is None else path)
        own = offer.names[0]
        async with self._lock:
            old = self.loaded.pop(own, None)
            try:
                new = await self._load(offer)
            except OutOfMemory:
                if old is None:
                    raise
                await _until_idle([old], drain_s)
                await old.stop()
                old = None
                new = await self._load(offer)
            except BaseException:
                if old is not None:
                    self.loaded[own] = old
                raise
            self.offers |= dict.fromkeys(offer.names, offer)
            self.first = offer if self.first is old_offer else self.first
        if old is not None:
            self._leaving.add(task := asyncio.ensure_future(_leave(old, drain_s)))
            task.add_done_callback(self._leaving.discard)
        return new

    async def drain(self, seconds: float) -> int:
        """Wait until nothing is served, at most so long; how many requests are left."""
        return await _until_idle(self.loaded.values(), seconds)

    async def stop(self) -> None:
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, *(self.unload(name) for name in list(self.loaded)), return_exceptions=True)


async def _until_idle(models: Iterable[Model], seconds: float) -> int:
    """Wait until no call has these in hand, at most so long; how many have."""
    models, end = list(models), time.monotonic() + seconds
    while (n := sum(m.n_calls for m in models)) and time.monotonic() < end:
        await asyncio.sleep(0.05)
    return n


async def _leave(model: Model, drain_s: float) -> None:
    try:
        await _until_idle([model], drain_s)
    finally:
        await model.stop()
