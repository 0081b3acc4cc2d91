"""What a request asks of the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request.

    Args:
        n: number of outputs; they share the blocks of the prompt.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens; 0 or -1 among all.
        top_p: sample among the fewest most likely tokens whose probabilities reach this sum.
        seed: makes the outputs a function of the prompt alone, whatever else runs.
        max_tokens: most tokens of an output; None: up to the engine's ``max_model_len``.
        stop: an output ends before the first of these strings.
        stop_token_ids: an output ends with the first of these tokens.
        ignore_eos: go on after an end-of-sequence token.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ValueError: a setting is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        for name, value, wanted in (
            ("n", self.n, self.n >= 1),
            ("temperature", self.temperature, self.temperature >= 0 and math.isfinite(self.temperature)),
            ("top_k", self.top_k, self.top_k >= -1),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
            ("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1),
        ):
            if not wanted:
                raise ValueError(f"{name} must be {_RANGES[name]}, got {value}")
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be strings that are not empty, got {self.stop!r}")
        if not all(isinstance(t, int) for t in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be integers, got {self.stop_token_ids!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


_RANGES = {
    "n": "at least 1",
    "temperature": "0 (greedy) or a positive number",
    "top_k": "at least 1, or 0 or -1 for all tokens",
    "top_p": "in (0, 1]",
    "max_tokens": "at least 1 or None",
}
