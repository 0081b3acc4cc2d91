"""Write one choice of a response, whole or as chunks of a stream, in the format of either endpoint."""

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
    """Describe the response format of an endpoint.

    Args:
        choice: wraps the text of a choice.
        delta: wraps the new text of a chunk.
        opening: first chunk of every choice of a stream, if there is one.
    """

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[str], Json]
    delta: Callable[[str], Json]
    opening: Json | None = None


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
    """Write one output of a request, keeping track of the part that was sent."""

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
        self._num_characters = 0  # sent so far
        self._num_tokens = 0  # whose log probabilities were sent so far
        self._started = self._ended = False
        self._logprobs: ChatLogprobs | TextLogprobs | None = None

    def opening(self) -> Json | None:
        """Return the first chunk of a stream, if the endpoint has one."""
        return self._json(self._style.opening, None, None) if self._style.opening is not None else None

    def next(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        """Return what is new as a chunk of a stream; None if there is nothing to send."""
        text = completion.text[self._num_characters :]
        first = not self._started and self._wanted.echo
        if self._ended or not (text or completion.finish_reason or first):
            return None
        return self._new_part(self._style.delta, output, completion)

    def whole(self, output: RequestOutput, completion: CompletionOutput) -> Json:
        """Return the choice of a response that is not streamed."""
        choice = self._new_part(self._style.choice, output, completion)
        if self._wanted.prompt_logprobs is not None and self._style is not CHAT:
            choice["prompt_logprobs"] = for_prompt(output.prompt_logprobs or [], self._wanted.prompt_logprobs)
        return choice

    def _new_part(
        self, wrap: Callable[[str], Json], output: RequestOutput, completion: CompletionOutput
    ) -> Json:
        """Return the part of the choice that was not sent yet, and mark it as sent."""
        text, logprobs = "", None
        if self._wanted.logprobs is not None and self._logprobs is None:
            self._logprobs = self._create_logprobs(output, self._wanted.logprobs)
        if self._wanted.echo and not self._started:
            text = self._prompt(output)
            if isinstance(self._logprobs, TextLogprobs):
                positions = output.prompt_logprobs or ()
                logprobs = self._logprobs.of_prompt(text, output.prompt_token_ids, positions)
        text += completion.text[self._num_characters :]
        if self._logprobs is not None:
            token_ids = completion.token_ids[self._num_tokens :]
            new = self._logprobs.of(token_ids, (completion.logprobs or ())[self._num_tokens :])
            logprobs = new if logprobs is None else {name: logprobs[name] + new[name] for name in logprobs}
        self._num_characters, self._num_tokens = len(completion.text), len(completion.token_ids)
        self._started, self._ended = True, completion.finish_reason is not None
        part = self._json(wrap(text), logprobs, completion.finish_reason)
        if self._ended:
            part["stop_reason"] = completion.stop_reason  # vLLM's extension
        return part

    def _prompt(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._tokenizer.decode(  # type: ignore[return-value]
            output.prompt_token_ids,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _create_logprobs(self, output: RequestOutput, count: int) -> ChatLogprobs | TextLogprobs:
        kind = ChatLogprobs if self._style is CHAT else TextLogprobs
        return kind(self._tokenizer, count, output.prompt_token_ids, self._skip_special_tokens)

    def _json(self, content: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
