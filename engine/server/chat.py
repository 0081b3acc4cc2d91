"""Render conversations to prompts by the chat template of the model's tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..prompts import Prompt
from .protocol import ChatCompletionRequest
from .time_limit import run_within

# Time limit of a template, which usually takes milliseconds. Nested loops over a client's input may not end.
_SECONDS = 10.0


def render(tokenizer: PreTrainedTokenizerBase, request: ChatCompletionRequest, max_characters: int) -> str:
    """Return a conversation as text, with the beginning of the assistant's message.

    Args:
        max_characters: maximum number of characters; longer texts have too many tokens for a sequence and
            are not tokenized, as that would delay other requests.

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
    except TemplateError as error:  # its message usually comes from the template
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
    """Tokenize the result of `render`.

    Raises:
        ValueError: the tokenizer refuses it.
    """
    try:
        # The text already contains the special tokens.
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TypeError, UnicodeError) as error:
        raise ValueError(f"messages: the tokenizer refuses their text: {error}") from error
    return {"prompt": text, "prompt_token_ids": token_ids}


def _check_settings(names: Iterable[str]) -> None:
    """Check that settings are variables of the template, not arguments of ``apply_chat_template``.

    A client's own template, above all, would be a program that could run here without end.

    Raises:
        ValueError: a name is such an argument.
    """
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in names:
        if name in arguments and name not in ("tools", "documents"):
            raise ValueError(f"chat_template_kwargs must be variables of the template; leave {name!r} out")
