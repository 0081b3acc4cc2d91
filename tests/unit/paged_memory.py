"""What block tables mean, simulated: memory whose slots hold tokens, moved as a plan says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.layer_tables import LayerTables
from cupaged.engine.memory.prefix_hash import extend_keys, root_key

Pairs = Iterable[tuple[int, int]]
Slot = tuple[int, tuple[int, ...]]  # a layer group, and tokens


class PagedMemory:
    """A block has slots, which hold the tokens up to and including their own, as keys and values depend on
    all before them; that of a state has the tokens that it sums up in its first slot. A slot that is not
    there is poison: memory that nobody may read. ``salts`` are those of the keys of blocks."""

    def __init__(self, blocks: BlockManager, salts: Sequence[str | None] = (None,)) -> None:
        self._blocks = blocks
        self._salts = tuple(salts)
        self.gpu: list[dict[int, Slot]] = [{} for _ in range(blocks.gpu.num_blocks)]
        self.cpu: list[dict[int, Slot]] = [{} for _ in range(blocks.cpu.num_blocks)]

    def move(self, swap_out: Pairs = (), swap_in: Pairs = (), copies: Pairs = ()) -> None:
        for source, target in swap_out:
            self.cpu[target] = dict(self.gpu[source])
        for source, target in swap_in:
            self.gpu[target] = dict(self.cpu[source])
        for source, target in copies:
            self.gpu[target] = dict(self.gpu[source])

    def write(self, seq_id: int, start: int, tokens: Sequence[int]) -> None:
        """Store ``tokens[start:]`` at their places."""
        for index, tables in enumerate(self._blocks.layers):
            table, size = self._blocks.table(seq_id, index), tables.size
            if tables.rule.is_state:
                if start < len(tokens):
                    self._store(table[(len(tokens) - 1) // size], 0, (index, tuple(tokens)))
                continue
            for position in range(start, len(tokens)):
                block, offset = divmod(position, size)
                self._store(table[block], offset, (index, tuple(tokens[: position + 1])))

    def _store(self, block: int, offset: int, slot: Slot) -> None:
        slots = self.gpu[block]
        if any(index != slot[0] for index, _ in slots.values()):
            slots.clear()  # what was there has another shape
        slots[offset] = slot

    def poison(self, seq_id: int, start: int, end: int) -> None:
        """Store nothing where a step fails to; it leaves the states that it has read."""
        for index, tables in enumerate(self._blocks.layers):
            table, size = self._blocks.table(seq_id, index), tables.size
            if tables.rule.is_state:
                if start < end and start % size == 0:
                    self.gpu[table[start // size]].clear()
                continue
            for position in range(start, end):
                block, offset = divmod(position, size)
                self.gpu[table[block]].pop(offset, None)

    def poison_moved(self, swap_out: Pairs = (), swap_in: Pairs = (), copies: Pairs = ()) -> None:
        """Store nothing where moves fail to."""
        for _, target in swap_out:
            self.cpu[target].clear()
        for _, target in (*swap_in, *copies):
            self.gpu[target].clear()

    def check_states(self, seq_id: int, start: int, tokens: Sequence[int]) -> None:
        """A step that begins at a position reads the state after the tokens before it, and overwrites it."""
        for index, tables in enumerate(self._blocks.layers):
            if tables.rule.is_state and start:
                block = self._blocks.table(seq_id, index)[(start - 1) // tables.size]
                assert self.gpu[block].get(0) == (index, tuple(tokens[:start])), f"state of sequence {seq_id}"

    def check(self, seq_id: int, tokens: Sequence[int], position: int = 0) -> None:
        """Compare what the token at a position of the sequence, and those after it, would read with what it
        is."""
        for index, tables in enumerate(self._blocks.layers):
            table, size = self._blocks.table(seq_id, index), tables.size
            first = max(0, tables.rule.first_read(position))
            assert self._blocks.tables([seq_id], index)[0, : len(table)].tolist() == table
            if tables.rule.is_state:
                for block in range(first // size, -(-len(tokens) // size)):
                    wanted = index, tuple(tokens[: (block + 1) * size])
                    assert self.gpu[table[block]].get(0) == wanted, f"sequence {seq_id}, state {block}"
                continue
            for at in range(first, len(tokens)):
                found = self.gpu[table[at // size]].get(at % size)
                assert found == (index, tuple(tokens[: at + 1])), f"sequence {seq_id}, position {at}"

    def check_found(self) -> None:
        """Every block that can be found holds what its key says."""
        for memory, pool in ((self.gpu, self._blocks.gpu), (self.cpu, self._blocks.cpu)):
            for key, block in pool._block_of.items():
                assert memory[block], f"block {block} is found and holds poison"
                index = next(iter(memory[block].values()))[0]
                assert self._is_found_by(key, memory[block], index, self._blocks.layers[index]), (
                    f"block {block} has the key of another, or is not full"
                )

    def _is_found_by(self, key: bytes, slots: dict[int, Slot], index: int, tables: LayerTables) -> bool:
        last = 0 if tables.rule.is_state else tables.size - 1
        _, tokens = slots.get(last, (index, ()))
        end = len(tokens)
        if tables.rule.is_state:
            whole = end % tables.size == 0
        else:
            wanted = [(index, tokens[: end - last + i]) for i in range(tables.size)]
            whole = [slots.get(i) for i in range(tables.size)] == wanted
        suffix = bytes([index]) if index else b""
        keys = _keys_of(tokens, self._blocks.block_size, self._salts) if end else []
        return whole and key in [found + suffix for found in keys]

    def poison_empty(self) -> None:
        for memory, pool in ((self.gpu, self._blocks.gpu), (self.cpu, self._blocks.cpu)):
            for block in pool.empty_blocks():
                memory[block].clear()


@lru_cache(maxsize=100_000)
def _keys_of(tokens: tuple[int, ...], block_size: int, salts: tuple[str | None, ...]) -> list[bytes]:
    """Of the last block, with each of the salts."""
    found = []
    for salt in salts:
        keys: list[bytes] = []
        extend_keys(keys, root_key(salt), tokens, len(tokens), block_size)
        found.append(keys[-1])
    return found
