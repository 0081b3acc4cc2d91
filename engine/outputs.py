"""Define the outputs of the engine, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """Hold the log probability of a token at one position.

    Args:
        logprob: natural logarithm of the token's probability in the model's own distribution: at temperature
            1, before penalties, biases and truncation.
        rank: rank of the token by probability; 1 is the most likely one.
        decoded_token: text of the token within a text, including a leading space. A part of a character is
            U+FFFD.
    """

    logprob: float
    rank: int
    decoded_token: str


# By token ID: first the token at this position, then the most likely tokens, the best first.
PositionLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """Hold one of a request's ``n`` outputs so far.

    Args:
        index: index of the output, from 0 to ``n - 1``.
        text: text without the stop string. Text that may be the start of a stop string is held back.
        token_ids: all sampled tokens, including an end-of-sequence token.
        finish_reason: None while the output is unfinished, then "stop" or "length".
        stop_reason: stop string or stop token ID of the request that ended the output; else None.
        logprobs: log probabilities at each token, if ``SamplingParams.logprobs`` is set; else None.
        cumulative_logprob: sum of the tokens' log probabilities; None unless ``logprobs``, ``best_of`` or
            beam search need it.
        beam_score: ``cumulative_logprob`` of a beam divided by its number of tokens to the power of
            ``length_penalty``; None without beam search.
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
    """Hold a request's outputs so far.

    Args:
        outputs: the ``n`` outputs. With a larger ``best_of``, the best ones so far, the best first; they may
            change until all are finished.
        finished: whether all outputs are finished.
        prompt_logprobs: log probabilities at each token of the prompt, if ``SamplingParams.prompt_logprobs``
            is set; None for the first token, which has no context.
        num_cached_tokens: number of the prompt's tokens that were in the prefix cache when the request was
            first scheduled.
        first_scheduled: when that was, on the clock of `time.monotonic`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    # What depends on other requests and on the clock says nothing about whether two answers are equal.
    num_cached_tokens: int = field(default=0, compare=False)
    first_scheduled: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class EngineStats:
    """Hold the engine's current state, and totals since its start, for metrics.

    Args:
        num_running: number of running requests.
        num_waiting: number of waiting requests.
        num_swapped: number of requests in the swap space.
        gpu_cache_usage: fraction of the GPU blocks in use.
        cpu_cache_usage: fraction of the swap space's blocks in use.
        num_preemptions: total number of preemptions.
        prompt_tokens: total number of prompt tokens.
        generation_tokens: total number of sampled tokens.
        prefix_cache_queries: total number of tokens, of new and resumed requests, looked up in the prefix
            cache.
        prefix_cache_hits: total number of these tokens found in the prefix cache.
        num_failed_steps: total number of steps that failed.
        num_gpu_blocks: number of blocks of the KV cache.
        num_cpu_blocks: number of blocks of the swap space.
    """

    num_running: int
    num_waiting: int
    num_swapped: int
    gpu_cache_usage: float
    cpu_cache_usage: float
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_failed_steps: int
    num_gpu_blocks: int
    num_cpu_blocks: int


@dataclass
class Totals:
    """Count what an engine has done since it was made."""

    arrivals: int = 0  # of requests and prefixes
    prompt_tokens: int = 0
    generation_tokens: int = 0
    failed_steps: int = 0
