"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens of the prompt before the output: enough for a decoder that treats the first token differently.
_CONTEXT = 5
# A character is at most four bytes, so no more tokens than that are part of an incomplete one.
_CHARACTER = 4
_HELD = 2 * _CHARACTER  # tokens held back before it is looked which of them are just wrong


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token within a text. Decoders may drop the space that a text begins with, which a
    token that is decoded alone would lack."""

    def decode(*tokens: int) -> str:
        return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    alone = decode(token)
    if "\ufffd" in alone:  # a part of a character, and two of them might be one
        return alone
    return decode(token, token).removeprefix(alone)


class Detokenizer:
    """The text of one output.

    A token may be part of a UTF-8 character, and its text may depend on the token before it. So a few tokens
    are decoded with and without the new one, and the difference is the new text; it is held back while it
    ends in an incomplete character. A token costs a few calls of the tokenizer, each with a few tokens,
    however long the output is and whatever the tokens are.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = self._context(prompt_token_ids)
        self._read = len(self._ids)  # tokens of _ids whose text is out
        self._before = self._decode(self._ids)  # their text
        self._held = ""  # the text of the others

    def append(self, token_ids: Sequence[int]) -> str:
        """New text after these tokens; empty while a character is incomplete."""
        # One by one, or an incomplete character would spoil those before it: a decoder with a token a byte
        # replaces all bytes in a row where the last ones are none.
        return "".join(map(self._append, token_ids))

    def _append(self, token: int) -> str:
        self._ids.append(token)
        text = self._pending()
        if text and not text.endswith("\ufffd"):
            self._advance(len(self._ids))
            return text
        if text == self._held and self.is_silent(token):  # they would pile up, or hide a border
            self._ids.pop()
        self._held = text
        if len(self._ids) - self._read <= _HELD:
            return ""
        end = self._border()  # these bytes will never be a character
        text = self._pending(end)
        self._advance(end)
        return text

    @property
    def held(self) -> str:
        """The text of the tokens that is held back, as it would be if they were the last ones."""
        return self._held

    @property
    def at_start(self) -> bool:
        """Return whether nothing before the next token has a text: the decoder may drop its space then."""
        return not (self._before or self._held)

    def peek(self, token: int) -> str:
        """Return the text of a next token, at the start."""
        return self._decode([*self._ids, token])

    def is_silent(self, token: int) -> bool:
        """Return whether a token never has a text here; a space may have none at the start alone."""
        return not self._decode([token, token])

    def flush(self) -> str:
        """What was held back, at the end of the output."""
        text = self._pending()
        self._advance(len(self._ids))
        return text

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt that have a text, `_CONTEXT` if that is enough, and none of them part
        of a character that is cut off: the decoder would join such bytes with those of the output."""
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
        """The text of the tokens that is not out, or of those before ``end``."""
        text = self._decode(self._ids[:end])
        if text.startswith(self._before):
            return text[len(self._before) :]
        return self._decode(self._ids[self._read : end])  # the new bytes spoil those before them

    def _border(self) -> int:
        """Where to cut the tokens so that no character is: before the last few, which may be the start of
        one."""
        text = self._decode(self._ids)
        last = len(self._ids) - _CHARACTER
        for end in range(last, last - _CHARACTER, -1):
            if text.startswith(self._decode(self._ids[:end])):
                return end
        return last

    def _advance(self, end: int) -> None:
        """The text up to token ``end`` is out; what was new in it is the context of the next tokens."""
        if end > self._read:
            self._ids, self._read = self._ids[self._read :], end - self._read
            self._before = self._decode(self._ids[: self._read])
        self._held = self._pending() if self._read < len(self._ids) else ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )  # type: ignore[return-value]
