"""Log probabilities of tokens, from logits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class TokenLogprobs(NamedTuple):
    """At one position: a token and, after it, the most likely ones, the best first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the first token: how many are at least as likely, itself among them, ties not counted


def token_logprobs(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, num_top: np.ndarray
) -> list[TokenLogprobs]:
    """Look up tokens in the softmax of logits.

    Args:
        logits: ``[N, vocabulary]``.
        rows: int64 ``[D]``, the row of each token.
        tokens: int64 ``[D]``.
        num_top: int ``[D]``, how many of the most likely ones each is to have beside it; -1 is all.

    Returns:
        One for each of the ``D``.
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
    for count in np.unique(counts[counts > 0]):  # what one asks for is the same whatever the others do
        which = np.flatnonzero(counts == count)
        at = rows[torch.from_numpy(which).to(rows.device)]
        top = logits[at].topk(int(count))
        values = top.values - norms[at][:, None]
        for i, ids, numbers in zip(which, top.indices.tolist(), values.tolist()):
            result[i].token_ids.extend(ids)
            result[i].logprobs.extend(numbers)
    return result
