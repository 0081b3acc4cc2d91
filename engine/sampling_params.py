"""What a request asks of the sampler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .validation import is_integer, is_number


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
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        for name, wanted in (
            ("n", is_integer(self.n) and self.n >= 1),
            ("temperature", is_number(self.temperature) and self.temperature >= 0),
            ("top_k", is_integer(self.top_k) and self.top_k >= -1),
            ("top_p", is_number(self.top_p) and 0 < self.top_p <= 1),
            ("seed", self.seed is None or is_integer(self.seed)),
            (
                "max_tokens",
                self.max_tokens is None or (is_integer(self.max_tokens) and self.max_tokens >= 1),
            ),
            ("stop", all(isinstance(s, str) and s for s in self.stop)),
            ("stop_token_ids", all(map(is_integer, self.stop_token_ids))),
        ):
            if not wanted:
                raise ValueError(f"{name} must be {_RANGES[name]}, got {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _as_tuple(name: str, value: Any) -> tuple:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} must be {_RANGES[name]}, got {value!r}")
    return tuple(value)


_RANGES = {
    "n": "an integer of at least 1",
    "temperature": "0 (greedy) or a positive number",
    "top_k": "an integer of at least 1, or 0 or -1 for all tokens",
    "top_p": "a number in (0, 1]",
    "seed": "an integer or None",
    "max_tokens": "an integer of at least 1 or None",
    "stop": "a string or strings, none of them empty",
    "stop_token_ids": "integers",
}
