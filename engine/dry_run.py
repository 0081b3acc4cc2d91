"""Prompts through the model before there is an engine: what they take and what they write."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from .block_manager import BlockManager
from .kv_cache import KVCache, KVShape
from .model_runner import ModelRunner
from .plan import ScheduledSequence
from .request import Sequence, SequenceGroup
from .sampler import Sampler
from .sampling_params import SamplingParams

_UNWRITTEN = 0.5  # a number that is no key's or value's in all places; a zero or a NaN may be


def dry_run(
    runner: ModelRunner,
    shape: KVShape,
    prompts: SequenceABC[list[int]],
    fill: float = 0.0,
    params: SamplingParams | None = None,
) -> KVCache:
    """Compute the prompts in one step, in a cache of its own that just holds them.

    Args:
        params: sample a token after each as these say; None: none is sampled.

    Returns:
        The cache, not quantised; ``fill`` where no token was written.
    """
    num_blocks = sum(-(-len(token_ids) // shape.block_size) for token_ids in prompts)
    blocks = BlockManager(num_blocks, 0, shape.block_size)
    cache = KVCache(shape, num_blocks, 0, runner.device)
    cache.blocks.fill_(fill)
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


def check_layers(runner: ModelRunner, shape: KVShape) -> None:
    """Raise ValueError unless every layer of the model keeps keys and values in the cache, of its shape.

    A layer that does not, and is no error either, has attention of its own or a state: it would mix the
    sequences of a step, and know nothing of the steps before. A model that counts positions itself knows
    nothing of them either.
    """
    kind = runner.config.model_type
    try:
        cache = dry_run(runner, shape, [[0]], fill=_UNWRITTEN)
    except ValueError as error:
        raise ValueError(f"{kind} does not run on the paged cache: {error}") from error
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError(
            f"{kind} does not run on the paged cache: its code fails there with {type(error).__name__}: "
            f"{error}"
        ) from error
    unwritten = (cache.blocks[0, :, :, :, 0] == _UNWRITTEN).all(dim=-1).flatten(1).any(dim=-1)
    if unwritten.any():
        layers = ", ".join(map(str, unwritten.nonzero().flatten().tolist()))
        raise ValueError(
            f"{kind} is not supported: of its {len(unwritten)} layers these do not keep keys and values in "
            f"the paged cache: {layers}"
        )
    if not runner.takes_positions:
        raise ValueError(
            f"{kind} is not supported: it does not take the positions of tokens as the engine gives them, "
            "but counts its own"
        )
