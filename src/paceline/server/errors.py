"""Errors on the wire: one JSON shape for every status, `{"error": {"message", "type", "param", "code"}}` as OpenAI's clients expect it;
on the routes of Anthropic's API that API's own. Nothing internal is told in a 5xx; the log has it, under the request's id."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from paceline.core.errors import OutOfMemory, PacelineError, RequestError, TemplateError

# status: (type, code) where the raiser names none
_KINDS: Mapping[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    411: ("invalid_request_error", "length_required"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    421: ("invalid_request_error", "misdirected_request"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    431: ("invalid_request_error", "headers_too_large"),
    499: ("invalid_request_error", "client_gone"),
    500: ("server_error", "internal_error"),
    503: ("overloaded", "overloaded"),
}
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_FIELD = re.compile(r"([a-z_][\w.\[\]-]{0,63})\s*[:=]")


class ClientGone(ClientDisconnect):
    """The client has left; nobody reads an answer."""


class Unavailable(PacelineError):
    """No worker can take the request now; it may be tried again later."""


class Fault(PacelineError):
    """The engine failed while serving this request."""


class ApiError(Exception):
    """An answer other than success. message is for the client; param names the field of the request at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        known = _KINDS.get(status) or _KINDS[500 if status >= 500 else 400]
        self.status, self.message, self.param = status, message, param
        self.type = type or known[0]
        self.code = code or known[1]
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str | None = None) -> dict[str, Any]:
        """As https://docs.anthropic.com/en/api/errors has it: types by status, the field only in the message."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}

    def event(self) -> bytes:
        """For a stream whose headers are sent: an SSE event; `data: [DONE]` follows it."""
        return b"data: " + msgspec.json.encode(self.body()) + b"\n\n"


def render(error: ApiError, scope: Scope) -> Response:
    """In the shape of the API that was called. A proxy's prefix may be part of the path."""
    request_id = scope.get("state", {}).get("request_id")
    headers, body = error.headers, error.body()
    if scope["path"].endswith(ANTHROPIC):
        headers, body = {**headers, "request-id": str(request_id)}, error.anthropic(request_id)
    return Response(msgspec.json.encode(body), error.status, headers, "application/json")


def internal(request_id: str | None = None) -> ApiError:
    """Says nothing but where to look."""
    where = f"; the log has more under request {request_id}" if request_id else ""
    return ApiError(500, f"the server failed to answer this request{where}")


def from_exception(e: BaseException, request_id: str | None = None) -> ApiError:
    """What a client is told of an exception. Texts of errors that a request cannot cause are kept back: they may name paths."""
    if isinstance(e, ApiError):
        return e
    if isinstance(e, (RequestError, TemplateError)):
        field = _FIELD.match(str(e))
        return ApiError(400, str(e), param=field[1] if field else None)
    if isinstance(e, OutOfMemory):
        return ApiError(
            503, "there is not enough memory for this request now; try again later", headers={"retry-after": "5"}
        )
    if isinstance(e, Unavailable):
        return ApiError(503, str(e), headers={"retry-after": "5"})
    if isinstance(e, Fault):
        return ApiError(500, str(e), code="engine_fault")
    if isinstance(e, HTTPException):
        return _from_http(e)
    if isinstance(e, ClientDisconnect):  # for the log; nobody reads it
        return ApiError(499, "the client has left")
    return internal(request_id)


def _from_http(e: HTTPException) -> ApiError:
    texts = {
        404: "there is no such route; see GET /v1/models and the documentation",
        405: "this route has no such method",
    }
    if e.status_code >= 500:
        return ApiError(e.status_code, "the server cannot answer this request now", headers=e.headers)
    return ApiError(e.status_code, texts.get(e.status_code, str(e.detail)), headers=e.headers)


Handler = Callable[[Request, Exception], Awaitable[Response]]


async def _handle(request: Request, e: Exception) -> Response:
    return render(from_exception(e, request.scope.get("state", {}).get("request_id")), request.scope)


def handlers() -> dict[Any, Handler]:
    """`Starlette(exception_handlers=handlers())`. What no request can be blamed for also rises to the guard, which logs it."""
    known = (ApiError, RequestError, TemplateError, OutOfMemory, HTTPException, ClientDisconnect, Exception)
    return dict.fromkeys(known, _handle)
