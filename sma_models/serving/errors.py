"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from sma.errors import SMAError

_TYPES = {401: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}


class RequestError(SMAError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that is at fault.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        return error_content(self.status, self.message, self.param, self.code)


def error_content(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error.

    Example:
        >>> error_content(404, "no such thing")["error"]["type"]
        'invalid_request_error'
    """
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def full(message: str) -> RequestError:
    """There is no room now."""
    return RequestError(429, message, code="queue_full", headers={"Retry-After": "1"})


def unavailable(message: str) -> RequestError:
    """There will be no room here."""
    return RequestError(503, message, code="unavailable", headers={"Retry-After": "5"})
