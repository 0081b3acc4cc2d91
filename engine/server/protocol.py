"""What the HTTP API takes: OpenAI's requests, with vLLM's extensions, as pydantic models.

A field that would change the answer and is not supported is refused; other unknown fields are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..sampling_params import SamplingParams


def sendable(text: str) -> str:
    """With an escape for half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """A value of a request as JSON, cut short, for a message about it."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += sendable(part[:81])
        if len(text) > 80:  # of a long value no more is written
            break
    return shortened(text, 80)


def shortened(text: str, length: int = 1000) -> str:
    """A text without its end if it is longer than ``length``: an error is no place for megabytes."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _must_be(description: str) -> WrapValidator:
    """One message for a field of several types, instead of one for each of them."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {description}, got {shown(value)}") from None

    return WrapValidator(validate)


# Lists that are validated up to their first wrong entry: an error of each of them takes a kilobyte.
_Strings = Annotated[list[str], Field(fail_fast=True)]
_Integers = Annotated[list[int], Field(fail_fast=True)]
_IntegerLists = Annotated[list[_Integers], Field(fail_fast=True)]


class _Strict(BaseModel):
    """JSON's own types: true is no number, and neither is "1"."""

    model_config = ConfigDict(strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


@dataclass(frozen=True)
class Wanted:
    """What an answer has beside the texts of its choices.

    Args:
        stream: send the answer in pieces; ``include_usage``, and the number of tokens at the end.
        logprobs: log probabilities of each token and this many most likely ones.
        prompt_logprobs: the same of the prompt's tokens, in vLLM's shape.
        echo: the prompt comes first in each text; ``only_prompt``, and nothing after it.
    """

    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    only_prompt: bool = False

    @property
    def prompt_logprobs_needed(self) -> int | None:
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)


class _Sampling(_Strict):
    """The fields that both endpoints share."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    n: int = Field(default=1, le=128)
    max_tokens: int | None = None
    seed: int | None = None
    stop: Annotated[str | _Strings | None, _must_be("a string or a list of strings")] = None
    stop_token_ids: _Integers = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    best_of: int | None = Field(default=None, ge=1, le=128)
    use_beam_search: bool = False  # with so many beams as the larger of n and best_of
    length_penalty: float = 1.0
    early_stopping: Annotated[bool | Literal["never"], _must_be('true, false or "never"')] = False
    min_p: float = 0.0
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: _Integers | None = None
    bad_words: _Strings = Field(default_factory=list)
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    priority: int = 0
    cache_salt: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            # Clients that write all their fields send null for those that are not set.
            data = {name: value for name, value in data.items() if value is not None}
            for name, neutral in UNSUPPORTED.items():
                value = None if name in cls.model_fields else data.get(name)
                # 0 == False, but logprobs=0 asks for something
                same = (value == n for n in neutral if isinstance(n, bool) == isinstance(value, bool))
                if value is not None and not any(same):
                    instead = _INSTEAD.get(name, "leave it out")
                    raise PydanticCustomError(
                        "unsupported",
                        "{name} is not supported; {instead}",
                        {"name": name, "instead": instead},
                    )
        return data

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not for streams; set stream to false or leave it out")
        if self.stream and self.use_beam_search:
            raise ValueError(
                "use_beam_search is not for streams: which beams are best is known at the end; "
                "set stream to false or leave it out"
            )
        if self.stream and (self.best_of or 0) > self.n:
            raise ValueError(
                "best_of above n is not for streams: which outputs are best is known at the end; "
                "set stream to false or leave it out"
            )
        return self

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        """Raises ValueError naming the parameter that is out of range."""
        return SamplingParams(
            n=self.n,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            max_tokens=default_max_tokens if self.max_tokens is None else self.max_tokens,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            best_of=None if self.use_beam_search else self.best_of,
            beam_width=max(self.n, self.best_of or 1) if self.use_beam_search else None,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_token_biases(self.logit_bias),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            min_tokens=self.min_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=self.wanted().logprobs,
            prompt_logprobs=self.wanted().prompt_logprobs_needed,
        )

    def wanted(self) -> Wanted:
        """What the answer is to have beside the texts."""
        return Wanted(
            stream=self.stream,
            include_usage=self.stream_options is not None and self.stream_options.include_usage,
            prompt_logprobs=self.prompt_logprobs,
        )


def _token_biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    found = {}
    for token, bias in biases.items():
        if not token.isdecimal() or len(token) > 18:  # int() refuses thousands of digits, and not by name
            raise ValueError(f"logit_bias must have token ids for names, got {shown(token)}")
        found[int(token)] = bias
    return found


# Fields that change the answer and are not supported, with the values that ask for nothing: OpenAI's, vLLM's
# and the engine's own. Those that only one of the endpoints has are unsupported by the other.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "audio": (),
    "beam_width": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),
    "extra_args": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding": ({},),
    "guided_grammar": (),
    "guided_json": (),
    "guided_json_object": (False,),
    "guided_regex": (),
    "include_reasoning": (True,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "max_completion_tokens": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprob_token_ids": ([],),
    "reasoning_effort": (),
    "repetition_detection": ({},),
    "response_format": ({"type": "text"},),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs": ({},),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "trace_decode_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}

_INSTEAD = {
    "beam_width": "set use_beam_search to true, and n, or best_of, to the number of beams",
    "max_completion_tokens": "set max_tokens",
    "reasoning_effort": "leave it out; settings of the model's template go in chat_template_kwargs",
}


class Message(_Strict):
    role: str
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        texts = []
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError("content parts must be of type 'text'; the model reads nothing else")
            texts.append(part["text"])
        return "\n".join(texts)


class ChatCompletionRequest(_Sampling):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_of_what(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs to true or leave it out")
        return self

    @model_validator(mode="after")
    def _newer_name(self) -> ChatCompletionRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    def wanted(self) -> Wanted:
        return replace(super().wanted(), logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(_Sampling):
    prompt: Annotated[
        str | _Integers | _Strings | _IntegerLists,
        _must_be("a string, a list of strings, a list of token ids, or a list of such lists"),
    ]

    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    def wanted(self) -> Wanted:
        return replace(
            super().wanted(),
            logprobs=self.logprobs,
            echo=bool(self.echo),
            only_prompt=bool(self.echo) and self.max_tokens == 0,
        )

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        if self.wanted().only_prompt:  # the engine samples at least one token; the answer leaves it out
            return self.model_copy(update={"max_tokens": 1}).sampling_params(default_max_tokens)
        return super().sampling_params(default_max_tokens)

    def prompts(self) -> list[str | dict[str, list[int]]]:
        """One engine prompt for each that was given.

        Raises:
            ValueError: there is none.
        """
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given:
            raise ValueError("prompt must not be empty")
        if isinstance(given[0], int):
            return [{"prompt_token_ids": given}]
        return [p if isinstance(p, str) else {"prompt_token_ids": p} for p in given]


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    message = sendable(shortened(message))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
