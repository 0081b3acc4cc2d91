"""How many blocks the KV cache gets."""

from __future__ import annotations

import os

import torch

from .config import EngineConfig
from .dry_run import dry_run
from .kv_cache import KVShape
from .model_runner import ModelRunner

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
        free = _free_gpu_bytes(config, runner)
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
    if config.preemption_mode == "recompute" or config.memory_policy != "paged":
        return 0
    return min(int(config.swap_space * GIB) // shape.block_bytes, gpu_blocks)


def _free_gpu_bytes(config: EngineConfig, runner: ModelRunner) -> int:
    """What ``gpu_memory_utilization`` leaves after the peak of a step with the most tokens."""
    torch.cuda.reset_peak_memory_stats(runner.device)
    cache = dry_run(runner, runner.kv_shape(config.block_size), [0] * config.max_num_batched_tokens)
    torch.cuda.synchronize(runner.device)
    peak = torch.cuda.max_memory_allocated(runner.device) - cache.blocks.nbytes
    del cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(runner.device)
    other = total - free - torch.cuda.memory_reserved(runner.device)
    return int(total * config.gpu_memory_utilization) - peak - other


def _available_cpu_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
