"""Log probabilities in the shapes that OpenAI's clients know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..detokenizer import Detokenizer
from ..outputs import Logprob, PositionLogprobs

Json = dict[str, Any]
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
    """Of the answers in a conversation: ``{"content": [...]}``, a token each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
        self._tokenizer = tokenizer
        self._count = count

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
        return {"content": content, "refusal": None}

    def _entry(self, token: int, one: Logprob) -> Json:
        data = token_bytes(self._tokenizer, token, one.decoded_token)
        return {"token": one.decoded_token, "logprob": _finite(one), "bytes": list(data)}


class TextLogprobs:
    """Of one text: four lists, a token each, with its place in the text.

    Args:
        before: tokens that the text goes on from.
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
        self._detokenizer = Detokenizer(tokenizer, before, skip_special_tokens)
        self._offset = 0

    def of(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> Json:
        """Of the next tokens of the text; a position that is None has no log probability."""
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, position in zip(token_ids, positions):
            found["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.append([token]))
            if position is None:
                text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
                found["tokens"].append(self._name(token, text))  # type: ignore[arg-type]
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["tokens"].append(self._name(token, position[token].decoded_token))
            found["token_logprobs"].append(_finite(position[token]))
            names: Json = {}  # two tokens may have one text: the more likely one is in
            for other, one in _with_first(position, self._count).items():
                names.setdefault(self._name(other, one.decoded_token), _finite(one))
            found["top_logprobs"].append(names)
        return found

    def _name(self, token: int, text: str) -> str:
        """A part of a character as OpenAI writes it: ``bytes:\\xf0\\x9f``."""
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(self._tokenizer, token, text))


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bytes:
    """The UTF-8 of a token with this text, which may be a part of a character."""
    if "\ufffd" not in text:
        return text.encode(errors="replace")
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if all(character in byte_of for character in piece):
        return bytes(byte_of[character] for character in piece)
    return text.encode()


def _with_first(position: PositionLogprobs, count: int) -> PositionLogprobs:
    """The most likely tokens and, in front, the one that is there."""
    first = next(iter(position))
    return {first: position[first], **top(position, count)}


def _finite(one: Logprob) -> float:
    return one.logprob if one.logprob > _LEAST else _LEAST
