"""Errors as the API gives them: a status, one sentence, and OpenAI's form around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: one sentence: what was wrong, the offending value, what to do.
        code: for programs, such as "queue_full".
        param: the field of the request that was wrong, where it is one.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        """The body of the answer, encoded."""
        return json.dumps(self.to_dict()).encode()


def bad_request(message: str, param: str | None = None, code: str = "invalid_input") -> ApiError:
    """400: the caller's picture, box, question or option is wrong."""
    return ApiError(400, message, code, param=param)
