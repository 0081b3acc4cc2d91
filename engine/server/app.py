"""The HTTP application: routes, errors in OpenAI's shape, the life of the engine's thread."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from ..engine import Prompt, tokenize
from ..sampling_params import SamplingParams
from .async_engine import AsyncEngine, EngineDeadError, StepFailedError
from .bodies import Bodies, BodyTooLargeError, json_body
from .chat import chat_prompt
from .choices import CHAT, TEXT
from .completions import Completions
from .limits import BusyError, Limits
from .metrics import Metrics
from .protocol import (
    UNSUPPORTED,
    ChatCompletionRequest,
    CompletionRequest,
    error_body,
    shortened,
    shown,
)


def create_app(engine: AsyncEngine, served_model_name: str, limits: Limits | None = None) -> FastAPI:
    """The application around an engine, which runs as long as the application does.

    Args:
        served_model_name: what requests must call the model.
        limits: what requests may ask for; those of connections are the server's.
    """
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.stop()
            bodies.close()

    # The interactive documentation would load its scripts from elsewhere.
    app = FastAPI(title="cupaged", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics(served_model_name, engine.stats)
    started = int(time.time())
    bodies = Bodies(limits, engine.engine.tokenizer)
    completions = Completions(
        engine,
        metrics,
        bodies.tokenizer,
        served_model_name,
        limits.max_waiting_requests,
        bodies.in_thread,
    )
    _add_error_handlers(app)

    def check_model(name: str) -> None:
        if name != served_model_name:
            raise _UnknownModelError(
                f"the model {shown(name)} does not exist; this server has {served_model_name!r}"
            )

    def read_chat(
        content: bytes, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[ChatCompletionRequest, list[Prompt], SamplingParams]:
        body = bodies.parse(content, ChatCompletionRequest)
        check_model(body.model)
        params = body.sampling_params(default_max_tokens=None)
        limits.check_choices(1, params.num_sequences)
        return body, [chat_prompt(tokenizer, body, engine.engine.max_characters)], params

    def read_text(
        content: bytes, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[CompletionRequest, list[Prompt], SamplingParams]:
        body = bodies.parse(content, CompletionRequest)
        check_model(body.model)
        params = body.sampling_params(default_max_tokens=16)
        prompts = body.prompts()
        limits.check_choices(len(prompts), params.num_sequences)
        return body, [tokenized(prompt, tokenizer) for prompt in prompts], params

    def tokenized(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        if not isinstance(prompt, str):
            return prompt
        token_ids = tokenize(tokenizer, prompt, engine.engine.max_model_len, engine.engine.max_characters)
        return {"prompt": prompt, "prompt_token_ids": token_ids}

    path = "/v1/chat/completions"

    @app.post(path, openapi_extra=json_body(path, ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        completions.check_room(1)
        body, prompts, params = await bodies.read(request, read_chat)
        return await completions.respond(request, CHAT, prompts, params, body)

    path = "/v1/completions"

    @app.post(path, openapi_extra=json_body(path, CompletionRequest))
    async def text_completions(request: Request) -> Response:
        completions.check_room(1)
        body, prompts, params = await bodies.read(request, read_text)
        return await completions.respond(request, TEXT, prompts, params, body)

    card = {
        "id": served_model_name,
        "object": "model",
        "created": started,
        "owned_by": "cupaged",
        "max_model_len": engine.engine.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")  # hub ids and directories have slashes
    async def model(name: str) -> dict[str, Any]:
        check_model(name)
        return card

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")

    return app


class _UnknownModelError(Exception):
    pass


def _add_error_handlers(app: FastAPI) -> None:
    def respond(
        status: int, message: str, headers: dict[str, str] | None = None, **more: Any
    ) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind, **more), status_code=status, headers=headers)

    @app.exception_handler(ValidationError)
    async def invalid(request: Request, error: ValidationError) -> JSONResponse:
        first = error.errors()[0]
        kind, fields = first["type"], first["loc"]
        message = first["msg"].removeprefix("Value error, ")
        if kind == "unsupported":
            return respond(400, first["msg"], param=first["ctx"]["name"])
        place = ""
        for field in fields:
            place += f"[{field}]" if isinstance(field, int) else f".{field}"
        place = shortened(place.removeprefix("."))
        if kind not in ("missing", "value_error"):
            message = f"{message}, got {shown(first['input'])}"
        return respond(
            400, f"{place}: {message}" if place else message, param=place or _parameter_of(message)
        )

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return respond(400, str(error), param=_parameter_of(str(error)))

    @app.exception_handler(BodyTooLargeError)
    async def too_large(request: Request, error: BodyTooLargeError) -> JSONResponse:
        return respond(413, str(error), {"Connection": "close"})  # what is left of it is not received

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return respond(429, str(error), {"Retry-After": "1"}, code="rate_limit_exceeded")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(_UnknownModelError)
    async def unknown_model(request: Request, error: _UnknownModelError) -> JSONResponse:
        return respond(404, str(error), param="model", code="model_not_found")

    @app.exception_handler(EngineDeadError)
    async def dead(request: Request, error: EngineDeadError) -> JSONResponse:
        return respond(503, str(error))

    @app.exception_handler(StepFailedError)  # the engine has logged it
    async def failed(request: Request, error: StepFailedError) -> JSONResponse:
        return respond(500, str(error))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return respond(500, f"{type(error).__name__}: {error}")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return respond(error.status_code, str(error.detail))


def _parameter_of(message: str) -> str | None:
    """Our messages name the argument that they are about, first of all names in them."""
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *UNSUPPORTED}
    for name, of_the_api in (("prompt_token_ids", "prompt"), ("beam_width", "n")):
        message = message.replace(name, of_the_api)
    words = re.findall(r"\w+", shortened(message))
    return next((word for word in words if word in fields), None)
