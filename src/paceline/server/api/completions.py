"""POST /v1/completions (https://platform.openai.com/docs/api-reference/completions), with the fields that vLLM added."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

import msgspec
from starlette.types import ASGIApp

from paceline.core.types import Delta, TokenLogprob
from paceline.server.answer import Answer
from paceline.server.api.base import Call, Route, encode, json
from paceline.server.api.chat import usage
from paceline.server.errors import ApiError
from paceline.server.models import Model
from paceline.server.sampling import Sampling, params
from paceline.server.sse import DONE, EventStream, event, unless_gone

MAX_PROMPTS = 256
# Names that models give the tokens of "fill in the middle": (before the prefix, before the suffix, where the middle begins).
_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SmolLM
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<PRE>", "<SUF>", "<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)

Prompt = str | list[int] | list[str] | list[list[int]]


class CompletionRequest(Sampling, kw_only=True):
    prompt: Any  # str, list of str, token ids, or list of lists of them; `_prompts` checks
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True
    store: Literal[False] | None = None


class CompletionAnswer(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


async def completions(call: Call, body: CompletionRequest) -> ASGIApp:
    model = await call.model(body.model)
    prompts = await _prompts(model, body)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream = true", param="stream_options")
    limit = 16 if body.max_tokens is None else body.max_tokens  # the default of this API
    if limit == 0 and not body.echo:
        raise ApiError(400, "max_tokens = 0: needs echo = true, to have the prompt scored", param="max_tokens")
    more: dict[str, Any] = {"max_tokens": limit or None, "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        more["prompt_logprobs"] = body.logprobs
    sampling = params(body, model, call.server.settings.bounds, **more)
    await model.check_constraint(sampling)
    answer = Answer(
        call,
        model,
        prompts,
        sampling,
        generate=limit > 0,
        service=body.service(),
        field="prompt",
    )
    answer.check()
    one = _Completion(call, model, body, answer)
    if not body.stream:
        return json(await unless_gone(one.whole(), call.http.receive), headers=answer.headers())
    return EventStream(one.chunks(), **call.streaming(answer.headers()))


async def _prompts(model: Model, body: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt. Raises ApiError for anything that is no prompt."""
    given = body.prompt
    many: list[Any]
    if isinstance(given, list) and (not given or isinstance(given[0], (str, list))):
        many = given
    else:
        many = [given]
    if not 0 < len(many) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt: {len(many)} prompts; give 1 to {MAX_PROMPTS}", param="prompt")
    found = [await _prompt(model, body, one, i) for i, one in enumerate(many)]
    return [
        tokens if body.truncate_prompt_tokens is None else tokens[-body.truncate_prompt_tokens :] for tokens in found
    ]


async def _prompt(model: Model, body: CompletionRequest, one: Any, i: int) -> list[int]:
    if body.suffix:
        if not isinstance(one, str):
            raise ApiError(400, "suffix: needs a prompt of text", param="suffix")
        return await _around(model, one, body.suffix)
    if isinstance(one, str):
        encode = model.prompt if body.truncate_prompt_tokens is None else model.encode
        return await encode(one, add_special_tokens=body.add_special_tokens)
    if isinstance(one, list) and all(type(t) is int for t in one):
        return one
    raise ApiError(400, f"prompt[{i}]: must be text or a list of token ids", param="prompt")


async def _around(model: Model, prefix: str, suffix: str) -> list[int]:
    """A prompt for what lies between two texts, in the form that code models are trained on (arXiv:2207.14255, section 3)."""
    backend = model.tokenizer.backend
    for names in _MIDDLE:
        ids = [i for name in names if (i := backend.token_to_id(name)) is not None]
        if len(ids) == len(names):
            before, after = [
                await model.prompt(t, add_special_tokens=False, parse_special=False) for t in (prefix, suffix)
            ]
            return [ids[0], *before, ids[1], *after, ids[2]]
    raise ApiError(400, "suffix: this model has no tokens for filling in a middle; leave it out", param="suffix")


