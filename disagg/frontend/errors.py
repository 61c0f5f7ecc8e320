"""Errors in OpenAI's shape. HTTP status codes of errors are here and nowhere else."""

from http import HTTPStatus
from math import ceil
from typing import NamedTuple

import msgspec

from disagg.errors import (
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    RequestError,
    Unauthorized,
    UnsupportedParameter,
    WorkerError,
)

Headers = list[tuple[bytes, bytes]]


class UnknownParameter(InvalidRequest):
    """A field that OpenAI does not know either."""


class NotFound(RequestError):
    """No such path, or nothing by that name."""


class Forbidden(RequestError):
    """It may be asked from this machine only."""


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class BodyTooLarge(RequestError):
    """The body is longer than the server reads."""


class BodyTooSlow(RequestError):
    """The request did not arrive in time."""


class UnsupportedEncoding(RequestError):
    """The body is compressed."""


class HeadersTooLarge(RequestError):
    """The header is longer than the server reads."""


class _Kind(NamedTuple):
    status: HTTPStatus
    type: str
    code: str | None


_KINDS: dict[type[BaseException], _Kind] = {
    RequestError: _Kind(HTTPStatus.BAD_REQUEST, "invalid_request_error", None),
    InvalidRequest: _Kind(HTTPStatus.BAD_REQUEST, "invalid_request_error", "invalid_value"),
    UnknownParameter: _Kind(HTTPStatus.BAD_REQUEST, "invalid_request_error", "unknown_parameter"),
    UnsupportedParameter: _Kind(HTTPStatus.BAD_REQUEST, "invalid_request_error", "unsupported_parameter"),
    PromptTooLong: _Kind(HTTPStatus.BAD_REQUEST, "invalid_request_error", "context_length_exceeded"),
    Unauthorized: _Kind(HTTPStatus.UNAUTHORIZED, "invalid_request_error", "invalid_api_key"),
    ModelNotFound: _Kind(HTTPStatus.NOT_FOUND, "invalid_request_error", "model_not_found"),
    Forbidden: _Kind(HTTPStatus.FORBIDDEN, "invalid_request_error", "forbidden"),
    NotFound: _Kind(HTTPStatus.NOT_FOUND, "invalid_request_error", "not_found"),
    MethodNotAllowed: _Kind(HTTPStatus.METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_allowed"),
    BodyTooSlow: _Kind(HTTPStatus.REQUEST_TIMEOUT, "invalid_request_error", "request_timeout"),
    BodyTooLarge: _Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "invalid_request_error", "request_too_large"),
    UnsupportedEncoding: _Kind(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", "unsupported_encoding"
    ),
    HeadersTooLarge: _Kind(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "invalid_request_error", "header_too_large"
    ),
    Overloaded: _Kind(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded"),
    WorkerError: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "service_unavailable"),
    BaseException: _Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error", "internal_error"),
}


class ErrorReply(NamedTuple):
    """What the client gets."""

    status: int
    headers: Headers
    body: bytes


def reply_to(error: BaseException, request_id: str) -> ErrorReply:
    """Put an error in OpenAI's shape. What is not the caller's fault shows only the request id."""
    kind = _kind_of(error)
    headers: Headers = []
    match error:
        case Overloaded():
            headers.append((b"retry-after", b"%d" % max(1, ceil(error.retry_after_s))))
        case WorkerError():
            headers.append((b"retry-after", b"1"))
        case Unauthorized():
            headers.append((b"www-authenticate", b"Bearer"))
        case MethodNotAllowed():
            headers.append((b"allow", error.allow.encode("latin-1")))
        case BodyTooLarge() | BodyTooSlow():
            # The rest of the body is still on its way; what follows it cannot be read as a request.
            headers.append((b"connection", b"close"))
    return ErrorReply(kind.status.value, headers, _body_of(error, kind, request_id))


def error_body(error: BaseException, request_id: str) -> bytes:
    """The JSON object alone, for an event in a stream that has begun."""
    return _body_of(error, _kind_of(error), request_id)


def _kind_of(error: BaseException) -> _Kind:
    return next(_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS)


def _body_of(error: BaseException, kind: _Kind, request_id: str) -> bytes:
    if isinstance(error, RequestError):
        message, param = error.message, error.param
    elif isinstance(error, WorkerError):
        message, param = f"No worker can serve this request now. Its id is {request_id}.", None
    else:
        message, param = f"The server failed on this request. Its id is {request_id}.", None
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}
    )
