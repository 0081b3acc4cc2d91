"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens of the prompt before the output: enough for a decoder that treats the first token differently.
_CONTEXT = 5


class Detokenizer:
    """The text of one output.

    A token may be part of a UTF-8 character, and its text may depend on the token before it. So a few tokens
    are decoded with and without the new one, and the difference is the new text; it is held back while it
    ends in an incomplete character.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = self._context(prompt_token_ids)
        self._read = len(self._ids)  # tokens of _ids whose text is out

    def append(self, token_ids: Sequence[int]) -> str:
        """New text after these tokens; empty while a character is incomplete."""
        self._ids += token_ids
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        if text:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back, at the end of the output."""
        text = self._pending()
        self._read = len(self._ids)
        return text

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """Up to `_CONTEXT` last tokens of the prompt, none of them part of a character that is cut off: the
        decoder would join such bytes with those of the output."""
        for size in range(min(_CONTEXT, len(prompt_token_ids)), 0, -1):
            context = list(prompt_token_ids[-size:])
            if "\ufffd" not in self._decode(context):
                return context
        return []

    def _pending(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )  # type: ignore[return-value]
