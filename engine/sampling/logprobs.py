"""Compute log probabilities of tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
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


class LogprobTensors:
    """Compute log probabilities of tokens and of the most likely tokens at their positions, on their device.

    Args:
        logits: ``[N, vocabulary]``.
        rows: int64 ``[D]``, the row of the logits of each token.
        tokens: int64 ``[D]``.
        num_top: int ``[D]``, number of most likely tokens to return with each token; -1 is all.

    Attributes:
        tensors: what `read` needs on the host.
    """

    def __init__(
        self, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, num_top: np.ndarray
    ) -> None:
        vocabulary = logits.shape[-1]
        logits = logits.float()
        norms = logits.logsumexp(-1)
        chosen = logits[rows, tokens]
        ranks = (logits[rows] > chosen[:, None]).sum(-1).add_(1)
        self.tensors = [tokens, ranks, chosen - norms[rows]]
        counts = np.where(num_top < 0, vocabulary, np.minimum(num_top, vocabulary))
        self._tops: list[np.ndarray] = []  # the tokens of each pair of tensors with the most likely ones
        for count in np.unique(counts[counts > 0]):  # ties must not depend on other tokens: a top-k per count
            which = np.flatnonzero(counts == count)
            at = rows[to_device([which], rows.device)[0]]
            top = logits[at].topk(int(count))
            self.tensors += [top.indices, top.values - norms[at][:, None]]
            self._tops.append(which)

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
            for first in range(0, count, _PROMPT_SLICE):  # bounds the size of the float32 copy
                part = np.array(tokens[first : first + _PROMPT_SLICE])
                logprobs = LogprobTensors(
                    logits[row + first : row + first + len(part)],
                    torch.from_numpy(np.arange(len(part))).to(logits.device),
                    torch.from_numpy(part).to(logits.device),
                    np.full(len(part), item.group.params.prompt_logprobs),
                )
                output[position] += logprobs.read(logprobs.tensors)
            row += count
        if item.num_samples:
            sampled_rows.append(row)
            row += 1
    return logits[torch.from_numpy(np.array(sampled_rows, dtype=np.int64)).to(logits.device)]
