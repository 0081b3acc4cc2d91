"""Decode tokens to text incrementally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Number of prompt tokens decoded with the output: enough for decoders that treat the first token differently.
_CONTEXT = 5
# A character has at most four bytes, so an incomplete one spans at most as many tokens.
_CHARACTER = 4
_MAX_HELD = 2 * _CHARACTER  # tokens held back before some of them are taken to be invalid UTF-8


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text that a token has in the middle of a text.

    Decoders may drop the space at the start of a text, so a token decoded alone could lack it.
    """

    def decode(*tokens: int) -> str:
        return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    alone = decode(token)
    if "\ufffd" in alone:  # part of a character; two of them could be a whole one
        return alone
    return decode(token, token).removeprefix(alone)


def _decoder(tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """Return a function that decodes token IDs.

    It is that of the tokenizers library where ``tokenizer.decode`` does nothing but call it, with conversions
    that take four times as long.
    """
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and getattr(tokenizer.decode, "__func__", None) is PreTrainedTokenizerBase.decode
        and getattr(tokenizer._decode, "__func__", None) is PreTrainedTokenizerFast._decode
    ):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    settings = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return partial(tokenizer.decode, **settings)  # type: ignore[return-value]


class Detokenizer:
    """Decode the tokens of one output as they are sampled.

    A token may be part of a UTF-8 character, and its text may depend on the token before it. So the last few
    tokens are decoded with and without the new one, and the difference is the new text. It is held back while
    it ends with an incomplete character. A token costs a few calls of the tokenizer with a few tokens each,
    regardless of the output's length.

    Args:
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._decode = _decoder(tokenizer, skip_special_tokens)
        self._ids = self._context(prompt_token_ids)
        self._read = len(self._ids)  # number of tokens of _ids whose text was returned
        self._before = self._decode(self._ids)  # the text of those
        self._held = ""  # the text of the other tokens

    def append(self, token_ids: Sequence[int]) -> str:
        """Return the new text after these tokens; it is empty while a character is incomplete."""
        # One by one: byte-level decoders replace a whole sequence of bytes that ends with an incomplete
        # character, and so would lose the characters before it.
        return "".join(map(self._append, token_ids))

    def _append(self, token: int) -> str:
        self._ids.append(token)
        text = self._pending()
        if text and not text.endswith("\ufffd"):
            self._advance(len(self._ids))
            return text
        if text == self._held and self.is_silent(token):  # it would only lengthen what is held back
            self._ids.pop()
        self._held = text
        if len(self._ids) - self._read <= _MAX_HELD:
            return ""
        end = self._invalid_end()  # these bytes will never be a character
        text = self._pending(end)
        self._advance(end)
        return text

    @property
    def held(self) -> str:
        """Return the text that is held back, as it would be if the output ended here."""
        return self._held

    @property
    def at_start(self) -> bool:
        """Return whether no text precedes the next token, in which case the decoder may drop its space."""
        return not (self._before or self._held)

    def peek(self, token: int) -> str:
        """Return the text that a token would have as the next one, at the start of the text."""
        return self._decode([*self._ids, token])

    def is_silent(self, token: int) -> bool:
        """Return whether a token has no text anywhere; a space may lack one only at the start."""
        return not self._decode([token, token])

    def flush(self) -> str:
        """Return the text that was held back, at the end of the output."""
        text = self._pending()
        self._advance(len(self._ids))
        return text

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """Return the last tokens of the prompt to decode with the output.

        There are `_CONTEXT` of them, or more if those have no text. They do not begin within a character,
        whose bytes the decoder would join with those of the output.
        """
        size = _CONTEXT
        context = list(prompt_token_ids[-size:])
        while len(context) < len(prompt_token_ids) and not self._decode(context):
            size *= 2
            context = list(prompt_token_ids[-size:])
        for start in range(min(_CONTEXT, len(context))):
            if "\ufffd" not in self._decode(context[start:]):
                return context[start:]
        return []

    def _pending(self, end: int | None = None) -> str:
        """Return the text of the tokens, up to ``end`` if given, that was not returned yet."""
        text = self._decode(self._ids[:end])
        if text.startswith(self._before):
            return text[len(self._before) :]
        return self._decode(self._ids[self._read : end])  # the new bytes changed the text before them

    def _invalid_end(self) -> int:
        """Return the end of the invalid bytes: before the last few tokens, which may begin a character."""
        text = self._decode(self._ids)
        last = len(self._ids) - _CHARACTER
        for end in range(last, last - _CHARACTER, -1):
            if text.startswith(self._decode(self._ids[:end])):
                return end
        return last

    def _advance(self, end: int) -> None:
        """Mark the text up to token ``end`` as returned; its new tokens are the context of the next ones."""
        if end > self._read:
            self._ids, self._read = self._ids[self._read :], end - self._read
            self._before = self._decode(self._ids[: self._read])
        self._held = self._pending() if self._read < len(self._ids) else ""
