"""Hold the tensors of the KV cache and of its swap space, and move blocks within and between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import cupaged

from ..scheduling.step_plan import BlockPairs, Plan


@dataclass(frozen=True)
class KVShape:
    """Describe a block of the cache, ``[num_layers, 2, num_kv_heads, block_size, head_size]``.

    Args:
        latent: a token has one row of ``head_size`` elements in a layer, its latent and the part of its key
            with RoPE; a block is ``[num_layers, block_size, head_size]``.
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_size: int
    dtype: torch.dtype
    latent: bool = False

    @property
    def block_shape(self) -> tuple[int, ...]:
        of_layer = (self.block_size, self.head_size)
        return (self.num_layers, *(() if self.latent else (2, self.num_kv_heads)), *of_layer)

    @property
    def block_bytes(self) -> int:
        return math.prod(self.block_shape) * self.dtype.itemsize


class KVCache:
    """Hold the KV cache as one block-major tensor, and the swap space as another.

    A block is contiguous over all layers, so copying or swapping it is a single copy.

    Args:
        shape: shape of a block.
        num_gpu_blocks: number of blocks on ``device``.
        num_cpu_blocks: number of blocks of the swap space, in pinned memory if ``device`` is a GPU.
        scales: scales of a quantized cache, float32 ``[num_layers, 2, num_kv_heads]``, keys before values.
    """

    def __init__(
        self,
        shape: KVShape,
        num_gpu_blocks: int,
        num_cpu_blocks: int,
        device: torch.device,
        scales: torch.Tensor | None = None,
    ) -> None:
        self.shape = shape
        self.scales = None if scales is None else tuple((layer[0], layer[1]) for layer in scales)
        self.blocks = torch.empty((num_gpu_blocks, *shape.block_shape), dtype=shape.dtype, device=device)
        self.swap_space = torch.empty(
            (num_cpu_blocks, *shape.block_shape), dtype=shape.dtype, pin_memory=device.type == "cuda"
        )
        self.layers = tuple(self.blocks[:, layer] for layer in range(shape.num_layers))
        self.after_moves: Callable[[Plan], None] | None = None  # tells the other ranks

    def move_blocks(self, plan: Plan) -> None:
        """Run a plan's swaps and copies on the current stream, before the plan's tokens are computed."""
        if plan.swap_out:
            cupaged.swap_blocks(self.blocks, self.swap_space, _mapping(plan.swap_out))
        if plan.swap_in:
            cupaged.swap_blocks(self.swap_space, self.blocks, _mapping(plan.swap_in))
        for copies in in_turn(plan.copies):
            cupaged.copy_blocks(self.blocks, _mapping(copies).to(self.blocks.device))
        if self.after_moves is not None:
            self.after_moves(plan)


def in_turn(copies: BlockPairs) -> Iterator[BlockPairs]:
    """Yield consecutive slices of sequential copies that can each run in parallel.

    No slice writes a block that another copy of it reads or writes. There is almost always one slice.
    """
    start, touched, written = 0, set[int](), set[int]()
    for i, (source, destination) in enumerate(copies):
        if destination in touched or source in written:
            yield copies[start:i]
            start, touched, written = i, set(), set()
        touched |= {source, destination}
        written.add(destination)
    if copies:
        yield copies[start:]


def _mapping(pairs: BlockPairs) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64)
