"""Define the requests of the HTTP API, OpenAI's with vLLM's extensions, as pydantic models.

Unsupported fields that would change the answer are refused; other unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ..sampling_params import SamplingParams
from .fields import (
    Closed,
    Integer,
    IntegerLists,
    Integers,
    Strings,
    must_be,
    refuse_unsupported,
    sendable,
    shortened,
    shown,
)
from .messages import Message
from .structured_fields import StructuredRequest
from .tool_requests import NamedTool, Tool, ToolChoice


class StreamOptions(Closed):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


@dataclass(frozen=True)
class Wanted:
    """Describe the format of a response and its parts beside the texts of the choices.

    Args:
        stream: send the response in chunks.
        include_usage: send the number of tokens at the end of a stream.
        continuous_usage: send the number of tokens so far with every chunk.
        logprobs: number of most likely tokens whose log probabilities are sent with that of each token; None:
            no log probabilities are sent.
        prompt_logprobs: the same for the prompt's tokens, in vLLM's format.
        echo: begin each text with the prompt.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False

    @property
    def prompt_logprobs_needed(self) -> int | None:
        """Return the value of `SamplingParams.prompt_logprobs` that the response needs."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)


class _Sampling(StructuredRequest):
    """Hold the fields that both endpoints share."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    n: Integer = Field(default=1, le=128)
    max_tokens: Integer | None = None
    seed: Integer | None = None
    stop: Annotated[str | Strings | None, must_be("a string or a list of strings")] = None
    stop_token_ids: Integers = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    best_of: Integer | None = Field(default=None, ge=1, le=128)
    use_beam_search: bool = False  # the number of beams is the larger of n and best_of
    length_penalty: float = 1.0
    early_stopping: Annotated[bool | Literal["never"], must_be('true, false or "never"')] = False
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Integers | None = None
    bad_words: Strings = Field(default_factory=list)
    min_tokens: Integer = 0
    include_stop_str_in_output: bool = False
    prompt_logprobs: Integer | None = Field(default=None, ge=0, le=20)
    priority: Integer = 0
    cache_salt: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            fields = {name: neutral for name, neutral in UNSUPPORTED.items() if name not in cls.model_fields}
            refuse_unsupported(data, fields, _INSTEAD)
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

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the sampling settings of the request.

        Args:
            defaults: settings for fields that are left out. Beam search only uses ``max_tokens``.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        values = {name: getattr(self, name) for name in _WITH_DEFAULTS}
        usable = {n: v for n, v in defaults.items() if n == "max_tokens" or not self.use_beam_search}
        return SamplingParams(
            **{**usable, **{name: value for name, value in values.items() if value is not None}},
            n=self.n,
            seed=self.seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            best_of=None if self.use_beam_search else self.best_of,
            beam_width=max(self.n, self.best_of or 1) if self.use_beam_search else None,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_token_biases(self.logit_bias),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            min_tokens=self.min_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=self.wanted().logprobs,
            prompt_logprobs=self.wanted().prompt_logprobs_needed,
            structured_outputs=self.structure(),
        )

    def wanted(self) -> Wanted:
        """Return the format of the response."""
        options = self.stream_options or StreamOptions()
        return Wanted(
            stream=self.stream,
            include_usage=options.include_usage,
            continuous_usage=options.continuous_usage_stats,
            prompt_logprobs=self.prompt_logprobs,
        )


# Fields whose defaults may come from the model's generation config.
_WITH_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")


def _token_biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    by_token = {}
    for token, bias in biases.items():
        if not token.isdecimal() or len(token) > 18:  # int() of thousands of digits raises an unclear error
            raise ValueError(f"logit_bias must have token ids for names, got {shown(token)}")
        by_token[int(token)] = bias
    return by_token


# Unsupported fields of OpenAI, vLLM and the engine that change the answer, with values that have no effect.
# Fields of one endpoint are unsupported by the other. An error names the first field in this order, so
# functions and tools precede the fields that choose among them.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "tools": ([],),  # and those that follow: of chats alone
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
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
    "guided_decoding": ({},),
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
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "top_logprobs": (0,),
    "trace_decode_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}

_INSTEAD = {
    "functions": "set tools",
    "function_call": "set tools and tool_choice",
    "beam_width": "set use_beam_search to true, and n, or best_of, to the number of beams",
    "max_completion_tokens": "set max_tokens",
    "reasoning_effort": "leave it out; settings of the model's template go in chat_template_kwargs",
}


class ChatCompletionRequest(_Sampling):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: Integer | None = Field(default=None, ge=1)
    max_completion_tokens: Integer | None = Field(default=None, ge=1)
    tools: list[Tool] = Field(default_factory=list, fail_fast=True)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    chat_template: str | None = None
    add_generation_prompt: bool | None = None  # by default unless the final message is continued
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_of_what(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs to true or leave it out")
        return self

    @model_validator(mode="after")
    def _choice_of_what(self) -> ChatCompletionRequest:
        if self.tool_choice in (None, "none", "auto"):
            return self
        if not self.tools:
            raise ValueError("tool_choice needs tools; set tools or leave it out")
        if isinstance(self.tool_choice, NamedTool) and self.named_tool() is None:
            names = ", ".join(shown(tool.function.name) for tool in self.tools)
            raise ValueError(
                f"tool_choice must be one of the tools, which are {names}, got "
                f"{shown(self.tool_choice.function.name)}"
            )
        return self

    def offered_tools(self) -> list[Tool]:
        """Return the tools that the model may or must call."""
        return [] if self.tool_choice == "none" else self.tools

    def named_tool(self) -> Tool | None:
        """Return the tool that the model must call by its name, if there is one."""
        if not isinstance(self.tool_choice, NamedTool):
            return None
        name = self.tool_choice.function.name
        return next((tool for tool in self.tools if tool.function.name == name), None)

    @model_validator(mode="after")
    def _newer_name(self) -> ChatCompletionRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    def wanted(self) -> Wanted:
        return replace(super().wanted(), logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(_Sampling):
    prompt: Annotated[
        str | Integers | Strings | IntegerLists,
        must_be("a string, a list of strings, a list of token ids, or a list of such lists"),
    ]

    logprobs: Integer | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def _no_text_at_all(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, got 0: raise it, or set echo to true")
        return self

    def wanted(self) -> Wanted:
        return replace(super().wanted(), logprobs=self.logprobs, echo=bool(self.echo))

    def prompts(self) -> list[str | dict[str, list[int]]]:
        """Return the prompts in the engine's format.

        Raises:
            ValueError: there are none.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ValueError("prompt must not be empty")
        if isinstance(prompt[0], int):
            return [{"prompt_token_ids": prompt}]
        return [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompt]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None  # the field of the request that the error is about
    code: str | None


class ErrorResponse(BaseModel):
    """Hold an error in OpenAI's format."""

    error: ErrorDetail


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an `ErrorResponse` as a JSON object."""
    detail = ErrorDetail(message=sendable(shortened(message)), type=kind, param=param, code=code)
    return ErrorResponse(error=detail).model_dump()
