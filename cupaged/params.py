"""The parameters of an attention call that are not tensors of the batch, and the settings of a sampler."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionParams(NamedTuple):
    """Hold the parameters of an attention layer and the hints for its kernels.

    The logit of query position i and key position j is ``s = scale * q.k``, then
    ``cap * tanh(s / cap)``, then ``+ alibi_slope[h] * (j - i)``.
    """

    scale: float
    causal: bool = True
    sliding_window: int | None = None  # visible when j > i - sliding_window
    logits_soft_cap: float | None = None
    # These three choose a kernel and its splits; they do not change the result but for rounding.
    max_query_len: int | None = None  # maximum number of query tokens in a sequence; None: unknown
    batch_invariant: bool = True
    shared_prefix: bool = False  # detect leading blocks that neighbouring sequences share
    # The tensors come last: `settings` is everything before them.
    alibi_slopes: torch.Tensor | None = None  # float32 [H]
    sinks: torch.Tensor | None = None  # float32 [H], an additional logit per head, without a value
    k_scale: torch.Tensor | None = None  # float32 [Hkv], set if and only if the cache is quantised
    v_scale: torch.Tensor | None = None  # likewise

    @property
    def settings(self) -> tuple[float | int | None, ...]:
        """Return the parameters that are not tensors; they determine the plan of a launch."""
        return self[:-4]


class SamplingSettings(NamedTuple):
    """Hold the settings of each row of `sample`: tensors [N]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor


def fraction_bits(vocabulary: int) -> int:
    """Return the bits after the point of a weight of at most 1, so that a row's sum has 63 bits at most."""
    return 62 - (vocabulary - 1).bit_length()
