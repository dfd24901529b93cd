"""The models a server offers: how each is opened, what the front keeps of it, and which of them are in memory.

The front has a model's tokenizer, templates and plan; its weights are in its worker. Models are loaded when asked for; when memory
is short the one longest unused gives way, as soon as nobody is served by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from paceline.assemble import inspect
from paceline.checkpoints import templates
from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core.config import EngineConfig, Plan
from paceline.core.errors import OutOfMemory, PacelineError, RequestError
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


@dataclass(frozen=True)
class Offer:
    """A model as the server was told of it. names: under which requests ask for it, the first being its own."""

    names: tuple[str, ...]
    model: str | None
    config: EngineConfig


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
    plan: Plan


def open_front(offer: Offer) -> Front:
    """Read what the front needs. Raises PacelineError naming everything that stands against this model and configuration."""
    seen = inspect(offer.model, offer.config)
    with contextlib.closing(seen.checkpoint):
        template, why = None, "this model has no tokenizer; send token ids to /v1/completions"
        if seen.tokenizer is not None:
            try:
                template = templates.chat_template(seen.tokenizer, offer.config.chat_template)
            except PacelineError as e:
                if offer.config.chat_template is not None:
                    raise
                why = str(e)
        defaults = params_from(seen.checkpoint.generation)
    sources = None if template is None else template.sources
    return Front(
        seen.tokenizer,
        template,
        why,
        dialects.detect(sources),
        reasoning.tags(dialects.text_of(sources)),
        dialects.reads_parts(sources),
        defaults,
        seen.plan,
    )


def _render_by(source: str, tokenizer: Tokenizer, messages: Any, arguments: dict[str, Any]) -> str:
    return templates.ChatTemplate(source, tokenizer.special_tokens).render(messages, **arguments)


@dataclass(eq=False)
class Model:
    """A loaded model: the front's part and its supervisor."""

    offer: Offer
    front: Front
    supervisor: Supervisor
    loaded: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)  # one measurement of operators at a time
    n_calls: int = 0  # API calls that have this model in hand, those included that nothing has been computed for yet
    _checks: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "constraints"))

    @property
    def name(self) -> str:
        return self.offer.names[0]

    @property
    def ready(self) -> wire.Ready:
        if self.supervisor.ready is None:
            raise Unavailable("the model is being loaded")
        return self.supervisor.ready

    @property
    def fingerprint(self) -> str:
        return f"pl-{self.ready.fingerprint}"

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError for a model that has none."""
        if self.front.tokenizer is None:
            raise RequestError("prompt: this model has no tokenizer; send token ids")
        return self.front.tokenizer

    async def encode(self, text: str, **how: Any) -> list[int]:
        """Token ids of a text; long ones away from the event loop. Raises ApiError 400 for one that cannot fit, whatever its tokens.

        Encoding takes about 120 bytes of memory per character (`docs/LOG.md`), so that is not left to the check of the tokens.
        """
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, **how)
        capacity = self.ready.serving.capacity
        most = capacity * await asyncio.to_thread(lambda: self._longest_token)
        if len(text) > most:
            raise ApiError(
                400,
                f"prompt: {len(text):,} characters, more than the {most:,} that {capacity} tokens can have; shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        return await asyncio.to_thread(self.tokenizer.encode, text, **how)

    async def render(self, messages: Sequence[Mapping[str, Any]], source: str | None = None, **arguments: Any) -> str:
        """The text of a conversation, by the template `source` if given.

        Raises RequestError when this model has no template, TemplateError when the template objects.
        """
        if source is not None:
            return await asyncio.to_thread(_render_by, source, self.tokenizer, messages, arguments)
        template = self.front.template
        if template is None:
            raise RequestError(f"messages: {self.front.why_no_template}")
        return await asyncio.to_thread(template.render, messages, **arguments)

    @cached_property
    def _longest_token(self) -> int:
        """Characters, at most: its bytes."""
        return max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.n_vocab))

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.ready.serving.eos)

    async def check_constraint(self, params: SamplingParams) -> None:
        """Raise RequestError for a constraint that cannot be kept to, before anything is queued."""
        if params.constraint is None:
            return
        if not any(t.name == CONSTRAINTS for t in self.front.plan.techniques):
            raise RequestError(
                f"response_format: this server runs without {CONSTRAINTS}; nothing else keeps to a constraint"
            )
        if not self.grammars.passed(params.constraint):  # a hostile text takes seconds: those wait among themselves
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._checks, self.grammars.check, params.constraint)

    async def stop(self) -> None:
        """End its processes."""
        await self.supervisor.stop()
        self._checks.shutdown(wait=False, cancel_futures=True)
        if "grammars" in vars(self):
            await asyncio.to_thread(self.grammars.close)

    def text_of(self, token: int) -> str:
        return "" if self.front.tokenizer is None else self.front.tokenizer.decode([token], skip_special_tokens=False)


class Models:
    """Every model on offer. memory: bytes that loaded models may plan for together (None: each sees to itself). observe: called with a
    model's name, which load of it this is, and what its worker says."""

    def __init__(
        self,
        offers: Sequence[Offer],
        restarts: Restarts | None = None,
        memory: int | None = None,
        observe: Callable[[str, int, wire.Stepped], None] = lambda name, load, stepped: None,
    ):
        self.offers = {name: offer for offer in offers for name in offer.names}
        self.first = offers[0]
        self.loaded: dict[str, Model] = {}
        self._restarts, self._memory, self._observe = restarts, memory, observe
        self._lock = asyncio.Lock()
        self._loads = itertools.count()
        self._leaving: set[asyncio.Future[None]] = set()  # replaced models that finish what they have

    async def get(self, name: str | None) -> Model:
        """The model of this name (None: the first), loaded if need be. Raises ApiError 404 for one that is not on offer."""
        offer = self.first if name is None else self.offers.get(name)
        if offer is None:
            known = ", ".join(sorted({o.names[0] for o in self.offers.values()}))
            raise ApiError(
                404, f"model: there is no {str(name)[:200]!r} here, only {known}", param="model", code="model_not_found"
            )
        model = self.loaded.get(offer.names[0])
        if model is None:
            async with self._lock:
                model = self.loaded.get(offer.names[0]) or await self._load(offer)
        model.used = time.monotonic()
        return model

    async def _load(self, offer: Offer) -> Model:
        name = offer.names[0]
        observe = partial(self._observe, name, next(self._loads))
        supervisor = Supervisor(offer.model, offer.config, self._restarts, observe)
        if self.loaded:  # the plan counts memory that is free now, so make room before
            front = await asyncio.to_thread(open_front, offer)
            await self._make_room(front.plan.peak_bytes)
            starting = asyncio.ensure_future(supervisor.start())
        else:  # side by side: the first start is what people wait for
            starting = asyncio.ensure_future(supervisor.start())
            try:
                front = await asyncio.to_thread(open_front, offer)
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
