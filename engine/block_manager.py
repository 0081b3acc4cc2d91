"""Which block holds which tokens: on-demand allocation, sharing, copy-on-write, swap space. No torch.

After "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023), sections
4.2 to 4.5. A sequence's table lists its blocks in order; all but the last are full, so a sequence wastes less
than one block. Blocks are counted references: forked sequences share them until one writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Ids of equal blocks with reference counts. It knows nothing of what a block holds."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm in caches

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take a free block with one reference. The caller has seen that there is one."""
        block = self._free.pop()
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Drop one reference; the last one frees the block."""
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self._free.append(block)

    def check_integrity(self, references: Counter[int]) -> None:
        """Compare with the references that exist outside.

        Raises:
            RuntimeError: a block is lost, in two places, or counted wrongly.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a block is in the free list twice")
        for block, count in enumerate(self.ref_counts):
            if count != references[block]:
                raise RuntimeError(f"block {block} counts {count} references, {references[block]} exist")
            if (count == 0) != (block in free):
                raise RuntimeError(f"block {block} has {count} references and is free: {block in free}")


class BlockManager:
    """Block tables of all sequences that hold memory, on the GPU or in the swap space.

    Queries (`num_new_blocks`, `can_swap_out`) change nothing; the mutations expect that they were asked.
    """

    def __init__(self, num_gpu_blocks: int, num_cpu_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.gpu = BlockPool(num_gpu_blocks)
        self.cpu = BlockPool(num_cpu_blocks)
        self._tables: dict[int, list[int]] = {}  # sequence id -> GPU blocks
        self._swapped: dict[int, list[int]] = {}  # sequence id -> CPU blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def holds(self, seq_id: int) -> bool:
        """Whether the sequence has blocks, on the GPU or in the swap space."""
        return seq_id in self._tables or seq_id in self._swapped

    def table(self, seq_id: int) -> Sequence[int]:
        """The sequence's GPU blocks in order; a view that later appends change."""
        return self._tables[seq_id]

    def num_new_blocks(self, appends: Iterable[tuple[int, int, int]]) -> int:
        """Blocks that appending to these sequences takes from the pool, copies of shared blocks included.

        Args:
            appends: (sequence id, tokens it holds, tokens to append) of each; all on the GPU or all in the
                swap space (then: what it will take once they are back).
        """
        total = 0
        shared: Counter[int] = Counter()
        ref_counts = self.gpu.ref_counts
        for seq_id, held, num_tokens in appends:
            table = self._tables.get(seq_id)
            if table is None:
                table = self._swapped.get(seq_id, [])
                ref_counts = self.cpu.ref_counts if table else ref_counts
            total += -(-(held + num_tokens) // self.block_size) - len(table)
            first = held // self.block_size
            if first < len(table) and ref_counts[table[first]] > 1:
                shared[table[first]] += 1
        # The last of a block's writers keeps it, if all its holders are among them.
        return total + sum(min(n, ref_counts[block] - 1) for block, n in shared.items())

    def append(self, seq_id: int, held: int, num_tokens: int) -> tuple[int, int] | None:
        """Make room for tokens ``held`` to ``held + num_tokens - 1`` of a sequence.

        Returns:
            (source, destination) of the block to copy before they are written, if the first of them falls
            into a block that another sequence shares.
        """
        table = self._tables.setdefault(seq_id, [])
        copy = None
        first = held // self.block_size
        if first < len(table) and self.gpu.ref_counts[table[first]] > 1:
            source = table[first]
            table[first] = self.gpu.allocate()
            self.gpu.release(source)
            copy = (source, table[first])
        for _ in range(self.blocks_for(held + num_tokens) - len(table)):
            table.append(self.gpu.allocate())
        return copy

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Give the child the parent's first ``num_tokens`` tokens: it shares the blocks that hold them."""
        blocks = self._tables[parent_id][: self.blocks_for(num_tokens)]
        for block in blocks:
            self.gpu.share(block)
        self._tables[child_id] = blocks

    def free(self, seq_id: int) -> None:
        """Drop the sequence's blocks, wherever they are. A sequence without any is no error."""
        for block in self._tables.pop(seq_id, ()):
            self.gpu.release(block)
        for block in self._swapped.pop(seq_id, ()):
            self.cpu.release(block)

    def can_swap_out(self, seq_ids: Iterable[int]) -> bool:
        return len(self._distinct(self._tables, seq_ids)) <= self.cpu.num_free

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks to the swap space; sharing among them is kept.

        Returns:
            (GPU block, CPU block) of the copies to make before the GPU blocks are written again.
        """
        return self._move(seq_ids, self._tables, self.gpu, self._swapped, self.cpu)

    def num_swapped_blocks(self, seq_ids: Iterable[int]) -> int:
        """GPU blocks that swapping these sequences in takes."""
        return len(self._distinct(self._swapped, seq_ids))

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks back.

        Returns:
            (CPU block, GPU block) of the copies to make before the step that reads them.
        """
        return self._move(seq_ids, self._swapped, self.cpu, self._tables, self.gpu)

    def check_integrity(self) -> None:
        """Every block is free or named by tables exactly as often as it counts references.

        Raises:
            RuntimeError: it is not so.
        """
        self.gpu.check_integrity(Counter(b for table in self._tables.values() for b in table))
        self.cpu.check_integrity(Counter(b for table in self._swapped.values() for b in table))
        if both := self._tables.keys() & self._swapped.keys():
            raise RuntimeError(f"sequences {sorted(both)} are on the GPU and swapped out")

    @staticmethod
    def _distinct(tables: dict[int, list[int]], seq_ids: Iterable[int]) -> set[int]:
        return {block for seq_id in seq_ids for block in tables.get(seq_id, ())}

    @staticmethod
    def _move(
        seq_ids: Iterable[int],
        tables: dict[int, list[int]],
        pool: BlockPool,
        new_tables: dict[int, list[int]],
        new_pool: BlockPool,
    ) -> list[tuple[int, int]]:
        moved: dict[int, int] = {}
        for seq_id in seq_ids:
            if seq_id not in tables:
                continue
            new_table = []
            for block in tables.pop(seq_id):
                if block in moved:
                    new_pool.share(moved[block])
                else:
                    moved[block] = new_pool.allocate()
                new_table.append(moved[block])
                pool.release(block)
            new_tables[seq_id] = new_table
        return list(moved.items())
