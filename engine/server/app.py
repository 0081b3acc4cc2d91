"""Create the HTTP application: routes, errors in OpenAI's format, lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from ..chat_template import rendered_prompt
from ..prompts import Prompt, tokenize
from ..sampling_params import SamplingParams
from .async_engine import AsyncEngine, EngineDeadError, StepFailedError
from .bodies import Bodies, BodyTooLargeError, json_body
from .chat import Chat
from .chat_settings import ChatSettings
from .choices import CHAT, TEXT
from .completions import Completions
from .fields import shortened, shown
from .limits import BusyError, Limits
from .metrics import Metrics
from .protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest, ErrorResponse, error_body

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"

# Responses in the OpenAPI document; all errors have one schema, whatever their status.
_Responses = dict[int | str, dict[str, Any]]
_OTHER_ERRORS: _Responses = {"default": {"model": ErrorResponse, "description": "Another error"}}
_RESPONSES: _Responses = {
    200: {"description": "The answer, or a stream of its pieces", "content": {"text/event-stream": {}}},
    400: {"model": ErrorResponse, "description": "The request is refused"},
    404: {"model": ErrorResponse, "description": "This server has another model"},
    413: {"model": ErrorResponse, "description": "The body is larger than the server takes"},
    429: {"model": ErrorResponse, "description": "Too many requests wait"},
    500: {"model": ErrorResponse, "description": "The engine cannot run the request"},
    503: {"model": ErrorResponse, "description": "The engine has failed, or the server stops"},
    **_OTHER_ERRORS,
}

LAST_STEP_SECONDS = 5.0  # time limit of the engine's last step when the server stops; it may hang


def create_app(
    engine: AsyncEngine,
    served_model_name: str,
    limits: Limits | None = None,
    healthy: Callable[[], bool] | None = None,
    run_engine: bool = True,
    chat_settings: ChatSettings | None = None,
) -> FastAPI:
    """Create the application around an engine.

    Args:
        served_model_name: name of the model in requests.
        limits: limits of requests; limits of connections do not apply here.
        healthy: returns whether ``/health`` answers 200; by default whether the engine accepts requests.
        run_engine: run the engine in a thread of its own during the application's lifespan; False: the caller
            runs it.
        chat_settings: settings of chats.
    """
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if run_engine:
            engine.start()
        try:
            yield
        finally:
            if run_engine:
                engine.stop(timeout=LAST_STEP_SECONDS)
            bodies.close()

    # The interactive documentation would load its scripts from elsewhere.
    app = FastAPI(title="cupaged", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(_HeadAsGet)
    metrics = Metrics(served_model_name, engine.stats)
    started = int(time.time())
    bodies = Bodies(limits, engine.engine.tokenizer)
    chat = Chat(chat_settings or ChatSettings(), bodies.tokenizer, engine.engine.max_characters)
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
    ) -> tuple[ChatCompletionRequest, SamplingParams]:
        body = bodies.parse(content, ChatCompletionRequest)
        check_model(body.model)
        params = body.sampling_params({"max_tokens": None, **engine.engine.sampling_defaults})
        limits.check_choices(1, params.num_sequences)
        return body, params

    def read_text(
        content: bytes, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[CompletionRequest, list[Prompt], SamplingParams]:
        body = bodies.parse(content, CompletionRequest)
        check_model(body.model)
        # The API's default of 16 takes precedence over the model's generation config, as in vLLM.
        params = body.sampling_params({**engine.engine.sampling_defaults, "max_tokens": 16})
        prompts = body.prompts()
        limits.check_choices(len(prompts), params.num_sequences)
        return body, [tokenized(prompt, tokenizer) for prompt in prompts], params

    def tokenized(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        if not isinstance(prompt, str):
            return prompt
        token_ids = tokenize(tokenizer, prompt, engine.engine.max_model_len, engine.engine.max_characters)
        return {"prompt": prompt, "prompt_token_ids": token_ids}

    @app.post(CHAT_PATH, responses=_RESPONSES, openapi_extra=json_body(CHAT_PATH, ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        completions.check_room(1)
        body, params = await bodies.read(request, read_chat)
        # In another thread, as a template may take seconds.
        text = await asyncio.to_thread(chat.render, body)
        prompt = await bodies.work(len(text), functools.partial(rendered_prompt, text))
        params, create_reader = chat.reading(body, params, text)
        return await completions.respond(request, CHAT, [prompt], params, body, create_reader)

    @app.post(TEXT_PATH, responses=_RESPONSES, openapi_extra=json_body(TEXT_PATH, CompletionRequest))
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
        "has_chat_template": bool(bodies.tokenizer.chat_template),
        "default_sampling_params": engine.engine.sampling_defaults,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    # Hub IDs and directories contain slashes.
    @app.get("/v1/models/{name:path}", responses={404: _RESPONSES[404], **_OTHER_ERRORS})
    async def model(name: str) -> dict[str, Any]:
        check_model(name)
        return card

    @app.get(
        "/health",
        response_class=Response,
        responses={503: {"description": "The engine has failed, or the server stops"}},
    )
    async def health() -> Response:
        return Response(status_code=200 if (engine.error is None if healthy is None else healthy()) else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")

    return app


class _HeadAsGet:
    """Answer HEAD requests like GET; the server, which knows the method, does not send the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


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
        if kind == "extra_forbidden":
            return respond(400, f"{place} is not supported; leave it out", param=place)
        if kind not in ("missing", "value_error"):
            message = f"{message}, got {shown(first['input'])}"
        return respond(
            400, f"{place}: {message}" if place else message, param=place or _parameter_of(message, request)
        )

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return respond(400, str(error), param=_parameter_of(str(error), request))

    @app.exception_handler(BodyTooLargeError)
    async def too_large(request: Request, error: BodyTooLargeError) -> JSONResponse:
        return respond(413, str(error), {"Connection": "close"})  # the rest of the body is not received

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return respond(429, str(error), {"Retry-After": "1"}, code="rate_limit_exceeded")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # the client does not read it

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
    async def other(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return respond(404, f"{request.scope['path']} does not exist")
        if error.status_code == 405:
            # No origin is allowed by CORS, so a preflight gets the same answer as any other OPTIONS.
            methods = {*headers["Allow"].split(", "), "OPTIONS"}
            if "GET" in methods:
                methods.add("HEAD")
            headers["Allow"] = allowed = ", ".join(sorted(methods))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            answer = respond(405, f"{request.method} is not allowed here; what is: {allowed}")
        else:
            answer = respond(error.status_code, str(error.detail))
        answer.headers.update(headers)
        return answer


def _parameter_of(message: str, request: Request) -> str | None:
    """Return the first field of the request that an error message names, or None."""
    kind = ChatCompletionRequest if request.scope["path"] == CHAT_PATH else CompletionRequest
    prompt_field = "messages" if kind is ChatCompletionRequest else "prompt"
    # The engine's name -> the API's.
    fields = {"prompt": prompt_field, "prompt_token_ids": prompt_field, "beam_width": "n"}
    words = (fields.get(word, word) for word in re.findall(r"\w+", shortened(message)))
    return next((word for word in words if word in kind.model_fields or word in UNSUPPORTED), None)
