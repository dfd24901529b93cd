"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from starlette.types import ASGIApp

from paceline.core.types import GREEDY
from paceline.server.api.base import Call, Route, json
from paceline.server.errors import ApiError
from paceline.server.schema import Body
from paceline.server.turn import MAX_MESSAGES, Asked, prepare

MAX_TOKENS = 1 << 20


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool = False


class TokenizeAnswer(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    tokens: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=MAX_TOKENS)]
    model: str | None = None


class DetokenizeAnswer(msgspec.Struct):
    prompt: str


async def tokenize(call: Call, body: TokenizeRequest) -> ASGIApp:
    model = await call.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: give either a prompt or messages", param="prompt")
    if body.messages is not None:
        asked = Asked(
            body.messages,
            GREEDY,
            tools=body.tools,
            variables=body.chat_template_kwargs or {},
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
        tokens = list((await prepare(call, model, asked)).answer.requests[0].tokens)
    else:
        tokens = await model.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    texts = await asyncio.to_thread(lambda: [model.text_of(t) for t in tokens]) if body.return_token_strs else None
    return json(TokenizeAnswer(tokens, len(tokens), model.ready.serving.capacity, texts))


async def detokenize(call: Call, body: DetokenizeRequest) -> ASGIApp:
    model = await call.model(body.model)
    n_vocab = model.ready.serving.n_vocab
    bad = next((t for t in body.tokens if t >= n_vocab), None)
    if bad is not None:
        raise ApiError(400, f"tokens: {bad} is outside the vocabulary (0 to {n_vocab - 1})", param="tokens")
    text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json(DetokenizeAnswer(text))


async def tokenizer_info(call: Call) -> ASGIApp:
    """Named special tokens and the model's own chat template. A template that the operator chose instead is kept back: it may hold
    instructions of theirs."""
    model = await call.model(None)
    tokenizer = model.tokenizer
    info: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    info["model_max_length"] = model.ready.serving.capacity
    own = tokenizer.chat_template
    if own is not None and model.offer.config.chat_template is None:
        info["chat_template"] = own if isinstance(own, str) else [{"name": k, "template": v} for k, v in own.items()]
    return json(info)


ROUTES = [
    Route("POST", "/tokenize", tokenize, "Token ids of a text or a conversation.", TokenizeRequest, TokenizeAnswer),
    Route("GET", "/tokenizer_info", tokenizer_info, "Special tokens and the chat template.", answer=dict[str, Any]),
    Route("POST", "/detokenize", detokenize, "The text of token ids.", DetokenizeRequest, DetokenizeAnswer),
]
