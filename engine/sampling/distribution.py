"""Compute the distributions that tokens are sampled from, and draw from them."""

from __future__ import annotations

import numpy as np
import torch

_HEADS = (256, 4096)  # numbers of most likely tokens to try before the whole vocabulary is sorted
_CHUNK = 128  # number of tokens whose weights are summed before the cumulative sum is taken


def weights(
    logits: torch.Tensor,
    temperature: np.ndarray,
    min_p: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
) -> torch.Tensor:
    """Return the softmax at the temperature, truncated by min-p, then top-k, then top-p.

    A row's result does not depend on the other rows, and only rows that ask for truncation pay for it.

    Args:
        logits: ``[N, vocabulary]``.
        temperature, min_p, top_p: float64 ``[N]``, as in `SamplingParams`; the temperature is positive.
        top_k: int64 ``[N]``, 0 or less for all tokens.

    Returns:
        float32 ``[N, vocabulary]``, not normalized: the most likely token has weight 1.
    """
    device, vocabulary = logits.device, logits.shape[-1]
    # The clamp prevents 0 / 0 and inf / inf at extreme temperatures.
    limits = torch.finfo(torch.float32)
    divisor = torch.from_numpy(temperature.clip(limits.tiny, limits.max).astype(np.float32)).to(device)
    # Subtract the maximum before the division, which overflows at low temperatures otherwise.
    result = (logits.float() - logits.amax(-1, keepdim=True).float()).div_(divisor[:, None]).exp_()
    if (min_p > 0).any():
        rows = torch.from_numpy(np.flatnonzero(min_p > 0)).to(device)
        minimum = torch.from_numpy(min_p[min_p > 0].astype(np.float32)).to(device)
        chosen = result[rows]
        result[rows] = chosen.masked_fill_(chosen < minimum[:, None], 0)
    cut = ((top_k > 0) & (top_k < vocabulary)) | (top_p < 1)
    if cut.all():
        _truncate(result, top_k, top_p)
    elif cut.any():
        rows = torch.from_numpy(np.flatnonzero(cut)).to(device)
        chosen = result[rows]
        _truncate(chosen, top_k[cut], top_p[cut])
        result[rows] = chosen
    return result


def draw(weights: torch.Tensor, rows: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw tokens by inverting cumulative distributions.

    The first token is drawn at which the cumulative weight exceeds the uniform number times the total.

    Args:
        weights: float32 ``[N, vocabulary]``, at any scale.
        rows: int64 ``[D]``, the row of each draw.
        uniforms: float64 ``[D]``, at least 0 and at most 1 - 2^-53.

    Returns:
        int64 ``[D]``. No token of weight 0 is drawn.
    """
    vocabulary = weights.shape[-1]
    whole = vocabulary // _CHUNK * _CHUNK
    # Float32 is exact enough for the sums of chunks; they are accumulated in float64.
    sums = weights[:, :whole].unflatten(-1, (-1, _CHUNK)).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    cumulative = sums.double().cumsum(-1)[rows]
    # The product with a number below 1 is below the total, even after rounding.
    target = uniforms[:, None] * cumulative[:, -1:]
    last = cumulative.shape[-1] - 1
    chunk = torch.searchsorted(cumulative, target, right=True).clamp_(max=last)  # NaN weights overshoot
    size = sums[rows].gather(-1, chunk).double()
    # Position within the chunk, from 0 to 1 except for rounding.
    fraction = (target - (cumulative.gather(-1, chunk) - size)) / size
    tokens = chunk * _CHUNK + torch.arange(_CHUNK, device=weights.device)
    inside = weights[rows[:, None], tokens.clamp(max=vocabulary - 1)].double()
    inside = inside.masked_fill_(tokens >= vocabulary, 0).cumsum(-1)
    total = inside[:, -1:]
    target = (fraction * total).clamp_(min=0).minimum(total.nextafter(torch.zeros_like(total)))
    drawn = chunk * _CHUNK + torch.searchsorted(inside, target, right=True)
    return drawn[:, 0].clamp_(max=vocabulary - 1)


def _truncate(weights: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray) -> None:
    """Set the weights that top-k and then top-p exclude to 0 in place; ties keep the lowest token IDs."""
    device, vocabulary = weights.device, weights.shape[-1]
    counts = torch.from_numpy(np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary)).to(device)
    shares = torch.from_numpy(top_p.astype(np.float64)).to(device)
    totals = weights.sum(-1).double()
    kept, threshold = torch.empty_like(counts), torch.empty_like(totals, dtype=weights.dtype)
    tied = torch.empty_like(counts, dtype=torch.bool)
    rows = torch.arange(len(weights), device=device)
    # For most rows a few of the most likely tokens are enough; only the remaining rows sort more.
    for size in (*(size for size in _HEADS if size < vocabulary), vocabulary):
        head = (weights if len(rows) == len(weights) else weights[rows]).topk(size).values
        num_kept = _num_kept(head, counts[rows], shares[rows], totals[rows], vocabulary)
        known = num_kept <= size
        end = num_kept.clamp(1, size)[:, None]  # num_kept is 0 where weights are NaN
        last, next_ = head.gather(-1, end - 1)[:, 0], head.gather(-1, end.clamp(max=size - 1))[:, 0]
        kept[rows], threshold[rows], tied[rows] = num_kept, last, (last == next_) & (last > 0)
        rows = rows[~known]
        if not len(rows):
            break
    weights.masked_fill_(weights < threshold[:, None], 0)
    rows = tied.nonzero()[:, 0]  # more tokens may equal the threshold than are kept
    if len(rows):
        chosen, limit = weights[rows], threshold[rows, None]
        room = kept[rows, None] - (chosen > limit).sum(-1, keepdim=True)
        at_limit = chosen == limit
        weights[rows] = chosen.masked_fill_(at_limit & (at_limit.cumsum(-1) > room), 0)


def _num_kept(
    ordered: torch.Tensor, counts: torch.Tensor, shares: torch.Tensor, totals: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Return how many of the largest weights to keep in each row, int64 ``[N]``.

    The number is M + 1 where M weights are too few to tell.

    Args:
        ordered: float32 ``[N, M]``, the M largest weights of each row, descending.
        counts: int64 ``[N]``, top-k of each row.
        shares: float64 ``[N]``, top-p of each row.
        totals: float64 ``[N]``, sum of all weights of each row.
    """
    columns = ordered.shape[-1]
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    within = counts <= columns  # top-k ends in these columns, so the total of top-p is known
    at_k = cumulative.gather(-1, counts.clamp(max=columns)[:, None] - 1)[:, 0]
    totals = torch.where(within, at_k, totals)
    reached = (cumulative - ordered < (shares * totals)[:, None]).sum(-1)
    kept = torch.where(shares < 1, reached.minimum(counts), counts)
    whole = counts == vocabulary  # no top-k: the total is that of all weights
    return torch.where(within | (whole & (reached < columns)), kept, columns + 1)


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
