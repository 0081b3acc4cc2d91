"""Store the block tables of all sequences as rows of one array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

NO_BLOCK = 2**31 - 1  # replaces a freed block in a table; no pool has this index


@dataclass(slots=True)
class BlockTable:
    """Hold one sequence's blocks in order.

    Args:
        row: row in the array of `BlockTables`.
        blocks: block IDs, `NO_BLOCK` for the first ``num_freed`` ones.
        keys: content keys of the full blocks; the caller's list, which may grow.
        num_keyed: number of blocks, from the first, that are registered in the pool under their keys.
        num_freed: number of blocks, from the first, that were freed.
    """

    row: int
    blocks: list[int]
    keys: Sequence[bytes] = ()
    num_keyed: int = 0
    num_freed: int = 0

    @property
    def held(self) -> list[int]:
        """Return the blocks that were not freed."""
        return self.blocks[self.num_freed :] if self.num_freed else self.blocks


@dataclass(slots=True)
class BlockTables:
    """Map sequence IDs to block tables and mirror these in an int32 array ``[rows, blocks]``.

    A sequence keeps its row until it is removed, so a step writes only what changed and gathers the rows of
    its batch. The array grows as needed. Entries past a table's end are undefined.
    """

    _array: np.ndarray = field(default_factory=lambda: np.zeros((16, 16), dtype=np.int32))
    _tables: dict[int, BlockTable] = field(default_factory=dict)
    _free_rows: list[int] = field(default_factory=lambda: list(range(15, -1, -1)))

    def __len__(self) -> int:
        return len(self._tables)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tables)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._tables

    def __getitem__(self, seq_id: int) -> BlockTable:
        return self._tables[seq_id]

    def get(self, seq_id: int) -> BlockTable | None:
        return self._tables.get(seq_id)

    def add(
        self,
        seq_id: int,
        blocks: list[int],
        keys: Sequence[bytes] = (),
        num_keyed: int = 0,
        num_freed: int = 0,
    ) -> BlockTable:
        """Add a sequence's table, which takes ownership of the list ``blocks``."""
        if not self._free_rows:
            rows = len(self._array)
            self._array = np.concatenate([self._array, np.zeros_like(self._array)])
            self._free_rows = list(range(2 * rows - 1, rows - 1, -1))
        table = self._tables[seq_id] = BlockTable(self._free_rows.pop(), blocks, keys, num_keyed, num_freed)
        if blocks:
            self._widen(len(blocks))
            self._array[table.row, : len(blocks)] = blocks
        return table

    def append(self, table: BlockTable, block: int) -> None:
        position = len(table.blocks)
        if position == self._array.shape[1]:
            self._widen(position + 1)
        table.blocks.append(block)
        self._array[table.row, position] = block

    def replace(self, table: BlockTable, position: int, block: int) -> None:
        table.blocks[position] = block
        self._array[table.row, position] = block

    def remove(self, seq_id: int) -> BlockTable | None:
        table = self._tables.pop(seq_id, None)
        if table is not None:
            self._free_rows.append(table.row)
        return table

    def gather(self, seq_ids: Sequence[int]) -> np.ndarray:
        """Return a copy of the sequences' tables, int32 ``[N, max_blocks]``."""
        tables = [self._tables[seq_id] for seq_id in seq_ids]
        width = max(len(table.blocks) for table in tables)
        return self._array[[table.row for table in tables], :width]

    def check_integrity(self) -> None:
        """Check that the array matches the tables.

        Raises:
            RuntimeError: it does not.
        """
        rows = [table.row for table in self._tables.values()]
        if sorted(rows + self._free_rows) != list(range(len(self._array))):
            raise RuntimeError("a row of the block tables is lost, or belongs to two sequences")
        for seq_id, table in self._tables.items():
            if self._array[table.row, : len(table.blocks)].tolist() != table.blocks:
                raise RuntimeError(f"the row of sequence {seq_id} is not its block table")
            if [block == NO_BLOCK for block in table.blocks] != [
                position < table.num_freed for position in range(len(table.blocks))
            ]:
                raise RuntimeError(f"sequence {seq_id} has given back {table.num_freed} blocks, and others")

    def _widen(self, width: int) -> None:
        while width > self._array.shape[1]:
            self._array = np.concatenate([self._array, np.zeros_like(self._array)], axis=1)
