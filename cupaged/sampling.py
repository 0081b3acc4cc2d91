"""The sampler: a token for each row of logits, in one launch that no host has to wait for."""

from __future__ import annotations

from typing import Any

import torch

from .dlpack import Array, as_tensor
from .registration import call


def sample(
    logits: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    indices: Array,
    positions: Array,
    out: Array | None = None,
) -> torch.Tensor | Any:
    """Sample a token from each row of logits, with settings of its own.

    The softmax at the row's temperature is truncated by min-p, then by top-k, then by top-p, all relative to
    what the one before has left; of tokens that are equally likely those with the lowest ids are kept. The
    token is the first at which the cumulative probability, in the order of the ids, exceeds a number from 0
    to 1: the first 53 bits of ``mix(mix(mix(seed) + index) + position)``, with the mixing function of
    SplitMix64 on 64 bits.

    Probabilities are integers in units of 2^-45 of the largest for a vocabulary of 128K tokens (of 2^-62
    over the vocabulary's next power of two for any), so their sums are exact. A token depends on its row
    alone, and equal rows give equal tokens on a CPU and on a GPU (which counts logits below 1.2e-38 in
    magnitude as 0).

    Args:
        logits: [N, V], float32, float16 or bfloat16, contiguous in V; the stride between rows is free. NaN
            counts as -inf.
        temperature: [N], float64, as all settings contiguous. The first of the largest logits is taken where
            it is 0, and in rows whose largest logit is infinite; 0 where no logit is above -inf. A positive
            temperature counts as one from 1e-30 to 1e30.
        top_k: [N], int64, number of tokens to keep; 0 or less for all.
        top_p: [N], float64, probability to keep: the most likely tokens, until it is reached; 1 for all. At
            least one token is kept.
        min_p: [N], float64, least probability of a token to keep, relative to the most likely; 0 for all.
        seeds, indices, positions: [N], int64, of whose 64 bits the number is a hash: of a request, of the
            output, and of the token.
        out: [N], int64, to write into; returned as given. It shares no memory with the other arguments.

    Returns:
        The tokens [N], int64.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device.
    """
    logits = as_tensor("logits", logits)
    settings = (
        as_tensor("temperature", temperature),
        as_tensor("top_k", top_k),
        as_tensor("top_p", top_p),
        as_tensor("min_p", min_p),
        as_tensor("seeds", seeds),
        as_tensor("indices", indices),
        as_tensor("positions", positions),
    )
    if out is None:
        out = out_tensor = torch.empty(logits.shape[:1], dtype=torch.int64, device=logits.device)
    else:
        out_tensor = as_tensor("out", out, written=True)
    call("sample", logits, *settings, out_tensor)
    return out
