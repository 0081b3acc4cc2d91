"""Check that block tables and pools agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from .block_pool import BlockPool
from .layer_tables import LayerTables


def check_tables(
    layers: Sequence[LayerTables], gpu: BlockPool, cpu: BlockPool, writable: Mapping[int, int]
) -> None:
    """Check the tables of all layer groups; see `BlockManager.check_integrity`.

    Raises:
        RuntimeError: something is wrong.
    """
    gpu.check_integrity(Counter(block for tables in layers for block in tables.held_on_gpu()))
    cpu.check_integrity(Counter(block for tables in layers for block in tables.held_on_cpu()))
    first = layers[0]
    if both := [seq_id for seq_id in first.swapped if seq_id in first.on_gpu]:
        raise RuntimeError(f"sequences {sorted(both)} are on the GPU and swapped out")
    for tables in layers:
        name = tables.layer_group.name
        tables.on_gpu.check_integrity()
        if sorted(writable) != sorted(tables.on_gpu):
            raise RuntimeError(f"sequences that may write and those with GPU blocks differ ({name})")
        if sorted(tables.swapped) != sorted(first.swapped):
            raise RuntimeError(f"layer groups have swapped different sequences out ({name})")
        for seq_id, end in writable.items():
            if end > len(tables.on_gpu[seq_id].blocks) * tables.size:
                raise RuntimeError(f"sequence {seq_id} may write beyond its blocks ({name})")
    holders = Counter(block for tables in layers for block in set(tables.held_on_gpu()))
    if any(count > 1 for count in holders.values()):
        raise RuntimeError("two layer groups hold the same block")
