"""OpenTelemetry traces, an extra (`pip install 'paceline[otel]'`): one span a request with its phases below it.

Attributes follow OpenTelemetry's conventions for generative AI (gen_ai.*); prompts and answers are never in them. A `traceparent` header
makes the request's span a child of the caller's (W3C Trace Context).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from paceline.core.errors import ConfigError
from paceline.core.types import SamplingParams
from paceline.server import wire


class Span(Protocol):
    """What an answer tells of itself."""

    def end(self, usage: Any, ended: Sequence[wire.Ended | None], error: BaseException | None) -> None: ...


class _Nothing:
    def end(self, usage: Any, ended: Sequence[wire.Ended | None], error: BaseException | None) -> None:
        pass


class NoTraces:
    """Where nobody asked for traces."""

    def begin(self, model: str, request_id: str, params: SamplingParams, headers: Mapping[str, str]) -> Span:
        return _Nothing()

    def close(self) -> None:
        pass


class Traces:
    """Sends spans to an OTLP/HTTP endpoint, in the background. exporter: another one, for tests.

    Raises ConfigError when the packages are not installed.
    """

    def __init__(self, endpoint: str, exporter: Any = None):
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError("otel_endpoint: needs OpenTelemetry; pip install 'paceline[otel]'") from None
        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
        self._provider = TracerProvider(resource=Resource.create({"service.name": "paceline"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("paceline")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, model: str, request_id: str, params: SamplingParams, headers: Mapping[str, str]) -> Span:
        parent = self._propagator.extract(dict(headers))
        asked: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.system": "paceline",
            "gen_ai.request.model": model,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.choice.count": params.n,
            "paceline.request_id": request_id,
        }
        if params.max_tokens is not None:
            asked["gen_ai.request.max_tokens"] = params.max_tokens
        return _Traced(self._tracer, self._tracer.start_span("llm_request", parent, attributes=asked), time.time_ns())

    def close(self) -> None:
        """Send what is waiting."""
        self._provider.shutdown()


class _Traced:
    def __init__(self, tracer: Any, span: Any, start: int):
        self._tracer, self._span, self._start = tracer, span, start

    def end(self, usage: Any, ended: Sequence[wire.Ended | None], error: BaseException | None) -> None:
        from opentelemetry import trace

        self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt)
        self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion)
        self._span.set_attribute("paceline.cached_tokens", usage.cached)
        context = trace.set_span_in_context(self._span)
        for i, end in enumerate(ended):
            if end is not None:
                self._phases(context, i, end)
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, type(error).__name__)
        self._span.end()

    def _phases(self, context: Any, request: int, end: wire.Ended) -> None:
        at = self._start
        for name, seconds in (
            ("queue", end.timing.queue),
            ("prefill", end.timing.prompt),
            ("decode", end.timing.generation),
        ):
            span = self._tracer.start_span(name, context, start_time=at, attributes={"paceline.prompt": request})
            at += int(1e9 * seconds)
            span.end(end_time=at)


def traces(endpoint: str | None) -> Traces | NoTraces:
    """What the settings ask for."""
    return NoTraces() if endpoint is None else Traces(endpoint)
