"""What the engine gives back, under the names vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's ``n`` outputs so far.

    Args:
        index: which of the ``n``.
        text: the output without its stop string. Text that may yet become one is held back.
        token_ids: all sampled tokens, an end-of-sequence token included.
        finish_reason: None while it runs, then "stop", "length" or "abort".
        stop_reason: the stop string or stop token id that ended it, if one of the request's did.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request's outputs so far; ``finished`` when all of them are."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


@dataclass(frozen=True)
class EngineStats:
    """The engine's state and totals, for metrics."""

    num_running: int  # requests
    num_waiting: int
    num_swapped: int
    gpu_cache_usage: float  # share of the blocks in use, 0 to 1
    cpu_cache_usage: float
    num_preemptions: int  # since the start, as the two below
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int  # prompt tokens looked for in the prefix cache, those of resumed requests too
    prefix_cache_hits: int  # and found there
