"""Write log probabilities in the formats of the OpenAI API."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..outputs import Logprob, PositionLogprobs
from ..sampling.detokenizer import Detokenizer, token_text

Json = dict[str, Any]
_REPLACEMENT = "\ufffd".encode()
_MAX_CHANGED = 64  # maximum number of consecutive bytes of a prompt that its tokenizer may have changed
_MIN_LOGPROB = -9999.0  # stands for -inf and NaN, which JSON lacks


def top(position: PositionLogprobs, count: int) -> PositionLogprobs:
    """Return the ``count`` most likely tokens at a position, the best first."""
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return dict(ranked[:count])


def for_prompt(positions: Sequence[PositionLogprobs | None], count: int) -> list[Json | None]:
    """Return a prompt's log probabilities in vLLM's format, by token ID; None for the first token.

    Args:
        count: number of most likely tokens at each position, beside the token itself.
    """
    return [
        None
        if position is None
        else {
            str(token): {"logprob": _finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token, entry in _with_first(position, count).items()
        }
        for position in positions
    ]


class ChatLogprobs:
    """Write the log probabilities of a chat completion: ``{"content": [...]}`` with an entry for each token.

    The bytes of all tokens make up the text, except for special tokens that the text leaves out.

    Args:
        count: number of most likely tokens at each position.
        before: tokens of the prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        before: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._output = _Output(tokenizer, before, skip_special_tokens)

    def of(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> Json:
        """Return the log probabilities of the next tokens of the answer."""
        content = []
        for token, position in zip(token_ids, positions):
            assert position is not None  # prompts have a format of their own
            most_likely = top(position, self._count).items()
            content.append(
                {
                    **self._entry(token, position[token]),
                    "top_logprobs": [self._entry(other, logprob) for other, logprob in most_likely],
                }
            )
            self._output.append(token, position[token].decoded_token)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: Logprob) -> Json:
        text = self._output.text_of(token, logprob.decoded_token)
        data = token_bytes(self._tokenizer, token, text)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


class TextLogprobs:
    """Write the log probabilities of a text completion: four lists with an entry for each token.

    A token's string is its text in the answer, ``text[offset : offset + len(token)]``. A part of a character
    is written like OpenAI does, ``bytes:\\xf0\\x9f``, and has the offset of its character. Special tokens and
    stop tokens that the text leaves out are written by their names. In ``top_logprobs``, whose keys are
    texts, a token with the same text as an earlier one has the key ``token_id:`` and its ID, which is vLLM's
    notation of token IDs.

    Args:
        count: number of most likely tokens at each position.
        before: tokens of the prompt, which precede the output.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        before: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._output = _Output(tokenizer, before, skip_special_tokens)
        self._texts: dict[int, str] = {}

    def of_prompt(
        self, prompt: str, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
    ) -> Json:
        """Return the log probabilities of a prompt; the offsets of later tokens then count from its start."""
        lists, cursor = _lists(), _Cursor(prompt)
        all_special = True  # leading special tokens may be the tokenizer's own, absent from the text
        for token, position in zip(token_ids, positions):
            text = self._within(token)
            data = token_bytes(self._tokenizer, token, text)
            if _byte(self._tokenizer, token) is not None and not cursor.starts_with(data):
                text = "\ufffd"  # the decoder replaced an invalid byte
            max_skipped = 0 if "\ufffd" in text else _MAX_CHANGED
            text_of = _unchanged
            all_special = all_special and self._is_special(token)
            if cursor.take(data) or all_special:
                pass
            elif text.startswith(" ") and cursor.take(data[1:]):
                text_of = _without_space
            else:
                cursor.search(data, max_skipped)
            likely = self._likely(position, text_of)
            self._add(lists, token, text_of(token, text), cursor.offset, position, likely)
        self._output.offset = len(prompt)
        return lists

    def of(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> Json:
        """Return the log probabilities of the next tokens of the text; None for positions that have none."""
        lists = _lists()
        for token, position in zip(token_ids, positions):
            likely = self._likely(position, self._output.text_of)
            offset, text = self._output.append(token, self._within(token))
            self._add(lists, token, text, offset, position, likely)
        return lists

    def _likely(
        self, position: PositionLogprobs | None, text_of: Callable[[int, str], str]
    ) -> list[tuple[int, str, float]]:
        """Return the most likely tokens, their texts at this position, and their log probabilities."""
        tokens = {} if position is None else top(position, self._count)
        return [(token, text_of(token, one.decoded_token), _finite(one)) for token, one in tokens.items()]

    def _add(
        self,
        lists: Json,
        token: int,
        text: str,
        offset: int,
        position: PositionLogprobs | None,
        likely: list[tuple[int, str, float]],
    ) -> None:
        name = self._name(token, text)
        lists["tokens"].append(name)
        lists["text_offset"].append(offset)
        logprob = None if position is None else _finite(position[token])
        lists["token_logprobs"].append(logprob)
        top_logprobs: Json = {name: logprob}
        for other, other_text, other_logprob in likely:
            if other != token:
                key = self._name(other, other_text)
                top_logprobs[f"token_id:{other}" if key in top_logprobs else key] = other_logprob
        lists["top_logprobs"].append(None if position is None else top_logprobs)

    def _within(self, token: int) -> str:
        """Return the text of a token within a text."""
        if token not in self._texts:
            self._texts[token] = token_text(self._tokenizer, token)
        return self._texts[token]

    def _is_special(self, token: int) -> bool:
        return not self._tokenizer.decode([token, token], skip_special_tokens=True)

    def _name(self, token: int, text: str) -> str:
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(self._tokenizer, token, text))


class _Output:
    """Find the texts and offsets of an output's tokens, one after the other."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, before, skip_special_tokens)
        self.offset = 0  # offset of the text that is held back, or else of the next text
        self._character = 0  # offset of the last incomplete character

    def text_of(self, token: int, text: str) -> str:
        """Return the text that a token would have as the next one; ``text`` is its text within a text."""
        if self._detokenizer.at_start and text and not self._detokenizer.is_silent(token):
            return self._detokenizer.peek(token)
        return text

    def append(self, token: int, text: str) -> tuple[int, str]:
        """Append the next token and return its offset and its text."""
        text, held = self.text_of(token, text), self._detokenizer.held
        data = token_bytes(self._tokenizer, token, text)
        start, silent = self.offset, self._detokenizer.is_silent(token)
        new = self._detokenizer.append([token])
        pending = new + self._detokenizer.held
        self.offset += len(new)
        if "\ufffd" not in text and not silent and not pending.endswith(text):
            text = "\ufffd"  # the decoder replaces a valid byte among invalid ones too
        continues = bool(held) and _is_continuation(data)
        if continues or silent:
            offset = self._character if held else start
        else:
            offset = start + (len(held) if text.startswith("\ufffd") else len(pending) - len(text))
        only_continues = continues and all(map(_is_continuation, _single_bytes(data)))
        if pending.endswith("\ufffd") and not silent and not only_continues:
            self._character = offset + max(len(text) - 1, 0)
        return offset, text


