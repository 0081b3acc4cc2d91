"""What a request asks of the sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .validation import is_integer, is_number


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request, under vLLM's names.

    They apply in this order: ``allowed_token_ids``, ``min_tokens``, ``bad_words``, ``logit_bias``, the
    repetition, frequency and presence penalties, ``temperature``, ``min_p``, ``top_k``, ``top_p``. Greedy
    decoding takes the best token after the penalties. Log probabilities are those of the model, before all
    of this. Tokens that the model cannot sample are refused by ``logit_bias``, ``allowed_token_ids`` and
    ``stop_token_ids``, and rule out nothing where a bad word or the end of a sequence has them.

    Args:
        n: number of outputs; they share the blocks of the prompt.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens; 0 or -1 among all.
        top_p: sample among the fewest most likely tokens whose probabilities reach this sum.
        seed: makes the outputs a function of the prompt alone, whatever else runs.
        max_tokens: most tokens of an output; None: up to the engine's ``max_model_len``; 0: the prompt is
            computed, for ``prompt_logprobs``, and the outputs are empty.
        stop: an output ends before the first of these strings.
        stop_token_ids: an output ends with the first of these tokens.
        ignore_eos: go on after an end-of-sequence token.
        skip_special_tokens: leave special tokens out of the text.
        best_of: sample this many outputs and give back the ``n`` with the highest `cumulative_logprob`, the
            best first; None is ``n``.
        min_p: sample among tokens at least this share as likely as the most likely one.
        presence_penalty: taken off the logit of every token that the output has already.
        frequency_penalty: the same once for every time that the output has it.
        repetition_penalty: logits of tokens that the prompt or the output has are divided by this where
            positive, multiplied where negative; 1 changes nothing.
        logit_bias: numbers from -100 to 100 added to the logits of these tokens.
        allowed_token_ids: no other tokens are sampled.
        bad_words: texts that the output must not have, with and without a space before them. One of several
            tokens loses its last token where the output ends in the ones before it. Where nothing else is
            left to sample, a bad word is.
        min_tokens: the output does not end before it has this many tokens, but by ``max_tokens``.
        include_stop_str_in_output: the text keeps the stop string or stop token that ended it.
        logprobs: give log probabilities of the sampled token and this many most likely ones at each position
            of the outputs; -1 is the whole vocabulary.
        prompt_logprobs: the same for the prompt. All of the prompt is computed then, even what a prefix cache
            holds.
        beam_width: beam search with so many beams instead of sampling; the outputs are the ``n`` best, the
            best first, given when the search has ended. The two below need it.
        length_penalty: beams are compared by their log probability over their number of output tokens to this
            power: above 0 favours long ones.
        early_stopping: True: stop with ``beam_width`` finished beams; False: when the best running beam, at
            its length now, is no better than the worst of them; "never": at its best possible length.

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
    best_of: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            allowed = _as_tuple("allowed_token_ids", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
        for name, (wanted, valid) in _RANGES.items():
            if not valid(getattr(self, name)):
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.logit_bias is not None:  # the caller's own may change
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(
                f"best_of must be at least n, which is {self.n}, got {self.best_of}: raise it, or lower n"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens, which is {self.max_tokens}, got {self.min_tokens}: "
                "lower it, or raise max_tokens"
            )

        if self.beam_width is not None:
            self._check_beams(self.beam_width)
        else:
            self._refuse(_ONLY_WITH_BEAMS, "is for beam search: ask for that, or leave it out")

    def _check_beams(self, beam_width: int) -> None:
        if self.n > beam_width:
            raise ValueError(f"n must be at most beam_width, which is {beam_width}, got {self.n}: lower it")
        if self.temperature not in (0, 1):
            raise ValueError("temperature does not go with beam search, which draws nothing: leave it out")
        self._refuse(_NOT_WITH_BEAMS, "does not go with beam search: leave it out")

    def _refuse(self, names: Iterable[str], why: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} {why}")

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError for a token that a model with ``size`` tokens does not have."""
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token in getattr(self, name) or ():
                if not 0 <= token < size:
                    raise ValueError(f"{name} must have token ids from 0 to {size - 1}, got {token}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def num_sequences(self) -> int:
        """Outputs that are sampled, of which ``n`` are given back."""
        return self.beam_width or self.best_of or self.n

    @property
    def only_prompt(self) -> bool:
        """Return whether the prompt is all that is wanted."""
        return self.max_tokens == 0

    @property
    def needs_logprobs(self) -> bool:
        """Whether the sampled tokens' log probabilities are wanted or decide which outputs are best."""
        return self.logprobs is not None or (self.beam_width is None and self.num_sequences > self.n)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every token of the prompt must go through the model, so that no cached block of another
        request may stand in for it."""
        return self.prompt_logprobs is not None


def _as_tuple(name: str, value: Any) -> tuple:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} must be {_RANGES[name][0]}, got {value!r}")
    return tuple(value)


def _integer_from(least: int) -> Callable[[Any], bool]:
    return lambda value: is_integer(value) and value >= least


def _number_in(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and low <= value <= high


def _or_none(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        is_integer(token) and is_number(bias) and -100 <= bias <= 100 for token, bias in value.items()
    )


_LOGPROBS = "how many tokens a position (0: the token itself; -1: all), or None"
_FLAG = ("True or False", lambda value: isinstance(value, bool))

_ONLY_WITH_BEAMS = ("length_penalty", "early_stopping")
_NOT_WITH_BEAMS = (
    "top_k",
    "top_p",
    "min_p",
    "best_of",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
)

# Of each setting: what it must be, and whether a value is that.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "n": ("an integer of at least 1", _integer_from(1)),
    "temperature": ("0 (greedy) or a positive number", lambda v: is_number(v) and v >= 0),
    "top_k": ("an integer of at least 1, or 0 or -1 for all tokens", _integer_from(-1)),
    "top_p": ("a number in (0, 1]", lambda v: is_number(v) and 0 < v <= 1),
    "seed": ("an integer or None", _or_none(is_integer)),
    "max_tokens": ("an integer of at least 0 or None", _or_none(_integer_from(0))),
    "stop": (
        "a string or strings, none of them empty",
        lambda v: all(isinstance(s, str) and s for s in v),
    ),
    "stop_token_ids": ("integers", lambda v: all(map(is_integer, v))),
    "ignore_eos": _FLAG,
    "skip_special_tokens": _FLAG,
    "best_of": ("an integer of at least n or None", _or_none(_integer_from(1))),
    "min_p": ("a number in [0, 1]", _number_in(0, 1)),
    "presence_penalty": ("a number in [-2, 2]", _number_in(-2, 2)),
    "frequency_penalty": ("a number in [-2, 2]", _number_in(-2, 2)),
    "repetition_penalty": ("a number in [0.01, 100] (1: no penalty)", _number_in(0.01, 100)),
    "logit_bias": ("a dictionary of token ids to numbers in [-100, 100], or None", _or_none(_is_bias)),
    "allowed_token_ids": (
        "one or more token ids, or None",
        _or_none(lambda v: len(v) > 0 and all(map(is_integer, v))),
    ),
    "bad_words": (
        "strings, none of them empty or blank",
        lambda v: all(isinstance(word, str) and word.strip() for word in v),
    ),
    "min_tokens": ("an integer of at least 0", _integer_from(0)),
    "include_stop_str_in_output": _FLAG,
    "logprobs": (_LOGPROBS, _or_none(_integer_from(-1))),
    "prompt_logprobs": (_LOGPROBS, _or_none(_integer_from(-1))),
    "beam_width": ("an integer of at least 1 or None", _or_none(_integer_from(1))),
    # Lengths to this power, and log probabilities over them, are far from the ends of a float.
    "length_penalty": ("a number in [-16, 16]", _number_in(-16, 16)),
    "early_stopping": ('True, False or "never"', lambda v: isinstance(v, bool) or v == "never"),
}
