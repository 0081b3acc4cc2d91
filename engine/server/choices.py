"""One choice of an answer, whole or in pieces, in the shape of either endpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from .logprobs import ChatLogprobs, TextLogprobs, for_prompt
from .protocol import Wanted

Json = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How one of the endpoints writes its answers."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[str], Json]  # what a text is in
    delta: Callable[[str], Json]
    opening: Json | None = None  # a first chunk of every choice


TEXT = Style("cmpl-", "text_completion", "text_completion", lambda t: {"text": t}, lambda t: {"text": t})
CHAT = Style(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text} if text else {}},
    {"delta": {"role": "assistant", "content": ""}},
)


class Choice:
    """Writes one output of a request, and remembers what of it is sent."""

    def __init__(
        self,
        style: Style,
        index: int,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        wanted: Wanted,
    ) -> None:
        self._style = style
        self._index = index
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._wanted = wanted
        self._characters = 0  # sent, as are the tokens below with their log probabilities
        self._tokens = 0
        self._started = self._ended = False
        self._logprobs: ChatLogprobs | TextLogprobs | None = None

    def opening(self) -> Json | None:
        """The first chunk of a stream, if the endpoint has one."""
        return self._written(self._style.opening, None, None) if self._style.opening is not None else None

    def next(self, output: RequestOutput, one: CompletionOutput) -> Json | None:
        """What is new, as a chunk of a stream; None if there is nothing to show."""
        text = one.text[self._characters :]
        first = not self._started and self._wanted.echo
        if self._ended or not (text or one.finish_reason or first):
            return None
        return self._piece(self._style.delta, output, one)

    def whole(self, output: RequestOutput, one: CompletionOutput) -> Json:
        choice = self._piece(self._style.choice, output, one)
        if self._wanted.prompt_logprobs is not None and self._style is not CHAT:
            choice["prompt_logprobs"] = for_prompt(output.prompt_logprobs or [], self._wanted.prompt_logprobs)
        return choice

    def _piece(self, write: Callable[[str], Json], output: RequestOutput, one: CompletionOutput) -> Json:
        text, logprobs = "", None
        if self._wanted.logprobs is not None and self._logprobs is None:
            self._logprobs = self._writer(output, self._wanted.logprobs)
        if self._wanted.echo and not self._started:
            text = self._prompt(output)
            if isinstance(self._logprobs, TextLogprobs):
                positions = output.prompt_logprobs or ()
                logprobs = self._logprobs.of_prompt(text, output.prompt_token_ids, positions)
        text += one.text[self._characters :]
        if self._logprobs is not None:
            new = self._logprobs.of(one.token_ids[self._tokens :], (one.logprobs or ())[self._tokens :])
            logprobs = new if logprobs is None else {name: logprobs[name] + new[name] for name in logprobs}
        self._characters, self._tokens = len(one.text), len(one.token_ids)
        self._started, self._ended = True, one.finish_reason is not None
        return self._written(write(text), logprobs, one.finish_reason)

    def _prompt(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._tokenizer.decode(  # type: ignore[return-value]
            output.prompt_token_ids,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _writer(self, output: RequestOutput, count: int) -> ChatLogprobs | TextLogprobs:
        kind = ChatLogprobs if self._style is CHAT else TextLogprobs
        return kind(self._tokenizer, count, output.prompt_token_ids, self._skip_special_tokens)

    def _written(self, content: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
