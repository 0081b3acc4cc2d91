"""Draw decode steps on which a graph's replay is compared with the step that it stands for."""

from __future__ import annotations

import numpy as np
import torch

from .graph_buckets import LONG_PREFIX, Bucket
from .kv_cache import KVCache
from .step_inputs import StepInputs

_BLOCKS = 1024  # maximum number of blocks that drawn steps read and write
_SPREAD = 512  # tokens by which the lengths of most sequences differ
_FINITE_BYTES = 0x40  # a number whose bytes are all below this is finite, in every dtype of a cache
_TOLERANCE = 1e-4  # relative to a row; two units in the last place where that is more


def fill_with_numbers(cache: KVCache) -> None:
    """Overwrite the blocks that drawn steps read."""
    cache.blocks[:_BLOCKS].view(torch.uint8).random_(0, _FINITE_BYTES)


def draw_step(
    rng: np.random.Generator, bucket: Bucket, cache: KVCache, vocabulary: int, max_model_len: int
) -> StepInputs:
    """Draw a decode step that fills a bucket, as far as each sequence has a block of its own to write to.

    One sequence is as long as the bucket allows; if all were, a step could take seconds. Half of the token
    IDs stand for tokens that the step before has sampled.

    Args:
        vocabulary: number of tokens.
        max_model_len: maximum number of tokens of a sequence.
    """
    num_blocks, block_size = min(len(cache.blocks), _BLOCKS), cache.shape.block_size
    count = min(bucket.num_seqs, num_blocks)
    longest = min(bucket.width * block_size, max_model_len)
    shortest = min(LONG_PREFIX + 1 if bucket.shared_prefix else 1, longest)
    most = min(shortest + _SPREAD, longest)
    seq_lens = rng.integers(shortest, most + 1, count, dtype=np.int32)
    seq_lens[rng.integers(count)] = longest
    tables = np.zeros((count, bucket.width), dtype=np.int32)
    for row, length in zip(tables, seq_lens):
        num_columns = -(-length // block_size)
        row[:num_columns] = rng.integers(0, num_blocks, num_columns, dtype=np.int32)
    if bucket.shared_prefix:
        tables[:, : LONG_PREFIX // block_size] = tables[0, : LONG_PREFIX // block_size]
    positions = seq_lens.astype(np.int64) - 1
    tables[np.arange(count), positions // block_size] = rng.permutation(num_blocks)[:count]
    slots = tables[np.arange(count), positions // block_size].astype(np.int64) * block_size
    token_ids = rng.integers(0, vocabulary, count)
    sampled = rng.random(count) < 0.5
    token_ids[sampled] = -1 - rng.integers(0, count, count)[sampled]
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        slots=slots + positions % block_size,
        kept_rows=np.arange(count),
        seq_lens=seq_lens,
        query_start_loc=np.arange(count + 1, dtype=np.int32),
        block_tables=tables,
        is_decode=True,
    )


def difference(replayed: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Return how a replay's logits differ from those of the step; None if by no more than rounding.

    Some kernels add in any order, and libraries may choose another kernel, so that bits need not be equal.
    """
    if replayed.equal(expected):
        return None
    exact, wanted = replayed.double(), expected.double()
    if not bool(wanted.isfinite().all()):
        return "the model's logits are not finite"
    error = (exact - wanted).square().mean(-1).sqrt() / wanted.square().mean(-1).sqrt()
    largest = float(error.nan_to_num(torch.inf).max())
    if largest <= max(_TOLERANCE, 2 * torch.finfo(expected.dtype).eps):
        return None
    return f"a replay's logits differ from those of the step by {largest:.2g} of their size"
