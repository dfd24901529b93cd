"""schemathesis over the OpenAPI document, with requests that fit it and requests that do not: never a 5xx, always the documented shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from served import Served, served

from paceline.server.api import routes
from paceline.server.schema import openapi

schemathesis: Any = pytest.importorskip("schemathesis")
pytest.importorskip("schemathesis.specs.openapi.checks")

BOUNDS = {"max_output_tokens": 2, "request_timeout": 30.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(bounds=BOUNDS) as s:
        yield s


document = schemathesis.openapi.from_dict(openapi(routes(), "test"))
document = document.exclude(path_regex="^/admin/")  # they would take the model away
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.specs.openapi.checks.status_code_conformance,
    schemathesis.specs.openapi.checks.content_type_conformance,
    schemathesis.specs.openapi.checks.response_schema_conformance,
]


@document.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_route(case: Any, server: Served) -> None:
    case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=60)


def test_the_server_is_well_afterwards(server: Served) -> None:
    with server.client() as c:
        assert c.get("/ready").status_code == 200
        assert c.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert server.supervisor.n_restarts == 0
