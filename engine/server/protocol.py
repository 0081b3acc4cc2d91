"""What the HTTP API takes: OpenAI's requests, with vLLM's extensions, as pydantic models.

A field that would change the answer and is not supported is refused; other unknown fields are ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

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

from ..sampling_params import SamplingParams


def shown(value: Any) -> str:
    """A value of a request as JSON, cut short, for a message about it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _must_be(description: str) -> WrapValidator:
    """One message for a field of several types, instead of one for each of them."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {description}, got {shown(value)}") from None

    return WrapValidator(validate)


class _Strict(BaseModel):
    """JSON's own types: true is no number, and neither is "1"."""

    model_config = ConfigDict(strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Sampling(_Strict):
    """The fields that both endpoints share."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    n: int = Field(default=1, le=128)
    max_tokens: int | None = None
    seed: int | None = None
    stop: Annotated[str | list[str] | None, _must_be("a string or a list of strings")] = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, neutral in UNSUPPORTED.items():
                value = data.get(name)
                # 0 == False, but logprobs=0 asks for something
                same = (value == n for n in neutral if isinstance(n, bool) == isinstance(value, bool))
                if value is not None and not any(same):
                    raise ValueError(f"{name} is not supported; leave it out")
        return data

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
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
        )


# Fields that change the answer and are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
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
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _newer_name(self) -> ChatCompletionRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(_Sampling):
    prompt: Annotated[
        str | list[int] | list[str] | list[list[int]],
        _must_be("a string, a list of strings, a list of token ids, or a list of such lists"),
    ]

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
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
