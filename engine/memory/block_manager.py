"""Manage the KV blocks of sequences: on-demand allocation, sharing, copy-on-write, swapping.

This follows "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023),
sections 4.2 to 4.5. A sequence's block table lists its blocks in order; all but the last are full, so a
sequence wastes less than one block. Blocks are reference-counted: forked sequences share them until one
writes. A full block can be found by the hash of its tokens and all before them (`prefix_hash.py`), whether
it is in use or not, until the pool needs its memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from .block_pool import BlockPool, KeyedBlocks, move, num_to_move
from .block_tables import NO_BLOCK, BlockTable, BlockTables

# What happened, the sequences that it happened to, and the blocks: (source, target) of copies and moves, or
# (block, block) of those that were found in the cache.
Note = tuple[str, list[int], list[tuple[int, int]]]


class BlockManager:
    """Manage the block tables of all sequences that hold memory, on the GPU or in the swap space.

    Callers check that there are enough free blocks (`num_new_blocks`, `find_prefix`, `can_swap_out`, which
    change nothing) before they call a method that takes some. Tokens that a step is planned to write count as
    written while the step is planned: call `confirm` when it has run and `revoke` when it has failed.

    Attributes:
        writable: sequence ID -> first position without a slot of the sequence's own. Tokens before it can be
            written without a call of `append`.
        journal: list that what happens to sequences is appended to (`Note`) while somebody watches; else
            None. The pools note what happens to blocks.
    """

    def __init__(self, num_gpu_blocks: int, num_cpu_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.gpu = BlockPool(num_gpu_blocks)
        self.cpu = BlockPool(num_cpu_blocks)
        self.writable: dict[int, int] = {}
        self._tables = BlockTables()  # of GPU blocks
        self._swapped: dict[int, BlockTable] = {}  # of CPU blocks; without rows
        self.journal: list[Note] | None = None

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def holds(self, seq_id: int) -> bool:
        """Return whether the sequence has blocks, on the GPU or in the swap space."""
        return seq_id in self._tables or seq_id in self._swapped

    def record(self, on: bool) -> None:
        """Start the journals of this object and of its pools afresh, or end them."""
        self.journal = [] if on else None
        self.gpu.journal = [] if on else None
        self.cpu.journal = [] if on else None

    def note(self, what: str, seq_ids: Iterable[int], blocks: Iterable[tuple[int, int]] = ()) -> None:
        """Note what happened to sequences, if somebody watches."""
        if self.journal is not None:
            self.journal.append((what, list(seq_ids), list(blocks)))

    def place(self, seq_id: int) -> tuple[str, Sequence[int]]:
        """Return the pool of the sequence's blocks, "gpu" or "cpu", and the blocks as a live view."""
        if seq_id in self._swapped:
            return "cpu", self._swapped[seq_id].blocks
        table = self._tables.get(seq_id)
        return "gpu", table.blocks if table else ()

    def table(self, seq_id: int) -> Sequence[int]:
        """Return the sequence's GPU blocks in order, `NO_BLOCK` for freed ones, as a live view."""
        return self._tables[seq_id].blocks

    def tables(self, seq_ids: Sequence[int]) -> np.ndarray:
        """Return the sequences' GPU blocks, int32 ``[N, max_blocks]``, undefined past a table's end."""
        return self._tables.gather(seq_ids)

    def num_distinct(self, seq_ids: Iterable[int]) -> int:
        """Return the number of distinct GPU blocks that these sequences hold."""
        return len({b for seq_id in seq_ids if seq_id in self._tables for b in self._tables[seq_id].held})

    # -- growing -------------------------------------------------------------------------------------

    def num_new_blocks(self, appends: Iterable[tuple[int, int, int]]) -> int:
        """Return the number of free blocks that appending takes, including copies of shared blocks.

        Args:
            appends: (sequence ID, number of tokens it holds, number of tokens to append) of each sequence.
                All sequences are on the GPU or all are in the swap space. For swapped ones the result holds
                after they are swapped in, provided that no other sequence shares their blocks.
        """
        total = 0
        shared: dict[int, int] = {}
        ref_counts = self.gpu.ref_counts
        for seq_id, held, num_tokens in appends:
            table = self._tables.get(seq_id)
            if table is None and seq_id in self._swapped:
                table, ref_counts = self._swapped[seq_id], self.cpu.ref_counts
            blocks = table.blocks if table else []
            total += max(0, -(-(held + num_tokens) // self.block_size) - len(blocks))
            first = held // self.block_size
            if first < len(blocks) and ref_counts[blocks[first]] > 1:
                shared[blocks[first]] = shared.get(blocks[first], 0) + 1
        # If every holder of a shared block writes to it, the last one keeps it without a copy.
        return total + sum(min(n, ref_counts[block] - 1) for block, n in shared.items())

    def append(
        self, seq_id: int, held: int, num_tokens: int, keys: Sequence[bytes] = ()
    ) -> tuple[int, int] | None:
        """Allocate slots for tokens ``held`` to ``held + num_tokens - 1`` of a sequence.

        Args:
            keys: content keys of the sequence's full blocks, including those that this call fills, or () to
                keep its blocks out of the prefix cache. The list may grow after the call.

        Returns:
            (source, destination) of the block to copy before the tokens are written, or None. A copy is
            needed if the first token falls into a block that is shared with another sequence.
        """
        table = self._tables.get(seq_id) or self._tables.add(seq_id, [])
        blocks = table.blocks
        copy = None
        first = held // self.block_size
        if first < len(blocks):
            source = blocks[first]
            if self.gpu.ref_counts[source] > 1:
                copy = (source, self.gpu.allocate())
                self.note("copy_on_write", [seq_id], [copy])
                self._tables.replace(table, first, copy[1])
                self.gpu.release(source)
            else:
                self.gpu.forget(source)  # its cached content is about to be overwritten
            table.num_keyed = min(table.num_keyed, first)
        for _ in range(self.blocks_for(held + num_tokens) - len(blocks)):
            self._tables.append(table, self.gpu.allocate())
        self.writable[seq_id] = len(blocks) * self.block_size
        table.keys = keys
        for i in range(table.num_keyed, min((held + num_tokens) // self.block_size, len(keys))):
            self.gpu.promise(blocks[i], keys[i])
            table.num_keyed = i + 1
        return copy

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Start the child's table with the blocks of the parent's first ``num_tokens`` tokens, shared."""
        parent = self._tables[parent_id]
        blocks = parent.blocks[: self.blocks_for(num_tokens)]
        for block in blocks[parent.num_freed :]:
            self.gpu.share(block)
        keyed = min(parent.num_keyed, num_tokens // self.block_size)
        self._tables.add(child_id, blocks, parent.keys[:keyed], keyed, min(parent.num_freed, len(blocks)))
        self.note("fork", [parent_id, child_id])
        self.writable[parent_id] = self.writable[child_id] = 0  # the next write must go through `append`

    def reserve(self, seq_id: int, blocks: list[int]) -> None:
        """Start a sequence's table with these empty blocks, all of them writable without `append`.

        This is for callers that choose the blocks themselves (`contiguous_memory.py`).
        """
        self.gpu.take(blocks)
        self._tables.add(seq_id, blocks)
        self.writable[seq_id] = len(blocks) * self.block_size

    def split(self, parent_id: int, child_id: int, count: int) -> None:
        """Move the last ``count`` blocks of the parent's table, which are unwritten, to a new sequence."""
        parent = self._tables[parent_id].blocks
        blocks = parent[-count:]
        del parent[-count:]
        self._tables.add(child_id, blocks)
        self.writable[parent_id] = len(parent) * self.block_size
        self.writable[child_id] = count * self.block_size

    def free_before(self, seq_id: int, position: int, keys: Sequence[bytes] = ()) -> None:
        """Free the blocks whose tokens all precede a position: later tokens do not attend to them.

        Their content stays in the prefix cache until its memory is needed.

        Args:
            keys: content keys of the sequence's full blocks, as in `append`.
        """
        table = self._tables[seq_id]
        end = position // self.block_size
        for i in range(table.num_freed, end):
            block = table.blocks[i]
            if table.num_keyed <= i < len(keys):
                self.gpu.register(block, keys[i])
            self._tables.replace(table, i, NO_BLOCK)
            self.gpu.release(block)
        table.num_freed = max(table.num_freed, end)
        table.num_keyed = max(table.num_keyed, end)

    def free(self, seq_id: int, held: int = 0, keys: Sequence[bytes] = ()) -> None:
        """Free the sequence's blocks on the GPU and in the swap space, if it has any.

        Args:
            held: number of tokens whose keys and values are in the blocks.
            keys: content keys of the full blocks, which stay cached until their memory is needed.
        """
        self.writable.pop(seq_id, None)
        if (table := self._tables.remove(seq_id)) is not None:
            for i in range(table.num_keyed, min(held // self.block_size, len(keys))):
                self.gpu.register(table.blocks[i], keys[i])
            for block in reversed(table.held):  # evict the end first: it is useless without the beginning
                self.gpu.release(block)
        if (table := self._swapped.pop(seq_id, None)) is not None:
            for block in reversed(table.held):
                self.cpu.release(block)

    # -- prefixes ------------------------------------------------------------------------------------

    def find_prefix(self, keys: Iterable[bytes]) -> tuple[list[int], int]:
        """Return the longest cached prefix of these keys.

        Returns:
            The blocks of the first keys, up to the first key that is not cached, and how many of the blocks
            are unused: taking those lowers the number of free blocks.
        """
        blocks = []
        num_unused = 0
        for key in keys:
            block = self.gpu.find(key)
            if block is None:
                break
            blocks.append(block)
            num_unused += self.gpu.ref_counts[block] == 0
        return blocks, num_unused

    def take_prefix(self, seq_id: int, keys: Sequence[bytes], blocks: list[int]) -> None:
        """Start a sequence's table with the blocks that `find_prefix` found for the first of its keys."""
        for block in blocks:
            self.gpu.share(block)
        self._tables.add(seq_id, blocks, keys, len(blocks))
        self.writable[seq_id] = 0
        self.note("prefix_hit", [seq_id], zip(blocks, blocks))

    def unify(self, seq_id: int) -> None:
        """Replace a sequence's blocks by the cached blocks with the same keys.

        Other sequences may have computed the same blocks at the same time. All blocks of the sequence must
        be full and written.
        """
        table = self._tables[seq_id]
        for position, (own, key) in enumerate(zip(table.blocks, table.keys)):
            cached = self.gpu.find(key)
            if cached is None:
                self.gpu.register(own, key)
            elif cached != own:
                self.gpu.share(cached)
                self._tables.replace(table, position, cached)
                self.gpu.release(own)

    def confirm(self) -> None:
        """Mark what the planned step was to write as written: the step has run."""
        self.gpu.confirm()
        self.cpu.confirm()

    def revoke(self) -> None:
        """Forget what the planned step was to write: the step has failed.

        The sequences keep the blocks and may still write them; `append` registers them again.
        """
        revoked = set(self.gpu.revoke())
        self.cpu.revoke()
        for table in map(self._tables.__getitem__, self._tables if revoked else ()):
            keyed = table.blocks[: table.num_keyed]
            table.num_keyed = next((i for i, block in enumerate(keyed) if block in revoked), len(keyed))

    # -- swapping ------------------------------------------------------------------------------------

    def can_swap_out(self, seq_ids: Iterable[int]) -> bool:
        """Return whether the swap space has room for the sequences' blocks."""
        lists = [self._keyed_blocks(self._tables[seq_id]) for seq_id in seq_ids if seq_id in self._tables]
        return num_to_move(lists, self.cpu) <= self.cpu.num_free

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks to the swap space; shared blocks stay shared there.

        Returns:
            (GPU block, CPU block) of the copies to make before the GPU blocks are written again. Content
            that the swap space already holds is not copied.
        """
        moving = [seq_id for seq_id in seq_ids if seq_id in self._tables]
        tables = [self._tables[seq_id] for seq_id in moving]
        moved, copies = move([self._keyed_blocks(table) for table in tables], self.gpu, self.cpu)
        for seq_id, table, held in zip(moving, tables, moved):
            self._tables.remove(seq_id)
            del self.writable[seq_id]
            blocks = [NO_BLOCK] * table.num_freed + held
            self._swapped[seq_id] = BlockTable(-1, blocks, table.keys, table.num_keyed, table.num_freed)
        self.note("swap_out", moving, copies)
        return copies

    def num_swapped_blocks(self, seq_ids: Iterable[int]) -> int:
        """Return the number of free GPU blocks that swapping these sequences in takes."""
        lists = [self._keyed_blocks(self._swapped[seq_id]) for seq_id in seq_ids if seq_id in self._swapped]
        return num_to_move(lists, self.gpu)

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks back to the GPU.

        Returns:
            (CPU block, GPU block) of the copies to make before the step that reads them. Content that is
            still, or again, on the GPU is not copied.
        """
        moving = [seq_id for seq_id in seq_ids if seq_id in self._swapped]
        tables = [self._swapped.pop(seq_id) for seq_id in moving]
        moved, copies = move([self._keyed_blocks(table) for table in tables], self.cpu, self.gpu)
        for seq_id, table, held in zip(moving, tables, moved):
            blocks = [NO_BLOCK] * table.num_freed + held
            self._tables.add(seq_id, blocks, table.keys, table.num_keyed, table.num_freed)
            self.writable[seq_id] = 0
        self.note("swap_in", moving, copies)
        return copies

    @staticmethod
    def _keyed_blocks(table: BlockTable) -> KeyedBlocks:
        return table.held, table.keys[table.num_freed : table.num_keyed]

    def check_integrity(self) -> None:
        """Check that the pools, the block tables and `writable` agree.

        Raises:
            RuntimeError: they do not.
        """
        self.gpu.check_integrity(Counter(b for s in self._tables for b in self._tables[s].held))
        self.cpu.check_integrity(Counter(b for table in self._swapped.values() for b in table.held))
        self._tables.check_integrity()
        if both := [seq_id for seq_id in self._tables if seq_id in self._swapped]:
            raise RuntimeError(f"sequences {sorted(both)} are on the GPU and swapped out")
        if sorted(self.writable) != sorted(self._tables):
            raise RuntimeError("sequences that may write and those with GPU blocks differ")
        for seq_id, end in self.writable.items():
            if end > len(self._tables[seq_id].blocks) * self.block_size:
                raise RuntimeError(f"sequence {seq_id} may write beyond its blocks")
