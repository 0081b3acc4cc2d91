"""What block tables mean, simulated: memory whose slots hold tokens, moved as a plan says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.prefix_hash import extend_keys, root_key

Pairs = Iterable[tuple[int, int]]


class PagedMemory:
    """A slot holds the tokens up to and including its own, as keys and values depend on all before them, or
    None for poison: memory that nobody may read. ``salts`` are those of the keys of blocks."""

    def __init__(self, blocks: BlockManager, salts: Sequence[str | None] = (None,)) -> None:
        self._blocks = blocks
        self._salts = tuple(salts)
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

    def check(self, seq_id: int, tokens: Sequence[int], first: int = 0) -> None:
        """Compare what the sequence would read, from position ``first`` on, with what it is."""
        table, size = self._blocks.table(seq_id), self._blocks.block_size
        for position in range(max(0, first), len(tokens)):
            found = self.gpu[table[position // size]][position % size]
            assert found == tuple(tokens[: position + 1]), f"sequence {seq_id}, position {position}"
        assert self._blocks.tables([seq_id])[0, : len(table)].tolist() == table

    def check_found(self) -> None:
        """Every block that can be found holds what its key says."""
        size = self._blocks.block_size
        for memory, pool in ((self.gpu, self._blocks.gpu), (self.cpu, self._blocks.cpu)):
            for key, block in pool._block_of.items():
                tokens = memory[block][-1]
                assert tokens is not None, f"block {block} is found and holds poison"
                assert memory[block] == [tokens[: len(tokens) - size + i] for i in range(1, size + 1)]
                assert key in _keys_of(tokens, size, self._salts), f"block {block} has the key of another"

    def poison_empty(self) -> None:
        for memory, pool in ((self.gpu, self._blocks.gpu), (self.cpu, self._blocks.cpu)):
            for block in pool.empty_blocks():
                memory[block] = [None] * self._blocks.block_size


@lru_cache(maxsize=100_000)
def _keys_of(tokens: tuple[int, ...], block_size: int, salts: tuple[str | None, ...]) -> list[bytes]:
    """Of the last block, with each of the salts."""
    found = []
    for salt in salts:
        keys: list[bytes] = []
        extend_keys(keys, root_key(salt), tokens, len(tokens), block_size)
        found.append(keys[-1])
    return found
