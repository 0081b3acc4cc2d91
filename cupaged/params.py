"""The arguments of an attention call that are not tensors of the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionParams(NamedTuple):
    """How the logits of one attention layer are formed; made by `ops`, read by every backend.

    The logit of query position i and key position j is ``s = scale * q.k``, then
    ``cap * tanh(s / cap)``, then ``+ alibi_slope[h] * (j - i)``.
    """

    scale: float
    causal: bool = True
    sliding_window: int | None = None  # visible when j > i - sliding_window
    logits_soft_cap: float | None = None
    # Which kernel and how it divides the work; the result is right whatever they say.
    max_query_len: int | None = None  # query tokens of the longest query, None if not known
    batch_invariant: bool = True
    shared_prefix: bool = False  # look for blocks that neighbouring sequences share
    # The tensors come last: `settings` is what is before them.
    alibi_slopes: torch.Tensor | None = None  # float32 [H]
    sinks: torch.Tensor | None = None  # float32 [H]: one more logit a head, with no value
    k_scale: torch.Tensor | None = None  # float32 [Hkv]; with a quantised cache, and only then
    v_scale: torch.Tensor | None = None  # the same

    @property
    def settings(self) -> tuple[float | int | None, ...]:
        """All that are no tensors, which a launch is planned from."""
        return self[:-4]
