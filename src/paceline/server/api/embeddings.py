"""Vectors of texts, and what is made of them: POST /v1/embeddings (https://platform.openai.com/docs/api-reference/embeddings), /v1/score
as vLLM has it, /v1/rerank as Cohere and Jina have it.

A vector is the mean of a text's final hidden states, or the last of them, at length 1. Which of both a model was trained for its folder
may say (`checkpoints/pooling.py`). A score is the cosine of two vectors, from -1 to 1.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from starlette.types import ASGIApp

from paceline.core.types import GREEDY
from paceline.server.answer import Answer, Service, Usage
from paceline.server.api.base import Call, Route, json
from paceline.server.errors import ApiError, Fault
from paceline.server.models import LONG_TEXT, Model
from paceline.server.schema import Body, bad_fields
from paceline.server.sse import unless_gone

MAX_INPUTS = 2048
MAX_TOKENS = 300_000  # of all inputs together
WINDOW = 64  # inputs that one call has with the engine at a time: many do not fill the queue for others

Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_INPUTS)]
Pool = Literal["mean", "last"]


class Embedding(Body, kw_only=True):
    """Common to all of them. pooling: instead of the model's own way (an extension)."""

    model: str | None = None
    pooling: Pool | None = None
    user: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=0)] = 0


class EmbeddingRequest(Embedding, kw_only=True):
    input: Any  # str, list of str, token ids, or list of lists of them; `_inputs` checks
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class EmbeddingAnswer(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    data: list[dict[str, Any]]
    usage: dict[str, Any]


class ScoreRequest(Embedding, kw_only=True):
    """One of the pairs of names."""

    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None


class Document(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class RerankRequest(Embedding, kw_only=True):
    query: str
    documents: Annotated[list[str | Document], msgspec.Meta(min_length=1, max_length=MAX_INPUTS - 1)]
    top_n: Annotated[int, msgspec.Meta(ge=0)] | None = None
    return_documents: bool = True


class RerankAnswer(msgspec.Struct):
    id: str
    model: str
    results: list[dict[str, Any]]
    usage: dict[str, Any]


async def embeddings(call: Call, body: EmbeddingRequest) -> ASGIApp:
    model = await call.model(body.model)
    work = _Vectors(call, model, await _inputs(model, body.input), body, "input")
    vectors = await unless_gone(work.vectors(), call.http.receive)
    n = vectors.shape[1]
    if body.dimensions not in (None, n):
        raise ApiError(400, f"dimensions = {body.dimensions}: this model's vectors have {n}", param="dimensions")
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(_written(vectors, body))]
    return json(EmbeddingAnswer(**work.head("embd"), object="list", data=data), headers=work.answer.headers())


def _written(vectors: np.ndarray, body: EmbeddingRequest) -> list[Any]:
    if body.encoding_format == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    return list(vectors.tolist())


async def score(call: Call, body: ScoreRequest) -> ASGIApp:
    """One text with each of many, or pairs of equal places."""
    model = await call.model(body.model)
    names, left, right = _pairs(body)
    if len(left) != len(right) and len(left) != 1:
        raise ApiError(
            400, f"{names[0]}: {len(left)} texts for {len(right)}; give one, or as many as {names[1]}", param=names[0]
        )
    tokens = await _encoded(model, [*left, *right], [*_places(names[0], left), *_places(names[1], right)])
    work = _Vectors(call, model, tokens, body, names[0])
    vectors = await unless_gone(work.vectors(), call.http.receive)
    cosines = (vectors[: len(left)] * vectors[len(left) :]).sum(axis=1).tolist()
    data = [{"index": i, "object": "score", "score": s} for i, s in enumerate(cosines)]
    return json(EmbeddingAnswer(**work.head("score"), object="list", data=data), headers=work.answer.headers())


def _pairs(body: ScoreRequest) -> tuple[tuple[str, str], list[str], list[str]]:
    """(names of the two fields, texts of the one, texts of the other). Raises ApiError unless exactly one pair is given."""
    pairs = (("text_1", "text_2"), ("queries", "documents"))
    given = [names for names in pairs if any(getattr(body, n) is not None for n in names)]
    if len(given) != 1:
        raise ApiError(400, "text_1: give text_1 and text_2, or queries and documents", param="text_1")
    missing = [n for n in given[0] if getattr(body, n) is None]
    if missing:
        raise ApiError(400, f"{missing[0]}: is missing", param=missing[0])
    texts = (getattr(body, n) for n in given[0])
    left, right = ([t] if isinstance(t, str) else t for t in texts)
    return given[0], left, right


async def rerank(call: Call, body: RerankRequest) -> ASGIApp:
    """The documents by their likeness to the query, the likest first."""
    model = await call.model(body.model)
    texts = [d if isinstance(d, str) else d.text for d in body.documents]
    tokens = await _encoded(model, [body.query, *texts], ["query", *(f"documents[{i}]" for i in range(len(texts)))])
    work = _Vectors(call, model, tokens, body, "documents")
    vectors = await unless_gone(work.vectors(), call.http.receive)
    scores = vectors[1:] @ vectors[0]
    order = np.argsort(-scores, kind="stable")[: body.top_n or None].tolist()
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": float(scores[i])} for i in order]
    if body.return_documents:
        results = [{**r, "document": {"text": texts[r["index"]]}} for r in results]
    head = work.head("rerank")
    del head["created"]
    return json(RerankAnswer(**head, results=results), headers=work.answer.headers())


async def _inputs(model: Model, given: Any) -> list[list[int]]:
    """Token ids of every input. Raises ApiError for what is none."""
    one = isinstance(given, str) or (isinstance(given, list) and bool(given) and type(given[0]) is int)
    many = [given] if one else given
    if not isinstance(many, list) or not 0 < len(many) <= MAX_INPUTS:
        raise ApiError(
            400, f"input: must be a text or token ids, or a list of 1 to {MAX_INPUTS} of them", param="input"
        )
    places = ["input"] if one else [f"input[{i}]" for i in range(len(many))]
    if all(isinstance(x, str) for x in many):
        return await _encoded(model, many, places)
    bad = [p for x, p in zip(many, places, strict=True) if not _are_ids(x)]
    if bad:
        raise bad_fields((p, f"{p}: must be a text or a list of token ids, all inputs the same") for p in bad)
    return _checked(many, places)


def _are_ids(x: Any) -> bool:
    return isinstance(x, list) and all(type(t) is int for t in x)


async def _encoded(model: Model, texts: Sequence[str], places: Sequence[str]) -> list[list[int]]:
    """Token ids with the model's special ones; many or long texts away from the event loop."""
    encode = model.tokenizer.encode
    if sum(map(len, texts)) < LONG_TEXT:
        return _checked([encode(t) for t in texts], places)
    return _checked(await asyncio.to_thread(lambda: [encode(t) for t in texts]), places)


def _places(name: str, texts: Sequence[str]) -> list[str]:
    return [f"{name}[{i}]" for i in range(len(texts))]


def _checked(inputs: list[list[int]], places: Sequence[str]) -> list[list[int]]:
    empty = [(p, f"{p}: is empty") for tokens, p in zip(inputs, places, strict=True) if not tokens]
    if empty:
        raise bad_fields(empty)
    total = sum(map(len, inputs))
    if total > MAX_TOKENS:
        name = places[0].partition("[")[0]
        raise ApiError(400, f"{name}: {total} tokens in all, more than {MAX_TOKENS}; send fewer at once", param=name)
    return inputs


class _Vectors:
    """The vectors of one call's inputs."""

    def __init__(self, call: Call, model: Model, inputs: list[list[int]], body: Embedding, field: str):
        own = model.front.pooling
        if body.pooling is None and own.why_not is not None:
            raise ApiError(400, f"pooling: {own.why_not}; give mean or last to have it all the same", param="pooling")
        self.model, self.pool = model, body.pooling or own.kind
        self.answer = Answer(
            call,
            model,
            inputs,
            GREEDY,
            generate=False,
            pool=self.pool,
            service=Service(body.priority),
            field=field,
            window=WINDOW,
        )
        self.id = call.id
        self.answer.check()

    async def vectors(self) -> np.ndarray:
        """float32 (n_inputs, d_model), each of length 1. Length is all that mean and sum differ in, so sums need no division."""
        async for _ in self.answer.pieces():
            pass
        pooled = [end.pooled for end in self.answer.ended if end is not None and end.pooled is not None]
        if len(pooled) != len(self.answer.requests):
            raise Fault("the engine gave no hidden states for these inputs")
        rows = np.stack([np.frombuffer(p, np.float32) for p in pooled])
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{self.id}",
            "created": int(self.answer.started),
            "model": self.model.name,
            "usage": _usage(self.answer.usage),
        }


def _usage(u: Usage) -> dict[str, Any]:
    return {"prompt_tokens": u.prompt, "total_tokens": u.prompt}


def _both(path: str, *rest: Any, **more: Any) -> list[Route]:
    return [Route("POST", f"{prefix}{path}", *rest, **more) for prefix in ("/v1", "")]


ROUTES = [
    Route("POST", "/v1/embeddings", embeddings, "Vectors of texts.", EmbeddingRequest, EmbeddingAnswer),
    *_both("/score", score, "How alike texts are.", ScoreRequest, EmbeddingAnswer),
    *_both("/rerank", rerank, "Documents by their likeness to a query.", RerankRequest, RerankAnswer),
]
