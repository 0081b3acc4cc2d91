"""Hold the block tables of one layer group: those of sequences on the GPU, and of those swapped out."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from .block_pool import BlockPool, KeyedBlocks
from .block_tables import NO_BLOCK, BlockTable, BlockTables
from .layer_groups import LayerGroup


class LayerTables:
    """Grow, share and shrink the block tables of one layer group; `BlockManager` does so for all of them.

    The content of a block is found by the key of its last tokens, which depends on all tokens before them,
    and by the group.

    Args:
        index: the group's place among all.
        block_size: number of tokens that a key stands for.
        gpu, cpu: the pools, which all groups share.
        max_step_tokens: maximum number of tokens that a sequence appends at once; None: any.

    Attributes:
        size: number of tokens of a block.
        most_blocks: maximum number of blocks that a sequence holds at once.
        on_gpu: the tables of GPU blocks.
        swapped: those of CPU blocks, which have no rows.
    """

    def __init__(
        self,
        layer_group: LayerGroup,
        index: int,
        block_size: int,
        gpu: BlockPool,
        cpu: BlockPool,
        max_step_tokens: int | None,
    ) -> None:
        self.layer_group, self.rule = layer_group, layer_group.rule
        self.size = block_size * layer_group.scale
        self.most_blocks = layer_group.most_blocks(block_size, max_step_tokens)
        self.on_gpu = BlockTables()
        self.swapped: dict[int, BlockTable] = {}
        self._gpu, self._cpu = gpu, cpu
        self._scale = layer_group.scale
        self._suffix = bytes([index]) if index else b""

    def keys_of(self, keys: Sequence[bytes], start: int, end: int) -> Sequence[bytes]:
        """Return the keys that the blocks ``start`` to ``end - 1`` are found by, as far as they have some.

        Args:
            keys: one for every ``block_size`` tokens.
        """
        if self._scale == 1 and not self._suffix:
            return keys[start:end]
        scale, suffix = self._scale, self._suffix
        return [key + suffix for key in keys[(start + 1) * scale - 1 : end * scale : scale]]

    def num_missing(self, table: BlockTable | None, held: int, num_tokens: int) -> int:
        """Return the number of blocks to add to a table before tokens are written, at most at once."""
        missing = -(-(held + num_tokens) // self.size) - (len(table.blocks) if table else 0)
        return min(max(0, missing), self.most_blocks)

    def num_held(self, num_tokens: int, num_shared: int, num_others: int, width: int) -> int:
        """Return the maximum number of blocks that sequences come to hold; see `BlockManager.num_held`."""
        shared = num_shared // self.size
        each = -(-num_tokens // self.size) - shared
        return min(shared - num_others // self.size + width * each, width * self.most_blocks)

    def num_to_take(self, num_tokens: int, num_found: int, num_unused: int, whole: bool) -> int:
        """Return the maximum number of free blocks that a sequence takes; see `BlockManager.num_to_take`."""
        count = -(-num_tokens // self.size) - num_found // self.size + num_unused
        return count if whole else min(count, self.most_blocks)

    def owned(self, seq_id: int) -> list[int]:
        """Return the blocks of a sequence that count as its own, on the GPU or in the swap space.

        Of shared ones a sequence that grows needs others, where it does not read all to its end.
        """
        table, pool = self.on_gpu.get(seq_id), self._gpu
        if table is None:
            table, pool = self.swapped.get(seq_id), self._cpu
        held = [] if table is None else table.held
        return held if self.rule.reach is None else [b for b in held if pool.ref_counts[b] == 1]

    # -- a sequence ----------------------------------------------------------------------------------

    def append(
        self, seq_id: int, held: int, num_tokens: int, keys: Sequence[bytes]
    ) -> tuple[tuple[int, int] | None, int]:
        """Allocate slots for tokens, and return the block to copy before, and how many tokens have slots.

        The arguments are those of `BlockManager.append`.
        """
        gpu, size = self._gpu, self.size
        table = self.on_gpu.get(seq_id) or self.on_gpu.add(seq_id, [])
        blocks = table.blocks
        copy = None
        first = held // size
        if first < len(blocks):
            source = blocks[first]
            if gpu.ref_counts[source] > 1:
                copy = (source, gpu.allocate())
                self.on_gpu.replace(table, first, copy[1])
                gpu.release(source)
            else:
                gpu.forget(source)  # its cached content is about to be overwritten
            table.num_keyed = min(table.num_keyed, first)
        for _ in range(-(-(held + num_tokens) // size) - len(blocks)):
            self.on_gpu.append(table, gpu.allocate())
        table.keys = keys
        if self.rule.is_state:
            if num_tokens > size - held % size:
                raise RuntimeError(f"a step of sequence {seq_id} goes past the end of a block of its state")
            end = held // size  # what this step leaves behind, others that are in it could not begin with
        else:
            end = (held + num_tokens) // size
        start = table.num_keyed
        if start < end:
            for i, key in enumerate(self.keys_of(keys, start, end), start):
                gpu.promise(blocks[i], key)
                table.num_keyed = i + 1
        return copy, len(blocks) * size

    def _register(self, table: BlockTable, held: int, keys: Sequence[bytes]) -> None:
        """Register the full blocks of a table's first tokens, which are written."""
        start, end = table.num_keyed, held // self.size
        if start < end:
            for i, key in enumerate(self.keys_of(keys, start, end), start):
                self._gpu.register(table.blocks[i], key)
                table.num_keyed = i + 1

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Start the child's table with the blocks of the parent's first tokens, shared."""
        parent = self.on_gpu[parent_id]
        blocks = parent.blocks[: -(-num_tokens // self.size)]
        for block in blocks[parent.num_freed :]:
            self._gpu.share(block)
        keyed = min(parent.num_keyed, num_tokens // self.size)
        keys = parent.keys[: keyed * self._scale]
        self.on_gpu.add(child_id, blocks, keys, keyed, min(parent.num_freed, len(blocks)))

    def free_unread(self, seq_id: int, position: int, keys: Sequence[bytes]) -> None:
        """Free the blocks that neither the token at a position nor one after it reads."""
        end = self.rule.first_read(position) // self.size
        table = self.on_gpu[seq_id]
        if end <= table.num_freed:
            return
        self._register(table, end * self.size, keys)
        for i in range(table.num_freed, end):
            block = table.blocks[i]
            self.on_gpu.replace(table, i, NO_BLOCK)
            self._gpu.release(block)
        table.num_freed = end
        table.num_keyed = max(table.num_keyed, end)

    def remove(self, seq_id: int, held: int, keys: Sequence[bytes]) -> BlockTable | None:
        """Remove and return a sequence's table of GPU blocks, whose references the caller has to drop."""
        table = self.on_gpu.remove(seq_id)
        if table is not None:
            self._register(table, held, keys)
        return table

    # -- prefixes ------------------------------------------------------------------------------------

    def cached_run(self, keys: Sequence[bytes]) -> tuple[list[int], int]:
        """Return the blocks of the longest cached prefix, and how many of them are unused."""
        blocks = []
        num_unused = 0
        for key in self.keys_of(keys, 0, len(keys)):
            block = self._gpu.find(key)
            if block is None:
                break
            blocks.append(block)
            num_unused += self._gpu.ref_counts[block] == 0
        return blocks, num_unused

    def num_unused(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks have no references."""
        ref_counts = self._gpu.ref_counts
        return sum(block != NO_BLOCK and ref_counts[block] == 0 for block in blocks)

    def num_keyed_tokens(self, keys: Sequence[bytes]) -> int:
        """Return the number of tokens of the full blocks that these keys are of."""
        return len(keys) // self._scale * self.size

    def limit(self, keys: Sequence[bytes], num_tokens: int, position: int) -> int | None:
        """Return a number of tokens that no prefix shorter than this one exceeds; None if this one is cached.

        Args:
            num_tokens: number of first tokens that are to be found, as far as they are read.
            position: the first token that is computed after them.
        """
        if self.rule.is_state and position < num_tokens:
            return num_tokens - 1  # the state after the tokens before it is another one
        first, end = max(0, self.rule.first_read(position)) // self.size, num_tokens // self.size
        wanted = self.keys_of(keys, first, end)
        for i in range(len(wanted) - 1, -1, -1):
            if self._gpu.find(wanted[i]) is None:
                return (first + i) * self.size  # a prefix that goes on after it reads this block as well
        return None

    def cached_blocks(self, keys: Sequence[bytes], num_tokens: int, position: int) -> list[int]:
        """Return the blocks of a prefix that is cached as far as it is read, `NO_BLOCK` for the others."""
        first, end = max(0, self.rule.first_read(position)) // self.size, num_tokens // self.size
        found = [self._gpu.find(key) for key in self.keys_of(keys, first, end)]
        return [NO_BLOCK] * (end - len(found)) + found  # type: ignore[operator]

    def take(self, seq_id: int, keys: Sequence[bytes], blocks: list[int]) -> None:
        """Start a sequence's table with cached blocks."""
        freed = 0
        while freed < len(blocks) and blocks[freed] == NO_BLOCK:
            freed += 1
        for block in blocks[freed:]:
            self._gpu.share(block)
        self.on_gpu.add(seq_id, blocks, keys, len(blocks), freed)

    def unify(self, seq_id: int) -> None:
        """Replace a sequence's blocks by the cached blocks with the same keys."""
        table = self.on_gpu[seq_id]
        start = table.num_freed
        keys = self.keys_of(table.keys, start, len(table.blocks))
        for position, (own, key) in enumerate(zip(table.blocks[start:], keys), start):
            cached = self._gpu.find(key)
            if cached is None:
                self._gpu.register(own, key)
            elif cached != own:
                self._gpu.share(cached)
                self.on_gpu.replace(table, position, cached)
                self._gpu.release(own)

    def forget(self, revoked: set[int]) -> None:
        """Note that blocks are not registered any more."""
        for table in map(self.on_gpu.__getitem__, self.on_gpu):
            keyed = table.blocks[: table.num_keyed]
            table.num_keyed = next((i for i, block in enumerate(keyed) if block in revoked), len(keyed))

    # -- swapping ------------------------------------------------------------------------------------

    def keyed_blocks(self, table: BlockTable) -> KeyedBlocks:
        """Return the blocks of a table and the keys of those that are registered."""
        keys: Sequence[Hashable] = self.keys_of(table.keys, table.num_freed, table.num_keyed)
        return table.held, keys

    def to_cpu(self, seq_id: int, table: BlockTable, held: list[int]) -> None:
        """Put CPU blocks in the place of a sequence's GPU blocks."""
        self.on_gpu.remove(seq_id)
        blocks = [NO_BLOCK] * table.num_freed + held
        self.swapped[seq_id] = BlockTable(-1, blocks, table.keys, table.num_keyed, table.num_freed)

    def to_gpu(self, seq_id: int, table: BlockTable, held: list[int]) -> None:
        """Put GPU blocks in the place of a sequence's CPU blocks."""
        del self.swapped[seq_id]
        blocks = [NO_BLOCK] * table.num_freed + held
        self.on_gpu.add(seq_id, blocks, table.keys, table.num_keyed, table.num_freed)

    def held_on_gpu(self) -> Iterator[int]:
        """Yield the GPU block of every reference."""
        for seq_id in self.on_gpu:
            yield from self.on_gpu[seq_id].held

    def held_on_cpu(self) -> Iterator[int]:
        """Yield the CPU block of every reference."""
        for table in self.swapped.values():
            yield from table.held
