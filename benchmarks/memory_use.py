"""What the KV cache's memory is used for, as in the paper's Figure 2 and its section 3.1. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.block_tables import NO_BLOCK
from cupaged.engine.scheduling.request import Sequence, SequenceGroup


@dataclass(frozen=True)
class MemoryUse:
    """The memory at one step, in slots; a slot holds one token's keys and values.

    ``stored + reserved + internal + external + free`` is all there is.

    Args:
        stored: hold a token. Sequences that share a slot count once.
        reserved: given to a sequence that will store a token there later.
        internal: given to a sequence that will never store a token there.
        external: in no sequence's blocks, and the allocator cannot give them away.
        free: the others.
        unshared: slots of the same sequences if each had blocks of its own.
    """

    stored: int
    reserved: int
    internal: int
    external: int
    free: int
    unshared: int

    @property
    def allocated(self) -> int:
        """Slots that are given to sequences."""
        return self.stored + self.reserved + self.internal

    @property
    def utilisation(self) -> float:
        """Share of the memory in use, waste included, that holds tokens; 1 where none is in use."""
        in_use = self.allocated + self.external
        return self.stored / in_use if in_use else 1.0

    @property
    def saved_by_sharing(self) -> float:
        """Share of the memory that the sequences would need without sharing and do not take (Figure 15)."""
        return 1 - self.allocated / self.unshared if self.unshared else 0.0


def memory_use(
    blocks: BlockManager,
    groups: Iterable[SequenceGroup],
    tokens_at_end: Callable[[SequenceGroup, Sequence], int],
    contiguous: bool = False,
) -> MemoryUse:
    """Account for every slot of the GPU's blocks.

    Args:
        groups: those that hold blocks. Blocks that only the prefix cache knows count as free.
        tokens_at_end: how many tokens of a sequence will be stored when it ends: all but the last one. Nobody
            knows it before then but who made the load.
        contiguous: blocks are given away in contiguous runs; what is in none counts as external waste, which
            it is while a request waits for memory. Single blocks are never lost to fragmentation.
    """
    size = blocks.block_size
    stored: dict[int, int] = {}  # by block
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
    holding = sum(stored.values())
    used = sum(max(stored[block], at_end[block]) for block in stored)
    allocated = size * len(stored)
    other = size * blocks.gpu.num_blocks - allocated
    return MemoryUse(
        stored=holding,
        reserved=used - holding,
        internal=allocated - used,
        external=other if contiguous else 0,
        free=0 if contiguous else other,
        unshared=size * references,
    )
