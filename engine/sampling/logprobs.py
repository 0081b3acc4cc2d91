"""Compute log probabilities of tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..scheduling.step_plan import ScheduledSequence

_PROMPT_SLICE = 64  # number of prompt positions whose log probabilities are computed at once


class TokenLogprobs(NamedTuple):
    """Hold log probabilities at one position: of a token, then of the most likely tokens, the best first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the first token: 1 + the number of tokens that are more likely


def token_logprobs(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, num_top: np.ndarray
) -> list[TokenLogprobs]:
    """Return the log probabilities of tokens and of the most likely tokens at their positions.

    Args:
        logits: ``[N, vocabulary]``.
        rows: int64 ``[D]``, the row of the logits of each token.
        tokens: int64 ``[D]``.
        num_top: int ``[D]``, number of most likely tokens to return with each token; -1 is all.

    Returns:
        A list of length D.
    """
    vocabulary = logits.shape[-1]
    logits = logits.float()
    norms = logits.logsumexp(-1)
    chosen = logits[rows, tokens]
    ranks = (logits[rows] > chosen[:, None]).sum(-1).add_(1).tolist()
    logprobs = (chosen - norms[rows]).tolist()
    result = [
        TokenLogprobs([token], [logprob], rank)
        for token, logprob, rank in zip(tokens.tolist(), logprobs, ranks)
    ]
    counts = np.where(num_top < 0, vocabulary, np.minimum(num_top, vocabulary))
    for count in np.unique(counts[counts > 0]):  # one top-k per count: ties must not depend on other tokens
        which = np.flatnonzero(counts == count)
        at = rows[torch.from_numpy(which).to(rows.device)]
        top = logits[at].topk(int(count))
        values = top.values - norms[at][:, None]
        for i, ids, numbers in zip(which, top.indices.tolist(), values.tolist()):
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
                output[position] += token_logprobs(
                    logits[row + first : row + first + len(part)],
                    torch.from_numpy(np.arange(len(part))).to(logits.device),
                    torch.from_numpy(part).to(logits.device),
                    np.full(len(part), item.group.params.prompt_logprobs),
                )
            row += count
        if item.num_samples:
            sampled_rows.append(row)
            row += 1
    return logits[torch.from_numpy(np.array(sampled_rows, dtype=np.int64)).to(logits.device)]
