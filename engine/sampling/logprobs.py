"""Compute log probabilities of tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..scheduling.step_plan import ScheduledSequence
from ..transfer import to_device

_PROMPT_SLICE = 64  # number of prompt positions whose log probabilities are computed at once


class TokenLogprobs(NamedTuple):
    """Hold log probabilities at one position: of a token, then of the most likely tokens, the best first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the first token: 1 + the number of tokens that are more likely


@dataclass(frozen=True)
class LogprobPlan:
    """Say which samples of a step get log probabilities.

    Args:
        sequences: int64 ``[L]``, positions in the batch.
        rows: int64 ``[D]``, of each of their samples its row in the logits of these sequences.
        samples: int64 ``[D]``, the samples.
        tops: numbers of most likely tokens, each with those of the D samples that get as many: int64.
    """

    sequences: np.ndarray
    rows: np.ndarray
    samples: np.ndarray
    tops: Sequence[tuple[int, np.ndarray]]

    @classmethod
    def of(
        cls, sequences: np.ndarray, num_samples: np.ndarray, num_top: np.ndarray, vocabulary: int
    ) -> LogprobPlan:
        """Return the plan of a batch.

        Args:
            sequences: as above.
            num_samples: int64 ``[N]``, number of samples of each sequence of the batch.
            num_top: int64 ``[N]``, number of most likely tokens to return with each; -1 is all.
        """
        counts = num_samples[sequences]
        rows = np.repeat(np.arange(len(sequences)), counts)
        order = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        first = num_samples.cumsum() - num_samples
        tops = num_top[sequences][rows]
        tops = np.where(tops < 0, vocabulary, np.minimum(tops, vocabulary))
        # Ties must not depend on other tokens: a top-k for each number.
        groups = [(int(number), np.flatnonzero(tops == number)) for number in np.unique(tops[tops > 0])]
        return cls(sequences, rows, first[sequences][rows] + order, groups)

    @property
    def arrays(self) -> list[np.ndarray]:
        """Return what is needed on the device."""
        return [self.sequences, self.rows, self.samples, *(which for _, which in self.tops)]


class LogprobTensors:
    """Compute log probabilities of tokens and of the most likely tokens at their positions, on their device.

    Args:
        logits: ``[N, vocabulary]``.
        rows: int64 ``[D]``, the row of the logits of each token.
        tokens: int64 ``[D]``.
        tops: as in `LogprobPlan`.
        on_device: the tokens of each of ``tops``, on the device.

    Attributes:
        tensors: what `read` needs on the host.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        tops: Sequence[tuple[int, np.ndarray]],
        on_device: Sequence[torch.Tensor],
    ) -> None:
        logits = logits.float()
        norms = logits.logsumexp(-1)
        chosen = logits[rows, tokens]
        ranks = (logits[rows] > chosen[:, None]).sum(-1).add_(1)
        self.tensors = [tokens, ranks, chosen - norms[rows]]
        self._tops = [which for _, which in tops]
        for (count, _), which in zip(tops, on_device):
            at = rows[which]
            top = logits[at].topk(count)
            self.tensors += [top.indices, top.values - norms[at][:, None]]

    def read(self, tensors: Sequence[torch.Tensor]) -> list[TokenLogprobs]:
        """Return a list of length D from the tensors as they are on the host."""
        tokens, ranks, logprobs, *tops = (tensor.tolist() for tensor in tensors)
        result = [
            TokenLogprobs([token], [logprob], rank) for token, logprob, rank in zip(tokens, logprobs, ranks)
        ]
        for which, token_ids, values in zip(self._tops, tops[::2], tops[1::2]):
            for i, ids, numbers in zip(which, token_ids, values):
                result[i].token_ids.extend(ids)
                result[i].logprobs.extend(numbers)
        return result


def take_prompt(
    logits: torch.Tensor, scheduled: Sequence[ScheduledSequence], output: dict[int, list[TokenLogprobs]]
) -> torch.Tensor:
    """Store the log probabilities of prompts in ``output``, by the position in the plan.

    Returns:
        The logits to sample from.
    """
    sampled_rows, row = [], 0
    for position, item in enumerate(scheduled):
        if count := item.num_prompt_logits:
            tokens = item.seq.token_ids[item.start + 1 : item.start + 1 + count]
            output[position] = []
            number = min(item.group.params.prompt_logprobs or 0, logits.shape[-1])  # any may be asked for
            for first in range(0, count, _PROMPT_SLICE):  # bounds the size of the float32 copy
                part = np.array(tokens[first : first + _PROMPT_SLICE])
                of_part = logits[row + first : row + first + len(part)]
                each = np.ones(len(part), dtype=np.int64)
                plan = LogprobPlan.of(np.arange(len(part)), each, each * number, logits.shape[-1])
                ids, _, rows, _, *tops = to_device([part, *plan.arrays], logits.device)
                logprobs = LogprobTensors(of_part, rows, ids, plan.tops, tops)
                output[position] += logprobs.read(logprobs.tensors)
            row += count
        if item.num_samples:
            sampled_rows.append(row)
            row += 1
    return logits[torch.from_numpy(np.array(sampled_rows, dtype=np.int64)).to(logits.device)]
