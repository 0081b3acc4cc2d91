"""Serve OpenAI's Responses API and Anthropic's Messages API as translations around the chat endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from transformers import PreTrainedTokenizerBase

from ..prompts import Prompt
from ..sampling_params import SamplingParams
from . import anthropic_request, responses_request
from .anthropic_answer import MessagesTranslation
from .anthropic_request import CountTokensRequest, MessagesRequest
from .bodies import Bodies, json_body
from .conversation import as_chat
from .errors import ANTHROPIC_PATH, ANTHROPIC_RESPONSES, RESPONSES
from .event_stream import Translation
from .protocol import ChatCompletionRequest
from .responses_answer import ResponsesTranslation
from .responses_request import ResponsesRequest

RESPONSES_PATH = "/v1/responses"
COUNT_PATH = f"{ANTHROPIC_PATH}/count_tokens"
TRANSLATED_MODELS = {RESPONSES_PATH: ResponsesRequest}  # by path, for errors that name a field


def add_translated_apis(
    app: FastAPI,
    bodies: Bodies,
    check_room: Callable[[int], None],
    checked: Callable[[ChatCompletionRequest], SamplingParams],
    rendered: Callable[[ChatCompletionRequest], Awaitable[tuple[str, Prompt]]],
    respond_chat: Callable[
        [Request, ChatCompletionRequest, SamplingParams, Translation], Awaitable[Response]
    ],
) -> None:
    """Add the routes to the application.

    Args:
        check_room: raises an error if so many more prompts may not wait.
        checked: checks a chat request beyond its fields and returns its sampling settings.
        rendered: returns the text of a chat request and its prompt.
        respond_chat: answers a chat request.
    """

    @app.post(RESPONSES_PATH, responses=RESPONSES, openapi_extra=json_body(RESPONSES_PATH, ResponsesRequest))
    async def responses(request: Request) -> Response:
        def read(
            content: bytes, tokenizer: PreTrainedTokenizerBase
        ) -> tuple[ResponsesRequest, ChatCompletionRequest, SamplingParams]:
            asked = bodies.parse(content, ResponsesRequest)
            chat = as_chat(asked.for_chat(), responses_request.NAMES)
            return asked, chat, checked(chat)

        check_room(1)
        asked, chat, params = await bodies.read(request, read)
        return await respond_chat(request, chat, params, ResponsesTranslation(asked, params))

    @app.post(
        ANTHROPIC_PATH,
        responses=ANTHROPIC_RESPONSES,
        openapi_extra=json_body(ANTHROPIC_PATH, MessagesRequest),
    )
    async def messages(request: Request) -> Response:
        def read(
            content: bytes, tokenizer: PreTrainedTokenizerBase
        ) -> tuple[MessagesRequest, ChatCompletionRequest, SamplingParams]:
            asked = bodies.parse(content, MessagesRequest)
            chat = as_chat(asked.for_chat(), anthropic_request.NAMES)
            return asked, chat, checked(chat)

        check_room(1)
        asked, chat, params = await bodies.read(request, read)
        return await respond_chat(request, chat, params, MessagesTranslation(asked.max_tokens))

    @app.post(
        COUNT_PATH, responses=ANTHROPIC_RESPONSES, openapi_extra=json_body(COUNT_PATH, CountTokensRequest)
    )
    async def count_tokens(request: Request) -> dict[str, Any]:
        def read(content: bytes, tokenizer: PreTrainedTokenizerBase) -> ChatCompletionRequest:
            asked = bodies.parse(content, CountTokensRequest)
            chat = as_chat(asked.for_chat(), anthropic_request.NAMES)
            checked(chat)
            return chat

        _, prompt = await rendered(await bodies.read(request, read))
        assert isinstance(prompt, dict)  # as tokens
        return {"input_tokens": len(prompt["prompt_token_ids"])}
