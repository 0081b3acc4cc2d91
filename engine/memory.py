"""How many blocks the KV cache gets."""

from __future__ import annotations

import os

import torch

from .block_manager import BlockManager
from .config import EngineConfig
from .kv_cache import KVCache, KVShape
from .model_runner import ModelRunner
from .request import Sequence, SequenceGroup
from .sampling_params import SamplingParams
from .scheduler import ScheduledSequence

GIB = 1 << 30
CPU_CACHE_BYTES = 4 * GIB


def num_gpu_blocks(config: EngineConfig, runner: ModelRunner, shape: KVShape, max_model_len: int) -> int:
    """Blocks that fit beside the weights and the activations of the largest step, or what the running
    sequences can use where that is less.

    Raises:
        ValueError: not one block fits.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if runner.device.type == "cuda":
        free = _free_gpu_bytes(config, runner, shape)
    else:
        free = min(CPU_CACHE_BYTES, _available_cpu_bytes() // 4)
    usable = config.max_num_seqs * -(-max_model_len // shape.block_size)
    blocks = min(free // shape.block_bytes, usable)
    if blocks < 1:
        raise ValueError(
            f"no memory is left for the KV cache: a block takes {shape.block_bytes} bytes, and "
            f"{max(0, free)} are free; raise gpu_memory_utilization, lower max_num_batched_tokens, or use "
            "a smaller model"
        )
    return int(blocks)


def num_cpu_blocks(config: EngineConfig, shape: KVShape, gpu_blocks: int) -> int:
    """Blocks of the swap space: never more than the GPU's, which bounds what can be preempted at once."""
    if config.preemption_mode != "swap":
        return 0
    return min(int(config.swap_space * GIB) // shape.block_bytes, gpu_blocks)


def _free_gpu_bytes(config: EngineConfig, runner: ModelRunner, shape: KVShape) -> int:
    """What ``gpu_memory_utilization`` leaves after the peak of a step with the most tokens."""
    torch.cuda.reset_peak_memory_stats(runner.device)
    num_tokens = config.max_num_batched_tokens
    blocks = BlockManager(-(-num_tokens // shape.block_size), 0, shape.block_size)
    cache = KVCache(shape, blocks.gpu.num_blocks, 0, runner.device)
    seq = Sequence(0, 0, [0] * num_tokens, num_tokens, 0)
    group = SequenceGroup("profile", None, seq.token_ids, SamplingParams(), 1, 0, [seq])
    blocks.append(0, 0, num_tokens)
    runner.run((ScheduledSequence(group, seq, 0, num_tokens, 1),), blocks, cache)
    torch.cuda.synchronize(runner.device)
    peak = torch.cuda.max_memory_allocated(runner.device) - cache.blocks.nbytes
    del cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(runner.device)
    other = total - free - torch.cuda.memory_reserved(runner.device)
    return int(total * config.gpu_memory_utilization) - peak - other


def _available_cpu_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
