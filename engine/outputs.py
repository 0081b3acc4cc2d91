"""What the engine gives back, under the names vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of a token at one position.

    Args:
        logprob: the natural logarithm of its probability, in the model's own distribution: at temperature 1,
            before penalties, biases and limits.
        rank: 1 is the most likely token.
        decoded_token: its text within a text, with the space that it begins with. A part of a character is
            U+FFFD.
    """

    logprob: float
    rank: int
    decoded_token: str


# By token id: the token that is at this position first, then the most likely ones, the best first.
PositionLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's ``n`` outputs so far.

    Args:
        index: which of the ``n``.
        text: the output without its stop string. Text that may yet become one is held back.
        token_ids: all sampled tokens, an end-of-sequence token included.
        finish_reason: None while it runs, then "stop" or "length".
        stop_reason: the stop string or stop token id that ended it, if one of the request's did.
        logprobs: for each token those that ``SamplingParams.logprobs`` asks for, else None.
        cumulative_logprob: the sum over its tokens; None unless ``logprobs``, ``best_of`` or beams need it.
        beam_score: of a beam, that over its number of tokens to the power of ``length_penalty``; else None.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    beam_score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request's outputs so far; ``finished`` when all of them are.

    Args:
        outputs: ``n`` of them. With a larger ``best_of``, the best so far, the best first, and the final
            choice is known when all are finished.
        prompt_logprobs: for each token of the prompt those that ``SamplingParams.prompt_logprobs`` asks for;
            None for the first one, which nothing comes before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None


@dataclass(frozen=True)
class EngineStats:
    """The engine's state and totals, for metrics."""

    num_running: int  # requests
    num_waiting: int
    num_swapped: int
    gpu_cache_usage: float  # share of the blocks in use, 0 to 1
    cpu_cache_usage: float
    num_preemptions: int  # since the start, as all below
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int  # tokens looked for in the prefix cache: of prompts, and of resumed requests
    prefix_cache_hits: int  # and found there
    num_failed_steps: int
