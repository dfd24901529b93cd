"""The Python interface: `LLM` runs prompts to completion, `AsyncLLM` serves many at once from an event loop.

llm = LLM()                                   # the embedded model
print(llm.generate("def fibonacci(n):")[0].text)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paceline.assemble import Assembled, Progress, assemble
from paceline.checkpoints import templates
from paceline.checkpoints.base import Checkpoint
from paceline.core.config import EngineConfig, Plan
from paceline.core.errors import ConfigError, PacelineError, RequestError
from paceline.core.sequence import Sequence as TokenSequence
from paceline.core.types import GREEDY, Delta, Output, Request, SamplingParams

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass
class Branch:
    """A prompt whose state is kept, to be continued or forked (`LLM.prefill`, `LLM.fork`). `tokens` includes one token not yet
    computed; pages are shared with the branches it came from."""

    tokens: list[int]
    sequence: TokenSequence | None = field(default=None, repr=False)


class LLM:
    """A model with its engine. Options are the fields of `EngineConfig`; raises PacelineError subclasses naming every problem."""

    def __init__(
        self,
        model: str | Path | Checkpoint | None = None,
        config: EngineConfig | None = None,
        *,
        progress: Progress | None = None,
        **options: Any,
    ):
        self.config = make_config(config or EngineConfig(), options)
        self._assembled: Assembled = assemble(model, self.config, progress=progress)
        self.engine = self._assembled.engine
        self.tokenizer = self._assembled.inspected.tokenizer
        self.plan: Plan = self._assembled.inspected.plan
        self._n_requests = 0

    # ---- text in, text out

    def generate(
        self,
        prompts: Prompt | Branch | Sequence[Prompt | Branch],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        park: bool = False,
        adapter: str = "",
    ) -> list[Output]:
        """Complete one prompt (text or token ids) or many; outputs in the order of the prompts.

        All requests are checked before any runs. park keeps the state of each, to be continued by `branch(output)`.
        adapter: the name of a loaded adapter (`load_adapter`), for all of them.
        """
        many = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or self.default_params()] * len(many)
        if len(each) != len(many):
            raise RequestError(f"params: {len(each)} given for {len(many)} prompts; give one, or one for each")
        requests = [self._request(p, s, park=park, adapter=adapter) for p, s in zip(many, each, strict=True)]
        return self._run(requests, many)

    def stream(
        self, prompt: Prompt | Branch, params: SamplingParams | None = None, *, adapter: str = ""
    ) -> Generator[Delta, None, Output]:
        """The pieces of one answer as they come; the generator's return value is the whole output. Closing it aborts."""
        request = self._request(prompt, params or self.default_params(), adapter=adapter)
        self._add(request, prompt)
        try:
            while True:
                deltas, outputs = self.engine.step()
                yield from (d for d in deltas if d.request == request.id)
                for output in outputs:
                    if output.id == request.id:
                        return output
        finally:
            self.engine.abort(request.id)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **template: Any) -> Output:
        """The assistant's next message. Raises TemplateError when the model has no chat template."""
        return self.generate([self.chat_prompt(messages, **template)], params)[0]

    def chat_prompt(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Token ids of a conversation under the model's chat template."""
        text = self.chat_template().render(messages, **template)
        assert self.tokenizer is not None
        return self.tokenizer.encode(text, add_special_tokens=False)

    def chat_template(self) -> templates.ChatTemplate:
        """The model's template, or the one asked for. Raises TemplateError when there is none."""
        if self.tokenizer is None:
            raise RequestError("messages: this model has no tokenizer; give token ids to generate()")
        return templates.chat_template(self.tokenizer, self.config.chat_template)

    # ---- numbers

    def score(self, prompts: Prompt | Sequence[Prompt], *, adapter: str = "") -> list[np.ndarray]:
        """Log-probability (natural) of every token after the first, float64 (n_tokens - 1,), for each prompt."""
        params = SamplingParams(temperature=0.0, prompt_logprobs=0)
        many = _as_list(prompts)
        outputs = self._run([self._request(p, params, generate=False, adapter=adapter) for p in many], many)
        return [np.array([lp.logprob for lp in (o.prompt_logprobs or []) if lp is not None]) for o in outputs]

    def embed(self, prompts: Prompt | Sequence[Prompt], pool: Literal["mean", "last"] = "mean") -> np.ndarray:
        """Pooled final hidden states, float32 (n_prompts, d_model). pool: mean over tokens, or last."""
        if pool not in ("mean", "last"):
            raise RequestError(f"pool = {pool!r}: must be mean or last")
        many = _as_list(prompts)
        requests = [replace(self._request(p, GREEDY, generate=False), pool=pool) for p in many]
        outputs = self._run(requests, many)
        rows = [o.sequences[0].pooled / (len(o.prompt_token_ids) if pool == "mean" else 1) for o in outputs]
        return np.array(rows, np.float32)

    def logits(self, tokens: Sequence[int], *, adapter: str = "") -> np.ndarray:
        """Logits after every token, float32 (n_tokens, n_vocab)."""
        request = replace(self._request(tokens, GREEDY, generate=False, adapter=adapter), pool="logits")
        return np.concatenate(self._run([request], [tokens])[0].sequences[0].rows)

    # ---- branches

    def prefill(self, prompt: Prompt) -> Branch:
        """Compute a prompt's state and keep it."""
        tokens = self.tokens(prompt)
        if len(tokens) < 2:
            return Branch(tokens)
        request = self._request(tokens[:-1], GREEDY, generate=False, park=True)
        output = self._run([request], [tokens])[0]
        return Branch(tokens, output.sequences[0])

    def fork(self, branch: Branch, n: int = 1) -> list[Branch]:
        """n branches that share the state of this one (pages are copied when written)."""
        return [Branch(list(branch.tokens), self.engine.fork(branch.sequence)) for _ in range(n)]

    def branch(self, output: Output, index: int = 0) -> Branch:
        """The state kept by `generate(..., park=True)`, to be continued."""
        seq = output.sequences[index]
        return Branch(list(seq.tokens), seq)

    def release(self, branch: Branch) -> None:
        """Give a branch's pages back."""
        if branch.sequence is not None:
            self.engine.runner.scheduler.remove(branch.sequence)
            branch.sequence = None

    # ---- adapters

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter (a PEFT folder) beside the model, for requests to name. Raises RequestError, CheckpointError."""
        self.engine.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """New requests cannot name it any more; those being served keep it."""
        self.engine.unload_adapter(name)

    # ---- the rest

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str = "") -> str:
        """Queue a request for whoever drives `engine.step` himself; its id."""
        request = self._request(prompt, params or self.default_params(), adapter=adapter)
        self._add(request, prompt)
        return request.id

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; lists of ids pass through."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError("prompt: this model has no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided or done that nobody asked for: a reduced context, converted weights, a dropped default."""
        dropped = (f"{name} is off: {why}" for name, why in self.plan.refused.items())
        return (*self.plan.notes, *self.plan.model.notes, *self._assembled.model.notes, *dropped)

    def default_params(self) -> SamplingParams:
        """What generation_config.json recommends, else temperature 1."""
        return params_from(self._assembled.inspected.checkpoint.generation)

    def close(self) -> None:
        """Drop every request and close the checkpoint."""
        self.engine.close()
        self._assembled.inspected.checkpoint.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _request(
        self, prompt: Any, params: SamplingParams, *, generate: bool = True, park: bool = False, adapter: str = ""
    ) -> Request:
        self._n_requests += 1
        tokens = prompt.tokens if isinstance(prompt, Branch) else self.tokens(prompt)
        now = self.engine.clock.now()
        name = f"r{self._n_requests}"
        return Request(name, tuple(tokens), params, generate=generate, park=park, arrival=now, adapter=adapter)

    def _add(self, request: Request, prompt: Any) -> None:
        self.engine.add(request, prompt.sequence if isinstance(prompt, Branch) else None)

    def _run(self, requests: Sequence[Request], prompts: Sequence[Any]) -> list[Output]:
        for request in requests:
            self.engine.check(request)
        for request, prompt in zip(requests, prompts, strict=True):
            self._add(request, prompt)
        waiting = {r.id for r in requests}
        found: dict[str, Output] = {}
        try:
            while waiting:
                for output in self.engine.step()[1]:
                    found[output.id] = output
                    waiting.discard(output.id)
        finally:
            for request_id in waiting:  # interrupted: leave nothing running
                self.engine.abort(request_id)
        return [found[r.id] for r in requests]


def make_config(base: EngineConfig, options: Mapping[str, Any]) -> EngineConfig:
    """`base` with keyword options; unknown ones are named."""
    known = {f.name for f in fields(EngineConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError([f"option {name!r} is unknown; there are {', '.join(sorted(known))}" for name in unknown])
    changes: dict[str, Any] = {k: tuple(v) if k in ("use", "adapters") else v for k, v in options.items()}
    return replace(base, **changes)


def params_from(generation: Mapping[str, Any]) -> SamplingParams:
    """Sampling defaults of a generation_config.json (do_sample false: greedy); values out of range are ignored there."""
    if generation.get("do_sample") is False:
        return GREEDY
    chosen: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = generation.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError:
            continue
        chosen[name] = value
    return SamplingParams(**chosen)


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Branch)) or (prompts and isinstance(prompts[0], (int, np.integer))):
        return [prompts]
    return list(prompts)


class AsyncLLM:
    """Many requests at once from an event loop; the engine runs in its own thread.

    `generate` yields deltas; leaving the iteration (or cancelling the task) aborts the request.
    """

    def __init__(self, model: str | Path | None = None, **options: Any):
        self.llm = LLM(model, **options)
        self._lock = threading.Condition()
        self._inbox: list[tuple[str, Any]] = []
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="paceline-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str = ""
    ) -> AsyncIterator[Delta]:
        """The pieces of one answer as they come. Raises RequestError before anything is computed."""
        with self._lock:
            if self._closed:
                raise PacelineError("the engine is closed")
            request = self.llm._request(prompt, params or self.llm.default_params(), adapter=adapter)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._streams[request.id] = (asyncio.get_running_loop(), queue)
        self._send("add", request)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Output):
                    return
                yield item
        finally:
            if self._streams.pop(request.id, None) is not None:
                self._send("abort", request.id)

    async def complete(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """The whole text of the first completion."""
        return "".join([d.text async for d in self.generate(prompt, params) if d.index == 0])

    def close(self) -> None:
        """Abort what runs and stop the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()
        self.llm.close()

    def _send(self, kind: str, what: Any) -> None:
        with self._lock:
            self._inbox.append((kind, what))
            self._lock.notify()

    def _serve(self) -> None:
        engine = self.llm.engine
        while True:
            with self._lock:
                while not self._inbox and not engine.has_work and not self._closed:
                    self._lock.wait()
                if self._closed:
                    self._fail_all(PacelineError("the engine was closed"))
                    return
                inbox, self._inbox = self._inbox, []
            for kind, what in inbox:
                self._take(kind, what)
            try:
                deltas, outputs = engine.step()
            except Exception as e:  # a fault of the engine: nobody may hang
                self._fail_all(e)
                return
            for delta in deltas:
                self._deliver(delta.request, delta)
            for output in outputs:
                self._deliver(output.id, RequestError(output.error) if output.error else output)

    def _take(self, kind: str, what: Any) -> None:
        if kind == "abort":
            self.llm.engine.abort(what)
            return
        try:
            self.llm.engine.add(what)
        except RequestError as e:
            self._deliver(what.id, e)

    def _deliver(self, request_id: str, item: Any) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            loop, queue = stream
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            self._closed = True
        for request_id in list(self._streams):
            self._deliver(request_id, error)
