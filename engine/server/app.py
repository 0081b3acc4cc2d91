"""Create the HTTP application: routes and lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from transformers import PreTrainedTokenizerBase

from ..chat_template import rendered_prompt
from ..prompts import Prompt, tokenize
from ..sampling_params import SamplingParams
from .async_engine import AsyncEngine
from .bodies import Bodies, json_body
from .chat import Chat
from .chat_settings import ChatSettings
from .choices import CHAT, TEXT
from .completions import Completions
from .errors import OTHER_ERRORS, RESPONSES, UnknownModelError, add_error_handlers
from .fields import shown
from .limits import Limits
from .metrics import Metrics
from .middleware import HeadAsGet
from .protocol import ChatCompletionRequest, CompletionRequest

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"

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
    app.add_middleware(HeadAsGet)
    metrics = Metrics(served_model_name, engine.stats)
    started = int(time.time())
    bodies = Bodies(limits, engine.engine.tokenizer)
    chat = Chat(chat_settings or ChatSettings(), bodies.tokenizer, engine.engine.max_characters)
    completions = Completions(
        engine,
        metrics,
        bodies.tokenizer,
        chat,
        served_model_name,
        limits.max_waiting_requests,
        bodies.in_thread,
    )
    add_error_handlers(app, {CHAT_PATH: ChatCompletionRequest, TEXT_PATH: CompletionRequest})

    def check_model(name: str) -> None:
        if name != served_model_name:
            raise UnknownModelError(
                f"the model {shown(name)} does not exist; this server has {served_model_name!r}"
            )

    def read_chat(
        content: bytes, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[ChatCompletionRequest, SamplingParams]:
        body = bodies.parse(content, ChatCompletionRequest)
        check_model(body.model)
        params = body.sampling_params({"max_tokens": None, **engine.engine.sampling_defaults})
        limits.check_choices(1, params.num_sequences)
        limits.check_grammar(params)
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
        limits.check_grammar(params)
        return body, [tokenized(prompt, tokenizer) for prompt in prompts], params

    def tokenized(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        if not isinstance(prompt, str):
            return prompt
        token_ids = tokenize(tokenizer, prompt, engine.engine.max_model_len, engine.engine.max_characters)
        return {"prompt": prompt, "prompt_token_ids": token_ids}

    @app.post(CHAT_PATH, responses=RESPONSES, openapi_extra=json_body(CHAT_PATH, ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        completions.check_room(1)
        body, params = await bodies.read(request, read_chat)
        # In another thread, as a template may take seconds.
        text = await asyncio.to_thread(chat.render, body)
        prompt = await bodies.work(len(text), functools.partial(rendered_prompt, text))
        return await completions.respond(request, CHAT, [prompt], params, body)

    @app.post(TEXT_PATH, responses=RESPONSES, openapi_extra=json_body(TEXT_PATH, CompletionRequest))
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
    @app.get("/v1/models/{name:path}", responses={404: RESPONSES[404], **OTHER_ERRORS})
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
