"""Run prompts through the model before there is an engine, to measure memory and to calibrate scales."""

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
    """Compute prompts in one step, in a temporary cache of just their size.

    Args:
        shape: shape of a block, not quantized.
        params: sampling settings for one token after each prompt; None: no token is sampled.

    Returns:
        The cache; zero where no token was written.
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


def probe(runner: ModelRunner, block_size: int, params: SamplingParams | None = None) -> None:
    """Compute a token in a cache of its own, beside any requests.

    Args:
        params: how to sample another one after it; None: none is sampled.
    """
    dry_run(runner, runner.kv_shape(block_size), [[0]], params=params)
