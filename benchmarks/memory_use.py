"""Account for the use of the KV cache's memory, as in the paper's Figure 2 and section 3.1. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.block_tables import NO_BLOCK
from cupaged.engine.scheduling.request import Sequence, SequenceGroup


@dataclass(frozen=True)
class MemoryUse:
    """The use of memory at one step, in slots; a slot holds one token's keys and values.

    ``stored + reserved + internal + external + free`` is the whole memory.

    Args:
        stored: number of slots that hold a token; a shared slot counts once.
        reserved: number of slots allocated to a sequence that will store a token there later.
        internal: number of slots allocated to a sequence that will never store a token there (internal
            fragmentation).
        external: number of unallocated slots that the allocator cannot use (external fragmentation).
        free: number of the remaining slots.
        unshared: number of slots that the sequences would take without sharing.
    """

    stored: int
    reserved: int
    internal: int
    external: int
    free: int
    unshared: int

    @property
    def allocated(self) -> int:
        """Return the number of slots allocated to sequences."""
        return self.stored + self.reserved + self.internal

    @property
    def utilisation(self) -> float:
        """Return the share of the memory in use, waste included, that holds tokens; 1 if none is in use."""
        in_use = self.allocated + self.external
        return self.stored / in_use if in_use else 1.0

    @property
    def saved_by_sharing(self) -> float:
        """Return the share of the unshared memory that sharing saves (Figure 15)."""
        return 1 - self.allocated / self.unshared if self.unshared else 0.0


def memory_use(
    blocks: BlockManager,
    groups: Iterable[SequenceGroup],
    tokens_at_end: Callable[[SequenceGroup, Sequence], int],
    contiguous: bool = False,
) -> MemoryUse:
    """Return the use of every slot of the GPU's blocks.

    Args:
        groups: sequence groups that hold blocks. Blocks that only the prefix cache holds count as free.
        tokens_at_end: returns the number of tokens that a sequence will have stored when it ends: all but the
            last one. Only the author of a load knows it in advance.
        contiguous: whether blocks are allocated as contiguous ranges. Unallocated blocks then count as
            external fragmentation, which holds while a request waits for memory.
    """
    size = blocks.block_size
    stored: dict[int, int] = {}  # tokens by block
    at_end: dict[int, int] = {}
    references = 0
    for group in groups:
        for seq in group.live:
            if not blocks.holds(seq.seq_id):
                continue
            table, end = blocks.table(seq.seq_id), tokens_at_end(group, seq)
            references += len(table)
            for position, block in enumerate(table):
                if block == NO_BLOCK:
                    continue
                start = position * size
                stored[block] = max(stored.get(block, 0), min(size, seq.num_computed - start))
                at_end[block] = max(at_end.get(block, 0), min(size, end - start))
    stored_now = sum(stored.values())
    used_at_end = sum(max(stored[block], at_end[block]) for block in stored)
    allocated = size * len(stored)
    unallocated = size * blocks.gpu.num_blocks - allocated
    return MemoryUse(
        stored=stored_now,
        reserved=used_at_end - stored_now,
        internal=allocated - used_at_end,
        external=unallocated if contiguous else 0,
        free=0 if contiguous else unallocated,
        unshared=size * references,
    )
