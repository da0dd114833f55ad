"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from sma.errors import SMAError
from sma_models.inference.messages import EngineFull, EngineStopped

_TYPES = {401: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}


class RequestError(SMAError):
    """A request is answered with an error.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that is wrong.
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


def refusal(error: EngineFull | EngineStopped) -> RequestError:
    """The answer to a request that the engine does not accept: 429 if it is full, 503 if it has stopped."""
    if isinstance(error, EngineFull):
        return RequestError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    return RequestError(503, str(error), code="unavailable", headers={"Retry-After": "5"})
