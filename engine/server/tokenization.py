"""Add /tokenize and /detokenize, in vLLM's format: which tokens a prompt has, and which text tokens have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from ..chat_template import rendered_prompt
from ..llm_engine import LLMEngine
from ..prompts import tokenize
from .bodies import Bodies, json_body
from .errors import ERRORS
from .fields import Integers, Strict
from .protocol import ChatCompletionRequest

_TOKENIZE_PATH, _DETOKENIZE_PATH = "/tokenize", "/detokenize"


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ChatCompletionRequest):
    """Hold the body of a chat completion, which is rendered and tokenized as it would be there."""

    model: str | None = None  # type: ignore[assignment]
    add_special_tokens: Literal[False] = False  # templates write them
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Integers


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    prompt: str


# The body of each path in errors; of /tokenize the one with a prompt.
TOKENIZATION_MODELS: dict[str, type[BaseModel]] = {
    _TOKENIZE_PATH: TokenizeRequest,
    _DETOKENIZE_PATH: DetokenizeRequest,
}


def add_tokenization(
    app: FastAPI,
    bodies: Bodies,
    check_model: Callable[[str], None],
    engine: LLMEngine,
    render: Callable[[ChatCompletionRequest], str],
) -> None:
    """Add the routes.

    Args:
        check_model: raises an error for a name that the model does not have.
        render: returns the text of a conversation.
    """
    max_token_id = max(engine.tokenizer.get_vocab().values())

    def answer(token_ids: list[int], strings: bool, tokenizer: PreTrainedTokenizerBase) -> Response:
        return JSONResponse(
            {
                "count": len(token_ids),
                "max_model_len": engine.max_model_len,
                "tokens": token_ids,
                "token_strs": tokenizer.convert_ids_to_tokens(token_ids) if strings else None,
            }
        )

    def read(content: bytes, tokenizer: PreTrainedTokenizerBase) -> TokenizeChatRequest | Response:
        """Return the answer to a prompt, or a conversation that is still to be rendered."""
        data = bodies.load(content)
        if data.get("messages") is not None and data.get("prompt") is None:
            conversation = TokenizeChatRequest.model_validate(data)
            if conversation.model is not None:
                check_model(conversation.model)
            return conversation
        body = TokenizeRequest.model_validate(data)
        if body.model is not None:
            check_model(body.model)
        token_ids = tokenize(
            tokenizer, body.prompt, engine.max_model_len, engine.max_characters, body.add_special_tokens
        )
        return answer(token_ids, body.return_token_strs, tokenizer)

    def read_tokens(content: bytes, tokenizer: PreTrainedTokenizerBase) -> Response:
        body = bodies.parse(content, DetokenizeRequest)
        if body.model is not None:
            check_model(body.model)
        for token in body.tokens:
            if not 0 <= token <= max_token_id:
                raise ValueError(f"tokens must be integers from 0 to {max_token_id}, got {token}")
        return JSONResponse({"prompt": tokenizer.decode(body.tokens)})

    @app.post(
        _TOKENIZE_PATH,
        response_model=TokenizeResponse,
        responses=ERRORS,
        openapi_extra=json_body(_TOKENIZE_PATH, TokenizeRequest, TokenizeChatRequest),
    )
    async def tokenize_prompt(request: Request) -> Response:
        body = await bodies.read(request, read)
        if isinstance(body, Response):
            return body
        strings = body.return_token_strs
        # In another thread, as a template may take seconds.
        text = await asyncio.to_thread(render, body)

        def tokenize_text(tokenizer: PreTrainedTokenizerBase) -> Response:
            prompt = rendered_prompt(text, tokenizer)
            assert isinstance(prompt, dict)
            return answer(prompt["prompt_token_ids"], strings, tokenizer)

        return await bodies.work(len(text), tokenize_text)

    @app.post(
        _DETOKENIZE_PATH,
        response_model=DetokenizeResponse,
        responses=ERRORS,
        openapi_extra=json_body(_DETOKENIZE_PATH, DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        return await bodies.read(request, read_tokens)
