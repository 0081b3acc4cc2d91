"""Determine the number of blocks of the KV cache and of the swap space."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch

from ..config import EngineConfig
from ..sampling_params import SamplingParams
from ..scheduling.contiguous_memory import longest
from . import cgroup
from .dry_run import dry_run
from .kv_cache import KVShape
from .model_runner import ModelRunner
from .tensor_parallel import Ranks

GIB = 1 << 30
CPU_CACHE_BYTES = 4 * GIB

_log = logging.getLogger("cupaged.engine")


@dataclass(frozen=True)
class CacheSize:
    """The number of blocks, and the length of the sequences that they can hold."""

    num_gpu_blocks: int
    num_cpu_blocks: int
    max_model_len: int


def choose_cache_size(
    config: EngineConfig, runner: ModelRunner, shape: KVShape, model_len: int, ranks: Ranks | None = None
) -> CacheSize:
    """Return how many blocks fit, and the maximum length of sequences.

    Args:
        model_len: maximum number of tokens of a sequence, as far as the model and the config are concerned.
        ranks: the group of ranks, each with its part of the cache; None: the model is not divided.

    Raises:
        ValueError: not one block fits, or less than the ``max_model_len`` that the config asks for.
    """
    num_blocks = num_gpu_blocks(config, runner, shape, model_len)
    if ranks is not None:
        num_blocks = ranks.smallest(num_blocks)
    held = longest(config.memory_policy, num_blocks) * config.block_size
    if config.max_model_len is not None and held < model_len:
        run = "" if config.memory_policy == "paged" else " in one run of blocks"
        raise ValueError(
            f"max_model_len is {model_len}, and the KV cache holds {held} tokens{run}: lower it, or give "
            "the cache more memory"
        )
    if held < model_len:
        _log.warning("sequences end at %d tokens, which the KV cache holds, not at %d", held, model_len)
    return CacheSize(num_blocks, num_cpu_blocks(config, shape, num_blocks), min(model_len, held))


def num_gpu_blocks(config: EngineConfig, runner: ModelRunner, shape: KVShape, max_model_len: int) -> int:
    """Return the number of blocks of the KV cache.

    That is ``num_gpu_blocks_override``, or as many as fit beside the weights and the largest step, but no
    more than can be of use (`_useful_blocks`).

    Raises:
        ValueError: no block fits.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if runner.device.type == "cuda":
        free = _free_gpu_bytes(config, runner, max_model_len)
        remedy = "raise gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs"
    else:
        free = min(CPU_CACHE_BYTES, _available_cpu_bytes() // 4) // config.tensor_parallel_size
        remedy = "free memory, or raise the container's limit (a quarter of what is available is taken)"
    blocks = min(free // shape.block_bytes, _useful_blocks(config, shape, max_model_len))
    if blocks < 1:
        raise ValueError(
            f"no memory is left for the KV cache: a block takes {shape.block_bytes} bytes, and "
            f"{max(0, free)} are free; {remedy}, or use a smaller model"
        )
    return int(blocks)


def _useful_blocks(config: EngineConfig, shape: KVShape, max_model_len: int) -> int:
    """Return the number of blocks that ``max_num_seqs`` sequences of maximum length use.

    It includes the hundredth that stays free while they run (`Watermark`), and is doubled if
    there is a prefix cache.
    """
    running = config.max_num_seqs * -(-max_model_len // shape.block_size)
    useful = running + running // 99 + 1
    return 2 * useful if config.enable_prefix_caching and config.memory_policy == "paged" else useful


def num_cpu_blocks(config: EngineConfig, shape: KVShape, gpu_blocks: int) -> int:
    """Return the number of blocks of the swap space, at most that of the GPU (paper, section 4.5).

    Sequences that do not fit when they are preempted are recomputed.
    """
    if config.preemption_mode == "recompute" or config.memory_policy != "paged":
        return 0
    part = int(config.swap_space * GIB) // config.tensor_parallel_size
    return min(part // shape.block_bytes, gpu_blocks)


def largest_step(config: EngineConfig, max_model_len: int) -> list[int]:
    """Return prompt lengths that fill a step up to its maximum numbers of tokens and of sequences."""
    count = min(config.max_num_seqs, config.max_num_batched_tokens)
    num_tokens = min(config.max_num_batched_tokens, count * max_model_len)
    return [num_tokens // count + (i < num_tokens % count) for i in range(count)]


def _free_gpu_bytes(config: EngineConfig, runner: ModelRunner, max_model_len: int) -> int:
    """Return the bytes that ``gpu_memory_utilization`` leaves beside graphs and the largest step's peak."""
    torch.cuda.reset_peak_memory_stats(runner.device)
    prompts = [[0] * length for length in largest_step(config, max_model_len)]
    # Sampling needs the most memory if all tokens are about equally likely, so that all are sorted.
    params = SamplingParams(temperature=1e6, top_p=0.9, frequency_penalty=0.1)
    cache = dry_run(runner, runner.kv_shape(config.block_size), prompts, params=params)
    torch.cuda.synchronize(runner.device)
    peak = torch.cuda.max_memory_allocated(runner.device) - cache.blocks.nbytes
    graphs = 0 if config.enforce_eager else runner.graph_bytes(cache, config.max_num_seqs, max_model_len)
    del cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(runner.device)
    other = total - free - torch.cuda.memory_reserved(runner.device)
    return int(total * config.gpu_memory_utilization) - peak - other - graphs


def _available_cpu_bytes() -> int:
    """Return the available bytes of the machine or of its container, whichever are fewer.

    Reclaimable memory of the page cache counts as available.
    """
    machine = int(psutil.virtual_memory().available)
    container = cgroup.available_bytes()
    return machine if container is None else min(machine, container)
