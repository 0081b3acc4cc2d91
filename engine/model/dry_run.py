"""Prompts through the model before there is an engine: what they take and what they write."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from ..memory.block_manager import BlockManager
from ..sampling.sampler import Sampler
from ..sampling_params import SamplingParams
from ..scheduling.request import Sequence, SequenceGroup
from ..scheduling.step_plan import ScheduledSequence
from .kv_cache import KVCache, KVShape
from .model_runner import ModelRunner


def dry_run(
    runner: ModelRunner,
    shape: KVShape,
    prompts: SequenceABC[list[int]],
    params: SamplingParams | None = None,
) -> KVCache:
    """Compute the prompts in one step, in a cache of its own that just holds them.

    Args:
        params: sample a token after each as these say; None: none is sampled.

    Returns:
        The cache, not quantised; zero where no token was written.
    """
    num_blocks = sum(-(-len(token_ids) // shape.block_size) for token_ids in prompts)
    blocks = BlockManager(num_blocks, 0, shape.block_size)
    cache = KVCache(shape, num_blocks, 0, runner.device)
    cache.blocks.zero_()
    scheduled = []
    for i, token_ids in enumerate(prompts):
        seq = Sequence(i, 0, token_ids, len(token_ids), 0)
        group = SequenceGroup("dry run", None, token_ids, params or SamplingParams(), 1, i, [seq])
        blocks.append(i, 0, len(token_ids))
        scheduled.append(ScheduledSequence(group, seq, 0, len(token_ids), 1))
    logits = runner.run(tuple(scheduled), blocks, cache)
    if params is not None:
        Sampler(frozenset()).sample(logits, scheduled)
    return cache
