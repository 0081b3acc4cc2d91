"""Define and check the sampling settings of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .structured_outputs import StructuredOutputsParams
from .validation import is_integer, is_number


@dataclass(frozen=True)
class SamplingParams:
    """Hold the sampling settings of one request, under vLLM's names.

    They apply in this order: ``structured_outputs``, ``allowed_token_ids``, ``min_tokens``, ``bad_words``,
    ``logit_bias``, the repetition, frequency and presence penalties, ``temperature``, ``min_p``, ``top_k``,
    ``top_p``. Greedy decoding takes the most likely token after the penalties. Log probabilities are those of
    the model, before any setting applies. ``logit_bias``, ``allowed_token_ids`` and ``stop_token_ids`` must
    not have tokens that the model cannot sample; such tokens have no effect in bad words and as
    end-of-sequence tokens.

    Args:
        n: number of outputs; they share the blocks of the prompt.
        temperature: divisor of the logits; 0 is greedy.
        top_k: sample from the k most likely tokens; 0 or -1: from all.
        top_p: sample from the smallest set of most likely tokens whose probabilities reach this sum.
        seed: seed that makes the outputs depend on the prompt alone, not on other requests.
        max_tokens: maximum number of tokens of an output; None: up to the engine's ``max_model_len``; 0: the
            prompt is computed, for ``prompt_logprobs``, and the outputs are empty.
        stop: strings that end an output, which is cut before the first of them.
        stop_token_ids: tokens that end an output.
        ignore_eos: continue after an end-of-sequence token.
        skip_special_tokens: leave special tokens out of the text.
        best_of: number of outputs to sample, of which the ``n`` with the highest `cumulative_logprob` are
            returned, the best first; None is ``n``.
        min_p: minimum probability of a token, relative to that of the most likely one.
        presence_penalty: subtracted from the logit of every token that the output contains.
        frequency_penalty: subtracted from the logit of a token once for each occurrence in the output.
        repetition_penalty: divisor of positive logits and factor of negative logits of tokens that the prompt
            or the output contain; 1 has no effect.
        logit_bias: token ID -> number from -100 to 100 that is added to its logit.
        allowed_token_ids: the only tokens to sample.
        bad_words: texts that the output must not contain, with and without a space before them. The last
            token of a word is not sampled after the tokens before it, unless no other token is left.
        min_tokens: minimum number of tokens of an output, if ``max_tokens`` permits.
        include_stop_str_in_output: keep the stop string or stop token that ended the output in its text.
        logprobs: number of most likely tokens whose log probabilities are returned with that of the sampled
            token at each position of the outputs; -1: the whole vocabulary.
        prompt_logprobs: the same for the prompt. The whole prompt is computed then, even a cached prefix.
        beam_width: number of beams of a beam search, which replaces sampling; the outputs are the ``n`` best
            beams, the best first, returned when the search has ended. The two settings below need it.
        length_penalty: exponent of the number of output tokens, by which a beam's log probability is divided;
            values above 0 favour long beams.
        early_stopping: True: stop with ``beam_width`` finished beams; False: stop when the best running beam,
            at its current length, is no better than the worst finished one; "never": the same at its best
            possible length.
        structured_outputs: a JSON schema, regular expression, choice of texts or grammar that the text of the
            outputs follows. They end by a stop token, which is sampled only where the text is complete.
            ``max_tokens`` and ``stop`` cut them as any output; then the text is a beginning. The grammar
            prevails over ``allowed_token_ids``, ``min_tokens``, ``bad_words`` and ``ignore_eos`` where they
            leave no token that it permits.

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
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            allowed = _as_tuple("allowed_token_ids", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
        for name, (wanted, valid) in _RANGES.items():
            if not valid(getattr(self, name)):
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.logit_bias is not None:  # a copy: the caller may change its dictionary
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
        """Check that a model with a vocabulary of ``size`` tokens has all tokens of the settings.

        Raises:
            ValueError: it does not.
        """
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token in getattr(self, name) or ():
                if not 0 <= token < size:
                    raise ValueError(f"{name} must have token ids from 0 to {size - 1}, got {token}")

    def ending_tokens(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end an output, of a model with these end-of-sequence tokens."""
        own = frozenset(self.stop_token_ids)
        # Structured outputs end by a token in any case.
        return own if self.ignore_eos and (own or self.structured_outputs is None) else own | eos_token_ids

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def num_sequences(self) -> int:
        """Return the number of outputs to sample, of which ``n`` are returned."""
        return self.beam_width or self.best_of or self.n

    @property
    def only_prompt(self) -> bool:
        """Return whether the prompt is computed and nothing is sampled."""
        return self.max_tokens == 0

    @property
    def needs_logprobs(self) -> bool:
        """Return whether log probabilities of sampled tokens are returned or rank the outputs."""
        return self.logprobs is not None or (self.beam_width is None and self.num_sequences > self.n)

    @property
    def needs_whole_prompt(self) -> bool:
        """Return whether all tokens of the prompt must be computed, without cached blocks."""
        return self.prompt_logprobs is not None


def _as_tuple(name: str, value: Any) -> tuple:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} must be {_RANGES[name][0]}, got {value!r}")
    return tuple(value)


def _integer_from(minimum: int) -> Callable[[Any], bool]:
    return lambda value: is_integer(value) and value >= minimum


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
    "structured_outputs",
)

# By setting: a description of valid values, and a check of its value.
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
    # With this exponent, powers of lengths and quotients by them neither overflow nor underflow.
    "length_penalty": ("a number in [-16, 16]", _number_in(-16, 16)),
    "structured_outputs": (
        "StructuredOutputsParams or None",
        _or_none(lambda v: isinstance(v, StructuredOutputsParams)),
    ),
    "early_stopping": ('True, False or "never"', lambda v: isinstance(v, bool) or v == "never"),
}
