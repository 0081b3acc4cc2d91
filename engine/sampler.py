"""Next tokens from logits, for a whole batch at once.

A sampled token is the inverse of the cumulative distribution at a number drawn for it alone: a hash of the
request's seed, the index of the output and the position of the token. So a request with a seed gives the same
tokens whatever else is in the batch (as far as its logits are the same).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .sampling_params import SamplingParams
from .scheduler import ScheduledSequence


def sample(logits: torch.Tensor, scheduled: Sequence[ScheduledSequence]) -> list[list[int]]:
    """Draw the tokens of a step.

    Args:
        logits: ``[N, vocabulary]``, a row for each scheduled sequence with ``num_samples > 0``, in order.
        scheduled: the step's sequences.

    Returns:
        For each scheduled sequence its ``num_samples`` tokens.
    """
    sampling = [item for item in scheduled if item.num_samples]
    if not sampling:
        return [[] for _ in scheduled]
    if all(item.group.params.greedy for item in sampling):
        # On a CPU max is several times as fast as argmax, and gives the first of equals as well.
        tokens = logits.max(-1).indices.tolist()
        draws = iter([[token] * item.num_samples for token, item in zip(tokens, sampling)])
    else:
        tokens = _draw(logits, sampling).tolist()
        ends = np.cumsum([item.num_samples for item in sampling])
        draws = iter([tokens[end - item.num_samples : end] for end, item in zip(ends, sampling)])
    return [next(draws) if item.num_samples else [] for item in scheduled]


def _draw(logits: torch.Tensor, sampling: list[ScheduledSequence]) -> torch.Tensor:
    """int64 ``[sum of num_samples]``, the draws of each sequence side by side."""
    device = logits.device
    counts = [item.num_samples for item in sampling]
    row_of = np.repeat(np.arange(len(sampling)), counts)
    # Output i of several drawn at once has index i; a sequence alone has its own.
    index = np.concatenate(
        [np.arange(item.num_samples) if item.num_samples > 1 else [item.seq.index] for item in sampling]
    )
    seeds = np.array([item.seq.seed for item in sampling], dtype=np.uint64)[row_of]
    positions = np.array([len(item.seq.token_ids) for item in sampling], dtype=np.uint64)[row_of]
    uniforms = torch.from_numpy(uniform(seeds, index.astype(np.uint64), positions)).to(device)

    params = [item.group.params for item in sampling]
    rows = torch.from_numpy(row_of).to(device)
    cumulative = probabilities(logits, params).double().cumsum(-1)[rows]
    # A number is at most 1 - 2^-53, so its product with the total is below the total, after rounding too.
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    greedy = torch.tensor([p.greedy for p in params], device=device)
    return torch.where(greedy[rows], logits.argmax(-1)[rows], drawn)


def probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """What is drawn from: the softmax at the temperature, then top-k, then top-p of what that leaves.

    Args:
        logits: ``[N, vocabulary]``.
        params: of each row; a greedy row's probabilities are those of temperature 1.

    Returns:
        float32 ``[N, vocabulary]`` in the vocabulary's order, so that a row's draw is the same whatever its
        neighbours ask for. A row that is cut off is not normalised again.
    """
    device, vocabulary = logits.device, logits.shape[-1]
    # The clamp keeps 0 / 0 and inf / inf out, whatever a request asks for.
    limits = torch.finfo(torch.float32)
    scales = [min(max(p.temperature, limits.tiny), limits.max) if p.temperature else 1.0 for p in params]
    temperature = torch.tensor(scales, dtype=torch.float32, device=device)
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # before the division: a low temperature overflows
    probs = (logits / temperature[:, None]).softmax(-1)
    if all(p.top_k <= 0 and p.top_p == 1 for p in params):
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    counts = [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params]
    top_k = torch.tensor(counts, device=device)
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=device) >= top_k[:, None], 0)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    before = cumulative - ordered
    cut = (before >= top_p[:, None] * cumulative[:, -1:]) & (top_p < 1)[:, None]
    return torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(cut, 0))


def uniform(seeds: np.ndarray, index: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) that depends on the three uint64 arrays alone, elementwise."""
    bits = _mix(_mix(_mix(seeds) + index) + positions)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 step (Steele, Lea, Flood 2014): a bijection of 64 bits that scatters them."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