class _Cursor:
    """Move through a text by the bytes of its tokens.

    Attributes:
        offset: offset of the last token, in characters.
    """

    def __init__(self, text: str) -> None:
        self._data = text.encode(errors="replace")
        self._position = 0  # in bytes
        self._num_characters = 0  # number of characters that begin before the position
        self.offset = 0

    def starts_with(self, data: bytes) -> bool:
        """Return whether these bytes come next."""
        return self._data.startswith(data, self._position)

    def take(self, data: bytes) -> bool:
        """Move past these bytes if they come next, and return whether they do."""
        next_byte = self._data[self._position : self._position + 1]
        self.offset = self._num_characters - _is_continuation(next_byte)
        matches = self.starts_with(data)
        if matches:
            self._advance(len(data))
        return matches

    def search(self, data: bytes, max_skipped: int) -> None:
        """Move past these bytes if they come after any U+FFFD and at most ``max_skipped`` other bytes.

        The skipped bytes are those that the tokenizer changed.
        """
        start = self._position
        while self._data.startswith(_REPLACEMENT, start):
            start += len(_REPLACEMENT)
        position = self._data.find(data, start, start + max_skipped + len(data)) if data else -1
        if position >= 0:
            self._advance(position - self._position)
            self.take(data)

    def _advance(self, count: int) -> None:
        passed = self._data[self._position : self._position + count]
        self._num_characters += sum(not _is_continuation(byte) for byte in _single_bytes(passed))
        self._position += count


def _is_continuation(data: bytes) -> bool:
    """Return whether the first byte is a continuation byte of UTF-8."""
    return bool(data) and data[0] & 0xC0 == 0x80


def _single_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def _unchanged(token: int, text: str) -> str:
    return text


def _without_space(token: int, text: str) -> str:
    return text.removeprefix(" ")


def _lists() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bytes:
    """Return the UTF-8 bytes of a token, which may be a part of a character.

    Args:
        text: text of the token; U+FFFD in it stands for a part of a character.
    """
    if "\ufffd" not in text:
        return text.encode(errors="replace")
    if (byte := _byte(tokenizer, token)) is not None:
        return byte
    piece = str(tokenizer.convert_ids_to_tokens(token))
    byte_of = _byte_of_character()
    if all(character in byte_of for character in piece):
        return bytes(byte_of[character] for character in piece)
    return text.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of byte-level tokenizers; cached, as building it takes 0.4 ms."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _byte(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes | None:
    """Return the byte of a token that is written as one, such as ``<0x0A>``; None for other tokens."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return bytes([int(piece[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else None


def _with_first(position: PositionLogprobs, count: int) -> PositionLogprobs:
    """Return the token at this position, followed by the most likely tokens."""
    first = next(iter(position))
    return {first: position[first], **top(position, count)}


def _finite(logprob: Logprob) -> float:
    return logprob.logprob if logprob.logprob > _MIN_LOGPROB else _MIN_LOGPROB
