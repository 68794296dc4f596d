"""What went wrong, in OpenAI's shape: no path, traceback or other request's text in it."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from blockdiff.errors import InputError, WrongAnswer
from blockdiff.serving.jobs import Draining, Full

_LOG = logging.getLogger("blockdiff.serving")
# What a request calls our options.
THEIRS = {
    "max_new_tokens": "max_tokens", "stop_strings": "stop", "json_schema": "response_format",
    "prompts": "prompt",
}  # fmt: skip
_TYPES = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "server_error",
}  # fmt: skip


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param,
                          "code": self.code}}  # fmt: skip

    @property
    def response(self) -> JSONResponse:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def refusal(error: BaseException, hidden: str = "") -> Refused:
    """An error as it is answered; `hidden`: a model's folder, which no answer names."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused(429, f"the queue is full: {error}; try again later", code="queue_full",
                       retry=1)  # fmt: skip
    if isinstance(error, Draining):
        return Refused(503, str(error), code="stopping", retry=5)
    if isinstance(error, InputError) and not isinstance(error, WrongAnswer):
        message = str(error)
        if hidden:
            message = re.sub(re.escape(hidden) + r"(/[^\s:]*)?", "the model", message)
        message = re.sub(r"`(\w+)`", lambda one: f"`{THEIRS.get(one[1], one[1])}`", message)
        named = re.search(r"`(\w+)`", message.replace("block size", "`block_size`"))
        return Refused(400, message, named and named[1], "invalid_value")
    return Refused(500, "the text could not be written; the server's log says why",
                   code="evaluation_failed")  # fmt: skip


def install(app: FastAPI) -> None:
    """Every error of an app in this shape."""

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # Without what pydantic adds for the kinds that a field may be of.
        kinds = ("str", "Schema", "function-")
        place = [str(part) for part in first["loc"][1:]]
        place = [part for part in place if "[" not in part and not part.startswith(kinds)]
        names = [part for part in place if part.isidentifier()]
        param = ".".join(place) if first["type"] != "json_invalid" else ""
        message = str(first["msg"]).encode(errors="replace").decode()
        if first["type"] == "json_invalid":
            message = "the body is not valid JSON"
        elif names:
            message = f"`{names[0]}`: {message}"
        param = param.encode(errors="replace").decode()[:200]
        return Refused(400, message, param or None, "invalid_value").response

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        status = 400 if error.status_code == 422 else error.status_code
        said = "the body cannot be read as JSON" if status == 400 else str(error.detail)
        answer = Refused(status, said).response
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        _LOG.error("a request failed", exc_info=error)
        return Refused(500, "the request failed; the server's log says why").response
