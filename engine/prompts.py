"""Read prompts: texts or tokens, checked against what the model can take."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = str | dict[str, Any]


class PromptReader:
    """Turn prompts into tokens.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: number of tokens that the model takes as input.
        max_model_len: maximum number of tokens of a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self.longest_token: int = max(map(len, tokenizer.get_vocab()))  # in characters
        self.max_characters = max_model_len * self.longest_token

    def check_length(self, prompt: Prompt) -> None:
        """Raise ValueError for more tokens than a sequence may have: to check millions takes seconds."""
        given = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if isinstance(given, Sized) and len(given) > self._max_model_len:
            raise ValueError(
                f"the prompt has {len(given)} tokens, and a sequence may have {self._max_model_len} "
                "(max_model_len): shorten the prompt"
            )

    def read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return the text of a prompt, where there is one, and its tokens.

        Raises:
            ValueError: the prompt is malformed or empty, or its text is too long.
        """
        if isinstance(prompt, str):
            tokens = tokenize(self._tokenizer, prompt, self._max_model_len, self.max_characters)
            return prompt, self._checked(tokens, ", which the tokenizer makes of the text")
        if isinstance(prompt, dict) and isinstance(given := prompt.get("prompt_token_ids"), Iterable):
            return prompt.get("prompt"), self._checked(given)
        if isinstance(prompt, dict) and isinstance(prompt.get("prompt"), str):
            return self.read(prompt["prompt"])
        raise ValueError(f"prompt must be a string or {{'prompt_token_ids': [...]}}, got {prompt!r}")

    def _checked(self, tokens: Iterable[Any], origin: str = "") -> list[int]:
        token_ids = []
        for token in tokens:
            if not isinstance(token, Integral) or not 0 <= int(token) < self._vocab_size:
                most = self._vocab_size - 1
                raise ValueError(f"prompt_token_ids must be integers from 0 to {most}, got {token!r}{origin}")
            token_ids.append(int(token))
        if not token_ids:
            raise ValueError("prompt must have at least one token, got none")
        return token_ids


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_model_len: int,
    max_characters: int,
    add_special_tokens: bool = True,
) -> list[int]:
    """Return the tokens of a text.

    Args:
        max_model_len: maximum number of tokens of a sequence, for the message.
        max_characters: maximum number of characters; longer texts have too many tokens, and to count those of
            megabytes takes seconds.
        add_special_tokens: add those that the model's inputs begin or end with.

    Raises:
        ValueError: the text is too long, or the tokenizer refuses it.
    """
    if len(prompt) > max_characters:
        raise ValueError(
            f"the prompt has {len(prompt)} characters, and {max_model_len} tokens (max_model_len) have at "
            f"most {max_characters}: shorten the prompt"
        )
    try:
        return tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
    except (TypeError, UnicodeError) as error:  # half of a surrogate pair, which JSON can carry
        raise ValueError(f"prompt: the tokenizer refuses this text: {error}") from error


def cache_salt(prompt: Prompt) -> str | None:
    """Return the ``"cache_salt"`` of a prompt.

    Raises:
        ValueError: it is not a string, or empty.
    """
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt must be a string that is not empty, got {salt!r}")
    return salt
