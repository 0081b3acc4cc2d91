"""Which block holds which tokens: on-demand allocation, sharing, copy-on-write, swap space. No torch.

After "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023), sections
4.2 to 4.5. A sequence's table lists its blocks in order; all but the last are full, so a sequence wastes less
than one block. Blocks are counted references: forked sequences share them until one writes. Full blocks are
found again by the hash of their tokens and all before them (`prefix_hash.py`), used or not, until the pool
needs their memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from .block_pool import BlockPool, Run, move, num_to_move
from .block_tables import NO_BLOCK, BlockTable, BlockTables


class BlockManager:
    """Block tables of all sequences that hold memory, on the GPU or in the swap space.

    Queries (`num_new_blocks`, `find_prefix`, `can_swap_out`) change nothing; the mutations expect that they
    were asked. What a step plans to write counts as written within that step: `confirm` says that it ran,
    `revoke` that it did not.

    Attributes:
        writable: by sequence id, the first position that has no slot of its own yet: up to there tokens are
            written without asking (`append`).
    """

    def __init__(self, num_gpu_blocks: int, num_cpu_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.gpu = BlockPool(num_gpu_blocks)
        self.cpu = BlockPool(num_cpu_blocks)
        self.writable: dict[int, int] = {}
        self._tables = BlockTables()  # of GPU blocks
        self._swapped: dict[int, BlockTable] = {}  # of CPU blocks; without rows

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def holds(self, seq_id: int) -> bool:
        """Whether the sequence has blocks, on the GPU or in the swap space."""
        return seq_id in self._tables or seq_id in self._swapped

    def table(self, seq_id: int) -> Sequence[int]:
        """The sequence's GPU blocks in order, `NO_BLOCK` for those given back; a view that appends change."""
        return self._tables[seq_id].blocks

    def tables(self, seq_ids: Sequence[int]) -> np.ndarray:
        """The sequences' GPU blocks, int32 ``[N, most blocks of one]``; past a table's end anything."""
        return self._tables.gather(seq_ids)

    def num_distinct(self, seq_ids: Iterable[int]) -> int:
        """GPU blocks that these sequences hold together."""
        return len({b for seq_id in seq_ids if seq_id in self._tables for b in self._tables[seq_id].held})

    # -- growing -------------------------------------------------------------------------------------

    def num_new_blocks(self, appends: Iterable[tuple[int, int, int]]) -> int:
        """Blocks that appending to these sequences takes from the pool, copies of shared blocks included.

        Args:
            appends: (sequence id, tokens it holds, tokens to append) of each; all on the GPU or all in the
                swap space (then: what it will take once they are back, if nobody else shares their blocks).
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
        # The last of a block's writers keeps it, if all its holders are among them.
        return total + sum(min(n, ref_counts[block] - 1) for block, n in shared.items())

    def append(
        self, seq_id: int, held: int, num_tokens: int, keys: Sequence[bytes] = ()
    ) -> tuple[int, int] | None:
        """Make room for tokens ``held`` to ``held + num_tokens - 1`` of a sequence.

        Args:
            keys: of the sequence's full blocks, those that this fills included; () to have none found. It may
                be a list that grows.

        Returns:
            (source, destination) of the block to copy before they are written, if the first of them falls
            into a block that another sequence shares.
        """
        table = self._tables.get(seq_id) or self._tables.add(seq_id, [])
        blocks = table.blocks
        copy = None
        first = held // self.block_size
        if first < len(blocks):
            source = blocks[first]
            if self.gpu.ref_counts[source] > 1:
                copy = (source, self.gpu.allocate())
                self._tables.replace(table, first, copy[1])
                self.gpu.release(source)
            else:
                self.gpu.forget(source)  # it was full of what is now overwritten
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
        """Give the child the parent's first ``num_tokens`` tokens: it shares the blocks that hold them."""
        parent = self._tables[parent_id]
        blocks = parent.blocks[: self.blocks_for(num_tokens)]
        for block in blocks[parent.num_freed :]:
            self.gpu.share(block)
        keyed = min(parent.num_keyed, num_tokens // self.block_size)
        self._tables.add(child_id, blocks, parent.keys[:keyed], keyed, min(parent.num_freed, len(blocks)))
        self.writable[parent_id] = self.writable[child_id] = 0  # whoever writes first has to ask

    def reserve(self, seq_id: int, blocks: list[int]) -> None:
        """Start a sequence's table with these blocks, which are empty: it writes there without asking. For
        who keeps account of the pool himself."""
        self.gpu.take(blocks)
        self._tables.add(seq_id, blocks)
        self.writable[seq_id] = len(blocks) * self.block_size

    def split(self, parent_id: int, child_id: int, count: int) -> None:
        """Give the last blocks of the parent's table to a new sequence; the parent has written nothing
        there."""
        parent = self._tables[parent_id].blocks
        blocks = parent[-count:]
        del parent[-count:]
        self._tables.add(child_id, blocks)
        self.writable[parent_id] = len(parent) * self.block_size
        self.writable[child_id] = count * self.block_size

    def free_before(self, seq_id: int, position: int, keys: Sequence[bytes] = ()) -> None:
        """Give back the blocks whose tokens all stand before a position, as no token to come sees them.

        They can be found until their memory is needed.

        Args:
            keys: of the sequence's full blocks, as of `append`.
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
        """Drop the sequence's blocks, wherever they are. A sequence without any is no error.

        Args:
            held, keys: tokens whose keys and values are in the blocks, and the keys of the full ones: those
                can be found until their memory is needed.
        """
        self.writable.pop(seq_id, None)
        if (table := self._tables.remove(seq_id)) is not None:
            for i in range(table.num_keyed, min(held // self.block_size, len(keys))):
                self.gpu.register(table.blocks[i], keys[i])
            for block in reversed(table.held):  # the end is of no use without the beginning: it goes first
                self.gpu.release(block)
        if (table := self._swapped.pop(seq_id, None)) is not None:
            for block in reversed(table.held):
                self.cpu.release(block)

    # -- prefixes ------------------------------------------------------------------------------------

    def find_prefix(self, keys: Iterable[bytes]) -> tuple[list[int], int]:
        """The first blocks with these keys, as far as there are any, and how many of them nobody uses, so
        that taking them takes free blocks."""
        found = []
        unused = 0
        for key in keys:
            block = self.gpu.find(key)
            if block is None:
                break
            found.append(block)
            unused += self.gpu.ref_counts[block] == 0
        return found, unused

    def take_prefix(self, seq_id: int, keys: Sequence[bytes], blocks: list[int]) -> None:
        """Start a sequence's table with the blocks that `find_prefix` found for the first of its keys."""
        for block in blocks:
            self.gpu.share(block)
        self._tables.add(seq_id, blocks, keys, len(blocks))
        self.writable[seq_id] = 0

    def unify(self, seq_id: int) -> None:
        """Hold, of all blocks with the sequence's keys, those that are found: others may have computed the
        same at the same time. All of the sequence's blocks are full, and written."""
        table = self._tables[seq_id]
        for position, (own, key) in enumerate(zip(table.blocks, table.keys)):
            found = self.gpu.find(key)
            if found is None:
                self.gpu.register(own, key)
            elif found != own:
                self.gpu.share(found)
                self._tables.replace(table, position, found)
                self.gpu.release(own)

    def confirm(self) -> None:
        """The step that was planned has run."""
        self.gpu.confirm()
        self.cpu.confirm()

    def revoke(self) -> None:
        """The step that was planned has failed: nothing may find what it was to write.

        Whoever holds the blocks may write them yet; what is full then is found again.
        """
        revoked = set(self.gpu.revoke())
        self.cpu.revoke()
        for table in map(self._tables.__getitem__, self._tables if revoked else ()):
            keyed = table.blocks[: table.num_keyed]
            table.num_keyed = next((i for i, block in enumerate(keyed) if block in revoked), len(keyed))

    # -- swapping ------------------------------------------------------------------------------------

    def can_swap_out(self, seq_ids: Iterable[int]) -> bool:
        runs = [self._run(self._tables[seq_id]) for seq_id in seq_ids if seq_id in self._tables]
        return num_to_move(runs, self.cpu) <= self.cpu.num_free

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks to the swap space; what is shared stays shared there.

        Returns:
            (GPU block, CPU block) of the copies to make before the GPU blocks are written again; none for
            content that the swap space holds.
        """
        moving = [seq_id for seq_id in seq_ids if seq_id in self._tables]
        tables = [self._tables[seq_id] for seq_id in moving]
        new, copies = move([self._run(table) for table in tables], self.gpu, self.cpu)
        for seq_id, table, blocks in zip(moving, tables, new):
            self._tables.remove(seq_id)
            del self.writable[seq_id]
            places = [NO_BLOCK] * table.num_freed + blocks
            self._swapped[seq_id] = BlockTable(-1, places, table.keys, table.num_keyed, table.num_freed)
        return copies

    def num_swapped_blocks(self, seq_ids: Iterable[int]) -> int:
        """Free GPU blocks that swapping these sequences in takes."""
        runs = [self._run(self._swapped[seq_id]) for seq_id in seq_ids if seq_id in self._swapped]
        return num_to_move(runs, self.gpu)

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks back.

        Returns:
            (CPU block, GPU block) of the copies to make before the step that reads them; none for content
            that is still, or again, on the GPU.
        """
        moving = [seq_id for seq_id in seq_ids if seq_id in self._swapped]
        tables = [self._swapped.pop(seq_id) for seq_id in moving]
        new, copies = move([self._run(table) for table in tables], self.cpu, self.gpu)
        for seq_id, table, blocks in zip(moving, tables, new):
            places = [NO_BLOCK] * table.num_freed + blocks
            self._tables.add(seq_id, places, table.keys, table.num_keyed, table.num_freed)
            self.writable[seq_id] = 0
        return copies

    @staticmethod
    def _run(table: BlockTable) -> Run:
        return table.held, table.keys[table.num_freed : table.num_keyed]

    def check_integrity(self) -> None:
        """Every block is empty, cached, or named by tables exactly as often as it counts references, and what
        a sequence may write without asking is its own.

        Raises:
            RuntimeError: it is not so.
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
