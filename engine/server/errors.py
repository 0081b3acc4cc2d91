"""Answer errors in the format of the endpoint: OpenAI's, or Anthropic's below /v1/messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .async_engine import EngineDeadError, StepFailedError
from .bodies import BodyTooLargeError
from .fields import sendable, shortened, shown
from .limits import BusyError
from .protocol import UNSUPPORTED, ErrorResponse, error_body

# Responses in the OpenAPI document; all errors have one schema, whatever their status.
Responses = dict[int | str, dict[str, Any]]
OTHER_ERRORS: Responses = {"default": {"model": ErrorResponse, "description": "Another error"}}
ERRORS: Responses = {
    400: {"model": ErrorResponse, "description": "The request is refused"},
    404: {"model": ErrorResponse, "description": "This server has another model"},
    413: {"model": ErrorResponse, "description": "The body is larger than the server takes"},
    429: {"model": ErrorResponse, "description": "Too many requests wait"},
    500: {"model": ErrorResponse, "description": "The engine cannot run the request"},
    503: {"model": ErrorResponse, "description": "The engine has failed, or the server stops"},
    **OTHER_ERRORS,
}
RESPONSES: Responses = {
    200: {"description": "The answer, or a stream of its pieces", "content": {"text/event-stream": {}}},
    **ERRORS,
}


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """Hold an error in Anthropic's format."""

    type: Literal["error"]
    error: AnthropicErrorDetail


ANTHROPIC_RESPONSES: Responses = {
    status: {**response, "model": AnthropicErrorResponse} if "model" in response else response
    for status, response in RESPONSES.items()
}
ANTHROPIC_PATH = "/v1/messages"  # it and what is below it
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    """Return whether Anthropic's clients ask for a path."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


class UnknownModelError(Exception):
    """Report that a request names a model that this server does not have."""


def error_json(
    path: str, status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the body of an error response to a request for ``path``.

    Args:
        param: field of the request that the error is about.
        code: OpenAI's name of the error, for clients to tell it by.
    """
    if is_anthropic(path):
        kind = _ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": sendable(shortened(message))}}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return error_body(message, kind, param=param, code=code)


def add_error_handlers(app: FastAPI, models: Mapping[str, type[BaseModel]]) -> None:
    """Let the application answer every exception with an error.

    Args:
        models: body of the requests for a path, whose fields errors name.
    """

    def respond(
        request: Request, status: int, message: str, headers: dict[str, str] | None = None, **more: Any
    ) -> JSONResponse:
        body = error_json(request.scope["path"], status, message, **more)
        return JSONResponse(body, status_code=status, headers=headers)

    def parameter_of(message: str, request: Request) -> str | None:
        model = models.get(request.scope["path"])
        return None if model is None else _parameter_of(message, model)

    @app.exception_handler(ValidationError)
    async def invalid(request: Request, error: ValidationError) -> JSONResponse:
        first = error.errors()[0]
        kind, fields = first["type"], first["loc"]
        message = first["msg"].removeprefix("Value error, ")
        if kind == "unsupported":
            return respond(request, 400, first["msg"], param=first["ctx"]["name"])
        place = ""
        for field in fields:
            place += f"[{field}]" if isinstance(field, int) else f".{field}"
        place = shortened(place.removeprefix("."))
        if kind == "extra_forbidden":
            return respond(request, 400, f"{place} is not supported; leave it out", param=place)
        if kind not in ("missing", "value_error"):
            message = f"{message}, got {shown(first['input'])}"
        return respond(
            request,
            400,
            f"{place}: {message}" if place else message,
            param=place or parameter_of(message, request),
        )

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return respond(request, 400, str(error), param=parameter_of(str(error), request))

    @app.exception_handler(BodyTooLargeError)
    async def too_large(request: Request, error: BodyTooLargeError) -> JSONResponse:
        return respond(request, 413, str(error))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return respond(request, 429, str(error), {"Retry-After": "1"}, code="rate_limit_exceeded")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # the client does not read it

    @app.exception_handler(UnknownModelError)
    async def unknown_model(request: Request, error: UnknownModelError) -> JSONResponse:
        return respond(request, 404, str(error), param="model", code="model_not_found")

    @app.exception_handler(EngineDeadError)
    async def dead(request: Request, error: EngineDeadError) -> JSONResponse:
        return respond(request, 503, str(error))

    @app.exception_handler(StepFailedError)  # the engine has logged it
    async def failed(request: Request, error: StepFailedError) -> JSONResponse:
        return respond(request, 500, str(error))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return respond(request, 500, f"{type(error).__name__}: {error}")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return respond(request, 404, f"{request.scope['path']} does not exist")
        if error.status_code == 405:
            # A preflight of a page whose origin is allowed is answered before (CORSMiddleware).
            methods = {*headers["Allow"].split(", "), "OPTIONS"}
            if "GET" in methods:
                methods.add("HEAD")
            headers["Allow"] = allowed = ", ".join(sorted(methods))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            answer = respond(request, 405, f"{request.method} is not allowed here; what is: {allowed}")
        else:
            answer = respond(request, error.status_code, str(error.detail))
        answer.headers.update(headers)
        return answer


def _parameter_of(message: str, model: type[BaseModel]) -> str | None:
    """Return the first field of the request that an error message names, or None."""
    prompt_field = next((name for name in ("messages", "input") if name in model.model_fields), "prompt")
    # The engine's name, or that of the chat endpoint -> the API's.
    fields = dict.fromkeys(("prompt", "prompt_token_ids", "messages"), prompt_field) | {"beam_width": "n"}
    words = (fields.get(word, word) for word in re.findall(r"\w+", shortened(message)))
    return next((word for word in words if word in model.model_fields or word in UNSUPPORTED), None)
