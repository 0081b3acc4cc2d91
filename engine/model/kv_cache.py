"""The tensors of the KV cache and its swap space, and the only code that moves blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import cupaged

from ..scheduling.step_plan import BlockPairs, Plan


@dataclass(frozen=True)
class KVShape:
    """What one block holds: ``[num_layers, 2, num_kv_heads, block_size, head_size]``."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_size: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_size)

    @property
    def block_bytes(self) -> int:
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_size
        return elements * self.dtype.itemsize


class KVCache:
    """One block-major allocation: a block is one contiguous chunk over all layers, so that copying or
    swapping it is one copy.

    Args:
        shape: of a block.
        num_gpu_blocks: on ``device``.
        num_cpu_blocks: of the swap space, in pinned memory where there is a GPU.
        scales: of a quantised cache, float32 ``[num_layers, 2, num_kv_heads]``, keys before values.
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

    def move_blocks(self, plan: Plan) -> None:
        """Run a plan's swaps and copies on the current stream, before its tokens are computed."""
        if plan.swap_out:
            cupaged.swap_blocks(self.blocks, self.swap_space, _mapping(plan.swap_out))
        if plan.swap_in:
            cupaged.swap_blocks(self.swap_space, self.blocks, _mapping(plan.swap_in))
        for copies in in_turn(plan.copies):
            cupaged.copy_blocks(self.blocks, _mapping(copies).to(self.blocks.device))


def in_turn(copies: BlockPairs) -> Iterator[BlockPairs]:
    """Copies to be made one after the other, in parts that may be made all at once: no part writes a block
    that it reads or writes elsewhere. Nearly always that is one part."""
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
