"""Create the HTTP application: routes and lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import FastAPI, Request, Response
from transformers import PreTrainedTokenizerBase

from ..chat_template import rendered_prompt
from ..prompts import Prompt, tokenize
from ..sampling_params import SamplingParams
from .async_engine import AsyncEngine
from .block_events import add_block_events
from .bodies import Bodies, json_body
from .chat import Chat
from .chat_settings import ChatSettings
from .choices import CHAT, TEXT
from .completions import Completions
from .errors import RESPONSES, add_error_handlers
from .event_stream import Translation
from .limits import Limits
from .metrics import Metrics
from .middleware import HeadAsGet
from .operations import ModelNames, add_operations
from .page_files import add_page
from .protocol import ChatCompletionRequest, CompletionRequest
from .tokenization import TOKENIZATION_MODELS, add_tokenization
from .translated_apis import TRANSLATED_MODELS, add_translated_apis

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"

LAST_STEP_SECONDS = 5.0  # time limit of the engine's last step when the server stops; it may hang


def create_app(
    engine: AsyncEngine,
    model_names: str | Sequence[str],
    limits: Limits | None = None,
    healthy: Callable[[], bool] | None = None,
    run_engine: bool = True,
    chat_settings: ChatSettings | None = None,
) -> FastAPI:
    """Create the application around an engine.

    Args:
        model_names: names of the model in requests; the first is that in answers.
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
    names = ModelNames(model_names)
    check_model = names.check
    metrics = Metrics(names.first, engine.stats, engine.engine.config, engine.engine.max_model_len)
    chat_settings = chat_settings or ChatSettings()
    if (template := chat_settings.template()) is not None:
        engine.engine.tokenizer.chat_template = template
    bodies = Bodies(limits, engine.engine.tokenizer)
    chat = Chat(chat_settings, bodies.tokenizer, engine.engine.max_characters)
    completions = Completions(
        engine,
        metrics,
        bodies.tokenizer,
        names.first,
        limits.max_waiting_requests,
        bodies.in_thread,
    )
    add_error_handlers(
        app,
        {
            CHAT_PATH: ChatCompletionRequest,
            TEXT_PATH: CompletionRequest,
            **TOKENIZATION_MODELS,
            **TRANSLATED_MODELS,
        },
    )

    def read_chat(
        content: bytes, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[ChatCompletionRequest, SamplingParams]:
        body = bodies.parse(content, ChatCompletionRequest)
        return body, checked(body)

    def checked(body: ChatCompletionRequest) -> SamplingParams:
        check_model(body.model)
        params = body.sampling_params({"max_tokens": None, **engine.engine.sampling_defaults})
        limits.check_choices(1, params.num_sequences)
        limits.check_grammar(params)
        return params

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
        return await respond_chat(request, body, params)

    async def rendered(body: ChatCompletionRequest) -> tuple[str, Prompt]:
        # In another thread, as a template may take seconds.
        text = await asyncio.to_thread(chat.render, body)
        return text, await bodies.work(len(text), functools.partial(rendered_prompt, text))

    async def respond_chat(
        request: Request,
        body: ChatCompletionRequest,
        params: SamplingParams,
        translation: Translation | None = None,
    ) -> Response:
        text, prompt = await rendered(body)
        params, create_reader = chat.reading(body, params, text)
        limits.check_grammar(params)  # of the tools that must be called
        return await completions.respond(request, CHAT, [prompt], params, body, create_reader, translation)

    add_translated_apis(app, bodies, completions.check_room, checked, rendered, respond_chat)

    @app.post(TEXT_PATH, responses=RESPONSES, openapi_extra=json_body(TEXT_PATH, CompletionRequest))
    async def text_completions(request: Request) -> Response:
        completions.check_room(1)
        body, prompts, params = await bodies.read(request, read_text)
        return await completions.respond(request, TEXT, prompts, params, body)

    add_operations(app, names, engine.engine, metrics, healthy or (lambda: engine.error is None))
    add_tokenization(app, bodies, check_model, engine.engine, chat.render)

    add_block_events(app, engine)
    add_page(app)

    return app
