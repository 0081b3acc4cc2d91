"""One prompt through the model before there is an engine: what it takes and what it writes."""

from __future__ import annotations

from .block_manager import BlockManager
from .kv_cache import KVCache, KVShape
from .model_runner import ModelRunner
from .plan import ScheduledSequence
from .request import Sequence, SequenceGroup
from .sampling_params import SamplingParams


def dry_run(runner: ModelRunner, shape: KVShape, token_ids: list[int]) -> KVCache:
    """Compute the prompt in one step, in a cache of its own that just holds it.

    Returns:
        The cache, not quantised; zero where no token was written.
    """
    num_tokens = len(token_ids)
    blocks = BlockManager(-(-num_tokens // shape.block_size), 0, shape.block_size)
    cache = KVCache(shape, blocks.gpu.num_blocks, 0, runner.device)
    cache.blocks.zero_()
    seq = Sequence(0, 0, token_ids, num_tokens, 0)
    group = SequenceGroup("dry run", None, token_ids, SamplingParams(), 1, 0, [seq])
    blocks.append(0, 0, num_tokens)
    runner.run((ScheduledSequence(group, seq, 0, num_tokens, 1),), blocks, cache)
    return cache
