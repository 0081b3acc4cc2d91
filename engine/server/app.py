"""The HTTP application: routes, errors in OpenAI's shape, the life of the engine's thread."""

from __future__ import annotations

import contextlib
import copy
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from .async_engine import AsyncEngine, EngineDeadError, StepFailedError
from .chat import chat_prompt
from .choices import CHAT, TEXT
from .completions import Completions
from .metrics import Metrics
from .protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest, error_body, shown


def create_app(engine: AsyncEngine, served_model_name: str) -> FastAPI:
    """The application around an engine, which runs as long as the application does.

    Args:
        served_model_name: what requests must call the model.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.stop()

    # The interactive documentation would load its scripts from elsewhere.
    app = FastAPI(title="cupaged", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics(served_model_name, engine.stats)
    started = int(time.time())
    # A copy: the engine's thread uses its own, and fast tokenizers are not for two threads at once.
    tokenizer = copy.deepcopy(engine.engine.tokenizer)
    completions = Completions(engine, metrics, tokenizer, served_model_name)
    _add_error_handlers(app)

    def check_model(name: str) -> None:
        if name != served_model_name:
            raise _UnknownModelError(
                f"the model {name!r} does not exist; this server has {served_model_name!r}"
            )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        check_model(body.model)
        prompt = chat_prompt(tokenizer, body, engine.engine.max_characters)
        params = body.sampling_params({"max_tokens": None, **engine.engine.sampling_defaults})
        return await completions.respond(request, CHAT, [prompt], params, body)

    @app.post("/v1/completions")
    async def text_completions(request: Request, body: CompletionRequest) -> Response:
        check_model(body.model)
        # 16 is the API's own, and not the model's to say, as in vLLM.
        params = body.sampling_params({**engine.engine.sampling_defaults, "max_tokens": 16})
        return await completions.respond(request, TEXT, body.prompts(), params, body)

    card = {
        "id": served_model_name,
        "object": "model",
        "created": started,
        "owned_by": "cupaged",
        "max_model_len": engine.engine.max_model_len,
        "default_sampling_params": engine.engine.sampling_defaults,
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
    def respond(status: int, message: str, **more: Any) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind, **more), status_code=status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        kind, fields = first["type"], first["loc"][1:]
        message = first["msg"].removeprefix("Value error, ")
        if kind == "json_invalid":  # its place is a position in the text, not a field
            return respond(400, f"the body is not JSON: {first['ctx']['error']}")
        if kind == "unsupported":
            return respond(400, first["msg"], param=first["ctx"]["name"])
        if not fields and kind != "value_error":
            return respond(400, "the body must be a JSON object, sent with Content-Type: application/json")
        place = ""
        for field in fields:
            place += f"[{field}]" if isinstance(field, int) else f".{field}"
        place = place.removeprefix(".")
        if kind not in ("missing", "value_error"):
            message = f"{message}, got {shown(first['input'])}"
        return respond(
            400, f"{place}: {message}" if place else message, param=place or _parameter_of(message)
        )

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return respond(400, str(error), param=_parameter_of(str(error)))

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
    words = re.findall(r"\w+", message)
    return next((word for word in words if word in fields), None)
