"""The distributions that tokens are sampled from, and the numbers drawn, by their definitions in float64."""

from __future__ import annotations

import numpy as np
import torch


def weights(
    logits: torch.Tensor, temperature: np.ndarray, min_p: np.ndarray, top_k: np.ndarray, top_p: np.ndarray
) -> torch.Tensor:
    """Return the softmax at the temperature, truncated by min-p, then top-k, then top-p.

    Args:
        logits: [N, V].
        temperature, min_p, top_k, top_p: [N], as in `SamplingParams`; the temperature is positive.

    Returns:
        float64 [N, V], not normalised: the most likely token has weight 1.
    """
    divisor, least, share = (
        torch.from_numpy(np.asarray(setting, np.float64))[:, None] for setting in (temperature, min_p, top_p)
    )
    counts = torch.from_numpy(np.where(top_k > 0, top_k, logits.shape[-1]))[:, None]
    logits = logits.double()
    result = ((logits - logits.amax(-1, keepdim=True)) / divisor).exp()
    ordered, tokens = result.sort(dim=-1, descending=True, stable=True)  # of equal tokens the first stay
    kept = (ordered >= least) & (torch.arange(logits.shape[-1]) < counts)
    ordered = ordered * kept
    before = ordered.cumsum(-1) - ordered
    kept = (before < share * ordered.sum(-1, keepdim=True)) | (share >= 1)
    return torch.zeros_like(result).scatter_(-1, tokens, ordered * kept)


def uniform(seeds: np.ndarray, index: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return float64 numbers in [0, 1) that are a hash of the three uint64 arrays, elementwise."""
    bits = _mix(_mix(_mix(seeds) + index) + positions)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the SplitMix64 mixing function (Steele, Lea, Flood 2014), a bijection of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
