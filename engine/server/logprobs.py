"""Log probabilities in the shapes that OpenAI's clients know."""

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
_FAR = 64  # bytes of a prompt that a tokenizer may change in one place
_LEAST = -9999.0  # JSON has no infinity, and no NaN


def top(position: PositionLogprobs, count: int) -> PositionLogprobs:
    """The ``count`` most likely tokens of a position, the best first."""
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return dict(ranked[:count])


def for_prompt(positions: Sequence[PositionLogprobs | None], count: int) -> list[Json | None]:
    """vLLM's shape: by token id, as text since JSON has no other keys; None for the first token."""
    return [
        None
        if position is None
        else {
            str(token): {"logprob": _finite(one), "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in _with_first(position, count).items()
        }
        for position in positions
    ]


class ChatLogprobs:
    """Of the answers in a conversation: ``{"content": [...]}``, a token each.

    The bytes of all tokens are the text, but for special tokens that it leaves out.
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
        content = []
        for token, position in zip(token_ids, positions):
            assert position is not None  # prompts have their own shape
            most_likely = top(position, self._count).items()
            content.append(
                {
                    **self._entry(token, position[token]),
                    "top_logprobs": [self._entry(other, one) for other, one in most_likely],
                }
            )
            self._output.append(token, position[token].decoded_token)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, one: Logprob) -> Json:
        text = self._output.text_of(token, one.decoded_token)
        data = token_bytes(self._tokenizer, token, text)
        return {"token": text, "logprob": _finite(one), "bytes": list(data)}


class TextLogprobs:
    """Of one text: four lists, a token each, with its place in the text.

    A token is what it is in the text, ``text[offset : offset + len(token)]``. A part of a character is
    written as OpenAI does, ``bytes:\\xf0\\x9f``, and has the place of its character. Special tokens that the
    text leaves out, and what ended it, have their names all the same. In ``top_logprobs``, whose keys are
    texts, a token with the text of one before it has ``token_id:`` and its id for a key, as vLLM writes
    tokens that are asked for as ids.

    Args:
        before: tokens that the text, or what is in it after the prompt, goes on from.
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
        """Of a prompt with this text; what `of` gives then comes after it."""
        found, place = _lists(), _Place(prompt)
        own = True  # special tokens before all others may be the tokenizer's own
        for token, position in zip(token_ids, positions):
            text = self._within(token)
            data = token_bytes(self._tokenizer, token, text)
            if _byte(self._tokenizer, token) is not None and not place.has(data):
                text = "\ufffd"  # whatever it was, the decoder made that of it
            far = 0 if "\ufffd" in text else _FAR
            text_of = _as_it_is
            own = own and self._is_special(token)
            if place.take(data) or own:
                pass
            elif text.startswith(" ") and place.take(data[1:]):
                text_of = _without_space
            else:
                place.search(data, far)
            self._add(
                found, token, text_of(token, text), place.offset, position, self._likely(position, text_of)
            )
        self._output.offset = len(prompt)
        return found

    def of(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> Json:
        """Of the next tokens of the text; a position that is None has no log probability."""
        found = _lists()
        for token, position in zip(token_ids, positions):
            likely = self._likely(position, self._output.text_of)
            offset, text = self._output.append(token, self._within(token))
            self._add(found, token, text, offset, position, likely)
        return found

    def _likely(
        self, position: PositionLogprobs | None, text_of: Callable[[int, str], str]
    ) -> list[tuple[int, str, float]]:
        """Return the most likely tokens, what they would be in the text, and their log probabilities."""
        found = {} if position is None else top(position, self._count)
        return [(token, text_of(token, one.decoded_token), _finite(one)) for token, one in found.items()]

    def _add(
        self,
        found: Json,
        token: int,
        text: str,
        offset: int,
        position: PositionLogprobs | None,
        likely: list[tuple[int, str, float]],
    ) -> None:
        name = self._name(token, text)
        found["tokens"].append(name)
        found["text_offset"].append(offset)
        logprob = None if position is None else _finite(position[token])
        found["token_logprobs"].append(logprob)
        names: Json = {name: logprob}
        for other, its_text, its_logprob in likely:
            if other != token:
                key = self._name(other, its_text)
                names[f"token_id:{other}" if key in names else key] = its_logprob
        found["top_logprobs"].append(None if position is None else names)

    def _within(self, token: int) -> str:
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
    """Tokens one after the other, as the texts that they are in an output and at their places in it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, before, skip_special_tokens)
        self.offset = 0  # of the text that is held back, or comes next
        self._character = 0  # place of the last one that is not whole

    def text_of(self, token: int, text: str) -> str:
        """Return the text that a token has if it is the next one; ``text`` is what it has within a text."""
        if self._detokenizer.at_start and text and not self._detokenizer.is_silent(token):
            return self._detokenizer.peek(token)
        return text

    def append(self, token: int, text: str) -> tuple[int, str]:
        """Take the next token; return its place and its text."""
        text, held = self.text_of(token, text), self._detokenizer.held
        data = token_bytes(self._tokenizer, token, text)
        start, hidden = self.offset, self._detokenizer.is_silent(token)
        out = self._detokenizer.append([token])
        known = out + self._detokenizer.held
        self.offset += len(out)
        if "\ufffd" not in text and not hidden and not known.endswith(text):
            text = "\ufffd"  # a byte among wrong ones, which the decoder replaces all
        goes_on = bool(held) and _goes_on(data)
        if goes_on or hidden:
            place = self._character if held else start
        else:
            place = start + (len(held) if text.startswith("\ufffd") else len(known) - len(text))
        if known.endswith("\ufffd") and not hidden and not (goes_on and all(map(_goes_on, _each(data)))):
            self._character = place + max(len(text) - 1, 0)
        return place, text


class _Place:
    """A place in a text that tokens go along, each at its bytes."""

    def __init__(self, text: str) -> None:
        self._data = text.encode(errors="replace")
        self._at = 0
        self._passed = 0  # characters that begin before
        self.offset = 0  # of the last token

    def has(self, data: bytes) -> bool:
        return self._data.startswith(data, self._at)

    def take(self, data: bytes) -> bool:
        """Go past these bytes, if they are what comes next."""
        self.offset = self._passed - _goes_on(self._data[self._at : self._at + 1])
        found = self.has(data)
        if found:
            self._go(len(data))
        return found

    def search(self, data: bytes, far: int) -> None:
        """Go past these bytes if they come after U+FFFD and at most
        ``far`` other bytes: the tokenizer changed those."""
        start = self._at
        while self._data.startswith(_REPLACEMENT, start):
            start += len(_REPLACEMENT)
        found = self._data.find(data, start, start + far + len(data)) if data else -1
        if found >= 0:
            self._go(found - self._at)
            self.take(data)

    def _go(self, count: int) -> None:
        passed = self._data[self._at : self._at + count]
        self._passed += sum(not _goes_on(byte) for byte in _each(passed))
        self._at += count


def _goes_on(data: bytes) -> bool:
    """Return whether the first byte is within a character."""
    return bool(data) and data[0] & 0xC0 == 0x80


def _each(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def _as_it_is(token: int, text: str) -> str:
    return text


def _without_space(token: int, text: str) -> str:
    return text.removeprefix(" ")


def _lists() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bytes:
    """The UTF-8 of a token with this text, which may be a part of a character."""
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
    """Return what the characters of byte-level tokenizers stand for; to make it takes 0.4 ms."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _byte(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes | None:
    """Return what a token that is written as a byte, ``<0x0A>``, stands for."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return bytes([int(piece[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else None


def _with_first(position: PositionLogprobs, count: int) -> PositionLogprobs:
    """The most likely tokens and, in front, the one that is there."""
    first = next(iter(position))
    return {first: position[first], **top(position, count)}


def _finite(one: Logprob) -> float:
    return one.logprob if one.logprob > _LEAST else _LEAST
