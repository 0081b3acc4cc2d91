"""One prompt through the model before there is an engine: what it takes and what it writes."""

from __future__ import annotations

from .block_manager import BlockManager
from .kv_cache import KVCache, KVShape
from .model_runner import ModelRunner
from .plan import ScheduledSequence
from .request import Sequence, SequenceGroup
from .sampling_params import SamplingParams

_UNWRITTEN = 0.5  # a number that is no key's or value's in all places; a zero or a NaN may be


def dry_run(runner: ModelRunner, shape: KVShape, token_ids: list[int], fill: float = 0.0) -> KVCache:
    """Compute the prompt in one step, in a cache of its own that just holds it.

    Returns:
        The cache, not quantised; ``fill`` where no token was written.
    """
    num_tokens = len(token_ids)
    blocks = BlockManager(-(-num_tokens // shape.block_size), 0, shape.block_size)
    cache = KVCache(shape, blocks.gpu.num_blocks, 0, runner.device)
    cache.blocks.fill_(fill)
    seq = Sequence(0, 0, token_ids, num_tokens, 0)
    group = SequenceGroup("dry run", None, token_ids, SamplingParams(), 1, 0, [seq])
    blocks.append(0, 0, num_tokens)
    runner.run((ScheduledSequence(group, seq, 0, num_tokens, 1),), blocks, cache)
    return cache


def check_layers(runner: ModelRunner, shape: KVShape) -> None:
    """Raise ValueError unless every layer of the model keeps keys and values in the cache, of its shape.

    A layer that does not, and is no error either, has attention of its own or a state: it would mix the
    sequences of a step, and know nothing of the steps before. A model that counts positions itself knows
    nothing of them either.
    """
    kind = runner.config.model_type
    try:
        cache = dry_run(runner, shape, [0], fill=_UNWRITTEN)
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
