"""Define the settings and the results of `LLM.beam_search`, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from .outputs import CompletionOutput
from .sampling_params import SamplingParams
from .validation import is_integer


@dataclass(frozen=True)
class BeamSearchParams:
    """Hold the settings of a beam search.

    Args:
        beam_width: number of beams, and of the sequences that are returned.
        max_tokens: maximum number of tokens of an output.
        ignore_eos: continue after an end-of-sequence token.
        temperature: 0 or 1, without effect: beams are ranked by the model's own log probabilities.
        length_penalty: exponent of the number of output tokens, by which a beam's log probability is divided
            to rank it; as in transformers, the tokens of the prompt do not count.
        include_stop_str_in_output: keep the end-of-sequence token that ended an output.

    Raises:
        ValueError: a setting is out of range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if not is_integer(self.beam_width) or self.beam_width < 1:
            raise ValueError(f"beam_width must be an integer of at least 1, got {self.beam_width!r}")
        self.sampling_params()  # checks the others

    def sampling_params(self) -> SamplingParams:
        """Return the settings of the request."""
        return SamplingParams(
            n=self.beam_width,
            beam_width=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )


@dataclass(frozen=True)
class BeamSearchSequence:
    """Hold one sequence that a beam search has found.

    Args:
        tokens: tokens of the prompt and of the output.
        text: their text, with special tokens.
        cum_logprob: sum of the log probabilities of the output's tokens.
        finish_reason: "stop" or "length".
        stop_reason: stop token of the request that ended the output; else None.
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: str | None
    stop_reason: int | str | None = None

    @classmethod
    def of(cls, beam: CompletionOutput, tokens: list[int], text: str) -> BeamSearchSequence:
        """Return the sequence of an output."""
        assert beam.cumulative_logprob is not None  # beams have it
        return cls(tokens, text, beam.cumulative_logprob, beam.finish_reason, beam.stop_reason)


@dataclass(frozen=True)
class BeamSearchOutput:
    """Hold the best sequences of one prompt, the best first."""

    sequences: list[BeamSearchSequence]
