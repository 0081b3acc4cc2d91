"""Hold what a step samples: while it is computed, and when the host knows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..scheduling.request import Candidates
from .logprobs import LogprobTensors, TokenLogprobs
from .readback import Readback


@dataclass
class SamplerOutput:
    """Hold the tokens sampled in a step. Dictionaries are keyed by the sequence's position in the plan.

    Args:
        token_ids: the ``num_samples`` tokens of each scheduled sequence; none for beams.
        logprobs: log probabilities of these tokens, for sequences that ask for them.
        prompt_logprobs: log probabilities of the prompt tokens from ``start + 1`` on.
        candidates: candidates of the beams.
    """

    token_ids: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    candidates: dict[int, Candidates] = field(default_factory=dict)

    def drop(self, positions: Iterable[int]) -> None:
        """Drop what sequences got that had ended before, at these positions in the plan."""
        for position in positions:
            self.token_ids[position] = []
            self.logprobs.pop(position, None)
            self.candidates.pop(position, None)


class LaunchedSamples:
    """Hold the samples of a launched step, of which the host knows nothing until `result`.

    Args:
        output: what is known: prompts and beams.
        planned: positions in the plan of the other sequences that sample.
        counts: number of samples of each of them.
        tokens: int64 ``[sum of counts]``, on the device.
        with_logprobs: those of ``planned`` whose samples have log probabilities.
        logprobs: these.
    """

    def __init__(
        self,
        output: SamplerOutput,
        planned: list[int] | None = None,
        counts: np.ndarray | None = None,
        tokens: torch.Tensor | None = None,
        with_logprobs: np.ndarray | None = None,
        logprobs: LogprobTensors | None = None,
    ) -> None:
        self.tokens = tokens
        self._output, self._planned, self._counts = output, planned, counts
        self._with_logprobs, self._logprobs = with_logprobs, logprobs
        more = logprobs.tensors if logprobs is not None else []
        self._readback = Readback([] if tokens is None else [tokens, *more])

    def result(self) -> SamplerOutput:
        """Wait for the tokens and log probabilities and return them."""
        output = self._output
        if self._planned is None or self._counts is None:
            return output
        tokens, *tensors = self._readback.wait()
        token_ids = tokens.tolist()
        if len(token_ids) == len(self._planned) == len(output.token_ids):  # each has one
            output.token_ids = [[token] for token in token_ids]
        else:
            ends = self._counts.cumsum().tolist()
            for position, count, end in zip(self._planned, self._counts.tolist(), ends):
                output.token_ids[position] = token_ids[end - count : end]
        if self._logprobs is not None and self._with_logprobs is not None:
            ends = self._counts[self._with_logprobs].cumsum().tolist()
            of_samples = self._logprobs.read(tensors)
            for i, start, end in zip(self._with_logprobs, [0, *ends], ends):
                output.logprobs[self._planned[i]] = of_samples[start:end]
        return output
