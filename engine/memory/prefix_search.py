"""Find the longest cached prefix of which every layer group has what later tokens read."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

from .layer_tables import LayerTables


class Prefix(NamedTuple):
    """Hold what the cache has of the first tokens of a sequence.

    Args:
        tables: blocks by layer group, `NO_BLOCK` for those that no later token reads.
        unused: number of the blocks that are unused, by layer group: taking those lowers the number of free
            blocks.
        num_tokens: number of tokens.
    """

    tables: list[list[int]]
    unused: list[int]
    num_tokens: int


NO_PREFIX = Prefix([], [], 0)


def longest_prefix(
    layers: Sequence[LayerTables], keys: Sequence[bytes], num_tokens: int | None, whole: bool
) -> Prefix:
    """Return the longest prefix of these keys that can be used; see `BlockManager.find_prefix`."""
    runs = {tables: tables.cached_run(keys)[0] for tables in layers if whole or tables.rule.reach is None}
    bounded = [tables for tables in layers if tables not in runs]
    unit = lcm(*(tables.size for tables in layers))
    most = min(
        (len(run) * tables.size for tables, run in runs.items()),
        default=max(tables.num_keyed_tokens(keys) for tables in layers),
    )
    most = most // unit * unit
    while most:
        first_computed = most if num_tokens is None else min(most, num_tokens - 1)
        limits = (tables.limit(keys, most, first_computed) for tables in bounded)
        limit = next((limit for limit in limits if limit is not None), None)
        if limit is None:
            break
        most = limit // unit * unit
    first_computed = most if num_tokens is None else min(most, num_tokens - 1)
    found = [
        runs[tables][: most // tables.size]
        if tables in runs
        else tables.cached_blocks(keys, most, first_computed)
        for tables in layers
    ]
    return Prefix(found, [tables.num_unused(blocks) for tables, blocks in zip(layers, found)], most)
