"""What block tables mean, simulated: memory whose slots hold tokens, moved as a plan says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cupaged.engine.block_manager import BlockManager

Pairs = Iterable[tuple[int, int]]


class PagedMemory:
    """A slot holds the tokens up to and including its own, as keys and values depend on all before them, or
    None for poison: memory that nobody may read."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        size = blocks.block_size
        self.gpu: list[list] = [[None] * size for _ in range(blocks.gpu.num_blocks)]
        self.cpu: list[list] = [[None] * size for _ in range(blocks.cpu.num_blocks)]

    def move(self, swap_out: Pairs = (), swap_in: Pairs = (), copies: Pairs = ()) -> None:
        for source, target in swap_out:
            self.cpu[target] = list(self.gpu[source])
        for source, target in swap_in:
            self.gpu[target] = list(self.cpu[source])
        for source, target in copies:
            self.gpu[target] = list(self.gpu[source])

    def write(self, seq_id: int, start: int, tokens: Sequence[int]) -> None:
        """Store ``tokens[start:]`` at their places."""
        for position in range(start, len(tokens)):
            block, offset = divmod(position, self._blocks.block_size)
            self.gpu[self._blocks.table(seq_id)[block]][offset] = tuple(tokens[: position + 1])

    def check(self, seq_id: int, tokens: Sequence[int]) -> None:
        """Compare what the sequence would read with what it is."""
        table, size = self._blocks.table(seq_id), self._blocks.block_size
        for position in range(len(tokens)):
            found = self.gpu[table[position // size]][position % size]
            assert found == tuple(tokens[: position + 1]), f"sequence {seq_id}, position {position}"

    def poison_free(self) -> None:
        for memory, pool in ((self.gpu, self._blocks.gpu), (self.cpu, self._blocks.cpu)):
            for block in pool.empty_blocks():
                memory[block] = [None] * self._blocks.block_size
