"""Traces: one span a request with its phases, a child of the caller's, and nothing of what was said."""

from __future__ import annotations

import pytest
from served import served

from paceline.server.tracing import NoTraces, Traces, traces

pytest.importorskip("opentelemetry.sdk")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_span_with_its_phases() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    with served() as s, s.client() as c:
        s.server.traces = Traces("http://127.0.0.1:9", exporter)
        body = {"prompt": "my secret text", "max_tokens": 5, "temperature": 0.5}
        assert c.post("/v1/completions", json=body, headers={"traceparent": PARENT}).status_code == 200
        assert isinstance(s.server.traces, Traces)
        s.server.traces._provider.force_flush()
        spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans["llm_request"]
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    assert f"{whole.context.trace_id:032x}" == PARENT.split("-")[1]
    assert whole.parent is not None
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.usage.output_tokens"] == 5
    assert all(spans[p].parent.span_id == whole.context.span_id for p in ("queue", "prefill", "decode"))
    assert "secret" not in str([span.to_json() for span in spans.values()])


def test_nobody_asked() -> None:
    assert isinstance(traces(None), NoTraces)
