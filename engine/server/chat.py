"""Conversations to prompts, by the template that the model's tokenizer brings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..prompts import Prompt
from .protocol import ChatCompletionRequest
from .time_limit import run_within

# A template takes milliseconds. It may loop over what the client sends, and loops in loops take for ever.
_SECONDS = 10.0


def render(tokenizer: PreTrainedTokenizerBase, request: ChatCompletionRequest, max_characters: int) -> str:
    """Return a conversation as text, with the opening of the assistant's answer.

    Args:
        max_characters: more have too many tokens; nobody is answered while they are counted.

    Raises:
        ValueError: the model has no chat template, or the template refuses the messages or their settings.
    """
    _check_settings(request.chat_template_kwargs)
    if not tokenizer.chat_template:
        raise ValueError("messages: the model has no chat template; use /v1/completions")

    def render() -> str:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            [message.for_template() for message in request.messages],
            tokenize=False,
            add_generation_prompt=request.add_generation_prompt,
            **request.chat_template_kwargs,
        )

    try:
        text = run_within(_SECONDS, render)
    except TemplateError as error:  # in the template's own words, as a rule
        raise ValueError(f"messages: the model's chat template refuses them: {error}") from error
    except Exception as error:
        raise ValueError(
            f"messages: the model's chat template failed: {type(error).__name__}: {error}; change them, or "
            "chat_template_kwargs"
        ) from error
    if len(text) > max_characters:
        raise ValueError(
            f"messages: they have {len(text)} characters, and as many tokens as a sequence may have have at "
            f"most {max_characters}: shorten them"
        )
    return text


def rendered_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the tokens of what `render` has made.

    Raises:
        ValueError: the tokenizer refuses it.
    """
    try:
        # The template has written the special tokens already.
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TypeError, UnicodeError) as error:
        raise ValueError(f"messages: the tokenizer refuses their text: {error}") from error
    return {"prompt": text, "prompt_token_ids": token_ids}


def _check_settings(names: Iterable[str]) -> None:
    """Settings are variables of the template. Another template, above all, would be a program of the client's
    that runs here for as long as it likes, and nobody else is answered meanwhile."""
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in names:
        if name in arguments and name not in ("tools", "documents"):
            raise ValueError(f"chat_template_kwargs must be variables of the template; leave {name!r} out")
