"""The distribution that a sampled token is drawn from, and the draw."""

from __future__ import annotations

import numpy as np
import torch

_HEADS = (256, 4096)  # numbers of most likely tokens that are looked at before all are sorted
_CHUNK = 128  # tokens whose weights are added before the cumulative sum is taken


def weights(
    logits: torch.Tensor,
    temperature: np.ndarray,
    min_p: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
) -> torch.Tensor:
    """The softmax at the temperature, then what min-p, of that top-k, and of that top-p leave.

    Each row costs what it asks for, and is the same whatever its neighbours ask for.

    Args:
        logits: ``[N, vocabulary]``.
        temperature, min_p, top_p: ``[N]``, as in `SamplingParams`; the temperature is positive.
        top_k: int64 ``[N]``, 0 or less for all tokens.

    Returns:
        float32 ``[N, vocabulary]``, not normalised: the most likely token has 1.
    """
    device, vocabulary = logits.device, logits.shape[-1]
    # The clamp keeps 0 / 0 and inf / inf out, whatever a request asks for.
    limits = torch.finfo(torch.float32)
    divisor = torch.from_numpy(temperature.clip(limits.tiny, limits.max).astype(np.float32)).to(device)
    # The largest is taken off before the division: a low temperature overflows.
    result = (logits.float() - logits.amax(-1, keepdim=True).float()).div_(divisor[:, None]).exp_()
    if (min_p > 0).any():
        rows = torch.from_numpy(np.flatnonzero(min_p > 0)).to(device)
        least = torch.from_numpy(min_p[min_p > 0].astype(np.float32)).to(device)
        chosen = result[rows]
        result[rows] = chosen.masked_fill_(chosen < least[:, None], 0)
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
    """Invert cumulative distributions: the first token at which the sum of the weights, as a share of their
    total, exceeds a number.

    Args:
        weights: float32 ``[N, vocabulary]``, in any scale.
        rows: int64 ``[D]``, the row of each draw.
        uniforms: float64 ``[D]``, at least 0 and at most 1 - 2^-53.

    Returns:
        int64 ``[D]``. No token of weight 0 is drawn.
    """
    vocabulary = weights.shape[-1]
    whole = vocabulary // _CHUNK * _CHUNK
    # The sums of the chunks in float32 are as exact as the weights; their own sum is taken in float64.
    sums = weights[:, :whole].unflatten(-1, (-1, _CHUNK)).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    cumulative = sums.double().cumsum(-1)[rows]
    # The product with a number below 1 is below the total, after rounding too.
    target = uniforms[:, None] * cumulative[:, -1:]
    last = cumulative.shape[-1] - 1
    chunk = torch.searchsorted(cumulative, target, right=True).clamp_(max=last)  # for weights that are NaN
    size = sums[rows].gather(-1, chunk).double()
    rest = (
        target - (cumulative.gather(-1, chunk) - size)
    ) / size  # share of the chunk, 0 to 1 but for rounding
    tokens = chunk * _CHUNK + torch.arange(_CHUNK, device=weights.device)
    inside = weights[rows[:, None], tokens.clamp(max=vocabulary - 1)].double()
    inside = inside.masked_fill_(tokens >= vocabulary, 0).cumsum(-1)
    total = inside[:, -1:]
    target = (rest * total).clamp_(min=0).minimum(total.nextafter(torch.zeros_like(total)))
    drawn = chunk * _CHUNK + torch.searchsorted(inside, target, right=True)
    return drawn[:, 0].clamp_(max=vocabulary - 1)


def _truncate(weights: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray) -> None:
    """Set to 0, in place, what top-k and then top-p cut off. Of equal tokens the first ones stay."""
    device, vocabulary = weights.device, weights.shape[-1]
    counts = torch.from_numpy(np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary)).to(device)
    shares = torch.from_numpy(top_p.astype(np.float64)).to(device)
    totals = weights.sum(-1).double()
    kept, least = torch.empty_like(counts), torch.empty_like(totals, dtype=weights.dtype)
    tied = torch.empty_like(counts, dtype=torch.bool)
    rows = torch.arange(len(weights), device=device)
    # A few of the most likely tokens tell of most rows where they end; only the others look at more.
    for size in (*(size for size in _HEADS if size < vocabulary), vocabulary):
        head = (weights if len(rows) == len(weights) else weights[rows]).topk(size).values
        number = _num_kept(head, counts[rows], shares[rows], totals[rows], vocabulary)
        known = number <= size
        end = number.clamp(1, size)[:, None]  # of weights that are NaN none count
        border, after = head.gather(-1, end - 1)[:, 0], head.gather(-1, end.clamp(max=size - 1))[:, 0]
        kept[rows], least[rows], tied[rows] = number, border, (border == after) & (border > 0)
        rows = rows[~known]
        if not len(rows):
            break
    weights.masked_fill_(weights < least[:, None], 0)
    rows = tied.nonzero()[:, 0]  # some tokens at the border may have to go
    if len(rows):
        chosen, border = weights[rows], least[rows, None]
        room = kept[rows, None] - (chosen > border).sum(-1, keepdim=True)
        at = chosen == border
        weights[rows] = chosen.masked_fill_(at & (at.cumsum(-1) > room), 0)


def _num_kept(
    ordered: torch.Tensor, counts: torch.Tensor, shares: torch.Tensor, totals: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """int64 ``[N]``, how many of the largest weights stay; more than there are columns where the columns do
    not tell.

    Args:
        ordered: float32 ``[N, M]``, the M largest weights of each row, descending.
        counts: int64 ``[N]``, top-k of each row.
        shares: float64 ``[N]``, top-p.
        totals: float64 ``[N]``, the sum of all weights of the row.
    """
    columns = ordered.shape[-1]
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    within = counts <= columns  # top-k ends in these columns, so the sum that top-p is a share of is known
    at_k = cumulative.gather(-1, counts.clamp(max=columns)[:, None] - 1)[:, 0]
    totals = torch.where(within, at_k, totals)
    reached = (cumulative - ordered < (shares * totals)[:, None]).sum(-1)
    kept = torch.where(shares < 1, reached.minimum(counts), counts)
    whole = counts == vocabulary  # no top-k: the sum is that of all
    return torch.where(within | (whole & (reached < columns)), kept, columns + 1)
