"""Next tokens from logits, for a whole batch at once.

A sampled token is the inverse of the cumulative distribution at a number drawn for it alone: a hash of the
request's seed, the index of the output and the position of the token. So a request with a seed gives the same
tokens whatever else is in the batch (as far as its logits are the same).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

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
        tokens = logits.argmax(-1).tolist()
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
    temperature = torch.tensor([p.temperature or 1.0 for p in params], device=device)
    probs = (logits.float() / temperature[:, None]).softmax(-1)
    order = None
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        probs, order = probs.sort(-1, descending=True)
        vocabulary = probs.shape[-1]
        top_k = torch.tensor([p.top_k if p.top_k > 0 else vocabulary for p in params], device=device)
        probs = probs.masked_fill(torch.arange(vocabulary, device=device) >= top_k[:, None], 0)
        top_p = torch.tensor([p.top_p for p in params], device=device)
        total = probs.sum(-1, keepdim=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill((before >= top_p[:, None] * total) & (top_p < 1)[:, None], 0)

    cumulative = probs.double().cumsum(-1)[torch.from_numpy(row_of).to(device)]
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    rows = torch.from_numpy(row_of).to(device)
    if order is not None:
        drawn = order[rows, drawn]
    greedy = torch.tensor([p.greedy for p in params], device=device)
    return torch.where(greedy[rows], logits.argmax(-1)[rows], drawn)


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