class _Completion:
    """Writes one call's answer."""

    def __init__(self, call: Call, model: Model, body: CompletionRequest, answer: Answer):
        self.call, self.model, self.body, self.answer = call, model, body, answer
        self.head = {
            "id": f"cmpl-{call.id}",
            "object": "text_completion",
            "created": int(answer.started),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def prompt_of(self, choice: int) -> list[int]:
        return list(self.answer.requests[choice // self.answer.params.n].tokens)

    def echoed(self, choice: int) -> str:
        """The prompt as text."""
        given = self.body.prompt
        if isinstance(given, str):
            return given
        tokens = self.prompt_of(choice)
        return (
            "" if self.model.front.tokenizer is None else self.model.tokenizer.decode(tokens, skip_special_tokens=True)
        )

    async def whole(self) -> dict[str, Any]:
        choices = []
        for i, done in enumerate(await self.answer.whole()):
            text = done.text
            scored: list[TokenLogprob | None] = [*done.logprobs]
            tokens = done.token_ids
            if self.body.echo:
                text = self.echoed(i) + text
                scored = self._prompt_logprobs(i) + scored
                tokens = self.prompt_of(i) + tokens
            choice = {
                "index": i,
                "text": text,
                "logprobs": None if self.body.logprobs is None else self.logprobs(scored, 0, self.prompt_of(i)[0]),
                "finish_reason": done.finish_reason or "length",
                "stop_reason": done.stop_reason,
            }
            if self.body.return_token_ids:
                choice |= {"token_ids": done.token_ids, "prompt_token_ids": self.prompt_of(i)}
            if self.body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = self.answer.prompt_logprobs(i // self.answer.params.n)
            choices.append(choice)
        answer = {**self.head, "choices": choices, "usage": usage(self.answer.usage)}
        if self.call.wants_receipt:
            answer["paceline"] = self.answer.receipt()
        return answer

    def _prompt_logprobs(self, choice: int) -> list[TokenLogprob | None]:
        end = self.answer.ended[choice // self.answer.params.n]
        return list((end.prompt_logprobs if end is not None else None) or [])

    def logprobs(self, scored: Sequence[TokenLogprob | None], start: int, first: int = -1) -> dict[str, Any]:
        """OpenAI's four parallel lists. start: characters before; first: the prompt's first token, which has no probability."""
        tokens, own, tops, offsets = [], [], [], []
        for lp in scored:
            text = self.model.text_of(first if lp is None else lp.token)
            tokens.append(text)
            own.append(None if lp is None else lp.logprob)
            tops.append(
                None if lp is None else {self.model.text_of(t): v for t, v in (*lp.top, (lp.token, lp.logprob))}
            )
            offsets.append(start)
            start += len(text)
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        so_far = options is not None and options.continuous_usage_stats
        at = [0] * self.answer.n_choices  # characters told

        def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
            if with_usage:
                more.setdefault("usage", usage(self.answer.usage) if so_far else None)
            return event(encode({**self.head, "choices": choices, **more}))

        if self.body.echo:
            for i in range(self.answer.n_choices):
                text = self.echoed(i)
                at[i] += len(text)
                yield chunk([{"index": i, "text": text, "logprobs": None, "finish_reason": None}])
        async for pieces in self.answer.pieces():
            data = [chunk([self._piece(i, delta, at)]) for i, delta in pieces if _says(delta, self.body)]
            if data:
                yield b"".join(data)
        if with_usage:
            more = {"paceline": self.answer.receipt()} if self.call.wants_receipt else {}
            yield chunk([], usage=usage(self.answer.usage), **more)
        yield DONE

    def _piece(self, i: int, delta: Delta, at: list[int]) -> dict[str, Any]:
        choice = {
            "index": i,
            "text": delta.text,
            "logprobs": self.logprobs(delta.logprobs, at[i]) if self.body.logprobs is not None else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        at[i] += len(delta.text)
        return choice


def _says(delta: Delta, body: CompletionRequest) -> bool:
    """Whether a piece is worth a chunk: bytes of an unfinished character are not."""
    return bool(
        delta.text or delta.finish_reason or body.return_token_ids or (body.logprobs is not None and delta.logprobs)
    )


ROUTES = [
    Route("POST", "/v1/completions", completions, "Continue a text.", CompletionRequest, CompletionAnswer, streams=True)
]
