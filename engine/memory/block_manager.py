"""Manage the KV blocks of sequences: on-demand allocation, sharing, copy-on-write, swapping.

This follows "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023),
sections 4.2 to 4.5. A sequence's block table lists its blocks in order; all but the last are full, so a
sequence wastes less than one block. Blocks are reference-counted: forked sequences share them until one
writes. A full block can be found by the hash of its tokens and all before them (`prefix_hash.py`), whether
it is in use or not, until the pool needs its memory.

Layers that keep something else of a token, or for other tokens, are other layer groups (`layer_groups.py`).
A sequence has a block table for each; what is said of its blocks holds for those of every group. All groups
draw from one pool (Jenga, SOSP 2025).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from math import lcm

import numpy as np

from .block_pool import BlockPool, move, num_to_move
from .block_tables import NO_BLOCK, BlockTable
from .eviction import MakePolicy, make_policies
from .integrity import check_tables
from .layer_groups import ONE_GROUP, LayerGroup, check_layer_groups
from .layer_tables import LayerTables
from .prefix_search import Prefix, longest_prefix

# What happened, the sequences that it happened to, and the blocks: (source, target) of copies and moves, or
# (block, block) of those that were found in the cache.
Note = tuple[str, list[int], list[tuple[int, int]]]


class BlockManager:
    """Manage the block tables of all sequences that hold memory, on the GPU or in the swap space.

    Callers check that there are enough free blocks (`num_new_blocks`, `find_prefix`, `can_swap_out`, which
    change nothing) before they call a method that takes some. Tokens that a step is planned to write count as
    written while the step is planned: call `confirm` when it has run and `revoke` when it has failed.

    Args:
        block_size: number of tokens that a content key stands for, and of a block, unless its layer group has
            another ``scale``.
        eviction_policy: name of an eviction policy, or what makes one for each pool.
        layer_groups: the layers by their memory.
        max_step_tokens: maximum number of tokens of an `append`; None: any.

    Attributes:
        layers: the block tables of each layer group.
        block_sizes: number of tokens of a block of each layer group.
        frees_unread: there are layers in which blocks of a growing sequence become free.
        has_states: there are layers that keep a state instead of something of each token.
        prefix_size: number of tokens of which all prefixes that are found have a multiple.
        writable: sequence ID -> first position without a slot of the sequence's own. Tokens before it can be
            written without a call of `append`.
        journal: list that what happens to sequences is appended to (`Note`) while somebody watches; else
            None. The pools note what happens to blocks.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        num_cpu_blocks: int,
        block_size: int,
        eviction_policy: str | MakePolicy = "lru",
        layer_groups: Sequence[LayerGroup] = ONE_GROUP,
        max_step_tokens: int | None = None,
    ) -> None:
        check_layer_groups(layer_groups)
        self.block_size = block_size
        gpu_policy, cpu_policy = make_policies(eviction_policy)
        self.gpu = BlockPool(num_gpu_blocks, gpu_policy)
        self.cpu = BlockPool(num_cpu_blocks, cpu_policy)
        self.layers = tuple(
            LayerTables(layer_group, index, block_size, self.gpu, self.cpu, max_step_tokens)
            for index, layer_group in enumerate(layer_groups)
        )
        self._first = self.layers[0]
        self._bounded = tuple(tables for tables in self.layers if tables.rule.reach is not None)
        self._states = tuple(tables for tables in self.layers if tables.rule.is_state)
        self.frees_unread, self.has_states = bool(self._bounded), bool(self._states)
        self.block_sizes = tuple(tables.size for tables in self.layers)
        self.prefix_size = lcm(*self.block_sizes)
        self.writable: dict[int, int] = {}
        self.journal: list[Note] | None = None

    def longest_append(self, held: int) -> int:
        """Return the maximum number of tokens to append to so many: states are kept at the ends of blocks."""
        return min((tables.size - held % tables.size for tables in self._states), default=sys.maxsize)

    def num_held(self, num_tokens: int, num_shared: int = 0, num_others: int = 0, width: int = 1) -> int:
        """Return the maximum number of blocks that sequences come to hold.

        Args:
            num_tokens: number of tokens of each.
            num_shared: number of first tokens whose full blocks they share.
            num_others: number of those whose full blocks do not count, as they are counted elsewhere.
            width: number of sequences.
        """
        total = 0
        for tables in self.layers:
            total += tables.num_held(num_tokens, num_shared, num_others, width)
        return total

    def num_to_take(self, num_tokens: int, found: Prefix, whole: bool = False) -> int:
        """Return the maximum number of free blocks that a sequence takes at once.

        Args:
            num_tokens: number of its tokens.
            found: what `find_prefix` found, with which it begins.
            whole: it keeps blocks that no later token reads.
        """
        total = 0
        for index, tables in enumerate(self.layers):
            unused = found.unused[index] if found.num_tokens else 0
            total += tables.num_to_take(num_tokens, found.num_tokens, unused, whole)
        return total

    def holds(self, seq_id: int) -> bool:
        """Return whether the sequence has blocks, on the GPU or in the swap space."""
        return seq_id in self._first.on_gpu or seq_id in self._first.swapped

    def record(self, on: bool) -> None:
        """Start the journals of this object and of its pools afresh, or end them."""
        self.journal = [] if on else None
        self.gpu.journal = [] if on else None
        self.cpu.journal = [] if on else None

    def note(self, what: str, seq_ids: Iterable[int], blocks: Iterable[tuple[int, int]] = ()) -> None:
        """Note what happened to sequences, if somebody watches."""
        if self.journal is not None:
            self.journal.append((what, list(seq_ids), list(blocks)))

    def place(self, seq_id: int, layer_group: int = 0) -> tuple[str, Sequence[int]]:
        """Return the pool of the sequence's blocks, "gpu" or "cpu", and the blocks as a live view."""
        tables = self.layers[layer_group]
        if seq_id in tables.swapped:
            return "cpu", tables.swapped[seq_id].blocks
        table = tables.on_gpu.get(seq_id)
        return "gpu", table.blocks if table else ()

    def table(self, seq_id: int, layer_group: int = 0) -> Sequence[int]:
        """Return the sequence's GPU blocks in order, `NO_BLOCK` for freed ones, as a live view."""
        return self.layers[layer_group].on_gpu[seq_id].blocks

    def tables(self, seq_ids: Sequence[int], layer_group: int = 0) -> np.ndarray:
        """Return the sequences' GPU blocks, int32 ``[N, max_blocks]``, undefined past a table's end."""
        return self.layers[layer_group].on_gpu.gather(seq_ids)

    def num_distinct(self, seq_ids: Iterable[int], layer_group: int | None = None) -> int:
        """Return the number of distinct GPU blocks that these sequences hold, in one layer group or all."""
        chosen = self.layers if layer_group is None else (self.layers[layer_group],)
        held: set[int] = set()
        for seq_id in seq_ids:
            for tables in chosen:
                if (table := tables.on_gpu.get(seq_id)) is not None:
                    held.update(table.held)
        return len(held)

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
            for tables in self.layers:
                table = tables.on_gpu.get(seq_id)
                if table is None and seq_id in tables.swapped:
                    table, ref_counts = tables.swapped[seq_id], self.cpu.ref_counts
                total += tables.num_missing(table, held, num_tokens)
                first = held // tables.size
                if table is not None and first < len(table.blocks):
                    block = table.blocks[first]
                    if ref_counts[block] > 1:
                        shared[block] = shared.get(block, 0) + 1
        # If every holder of a shared block writes to it, the last one keeps it without a copy.
        return total + sum(min(n, ref_counts[block] - 1) for block, n in shared.items())

    def append(
        self, seq_id: int, held: int, num_tokens: int, keys: Sequence[bytes] = ()
    ) -> list[tuple[int, int]]:
        """Allocate slots for tokens ``held`` to ``held + num_tokens - 1`` of a sequence.

        Args:
            keys: content keys of the sequence's full blocks, including those that this call fills, or () to
                keep its blocks out of the prefix cache. The list may grow after the call.

        Returns:
            (source, destination) of the blocks to copy before the tokens are written, at most one for each
            layer group: if the first token falls into a block that is shared with another sequence.
        """
        copies = []
        writable = sys.maxsize
        for tables in self.layers:
            copy, end = tables.append(seq_id, held, num_tokens, keys)
            if copy is not None:
                copies.append(copy)
                self.note("copy_on_write", [seq_id], [copy])
            if end < writable:
                writable = end
        self.writable[seq_id] = writable
        return copies

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Start the child's table with the blocks of the parent's first ``num_tokens`` tokens, shared.

        With states these are all tokens that the parent has, or those to the end of a block.
        """
        for tables in self.layers:
            tables.fork(parent_id, child_id, num_tokens)
        self.note("fork", [parent_id, child_id])
        self.writable[parent_id] = self.writable[child_id] = 0  # the next write must go through `append`

    def reserve(self, seq_id: int, blocks: list[int]) -> None:
        """Start a sequence's table with these empty blocks, all of them writable without `append`.

        This is for callers that choose the blocks themselves (`contiguous_memory.py`), of one layer group.
        """
        self.gpu.take(blocks)
        self._first.on_gpu.add(seq_id, blocks)
        self.writable[seq_id] = len(blocks) * self.block_size

    def split(self, parent_id: int, child_id: int, count: int) -> None:
        """Move the last ``count`` blocks of the parent's table, which are unwritten, to a new sequence."""
        parent = self._first.on_gpu[parent_id].blocks
        blocks = parent[-count:]
        del parent[-count:]
        self._first.on_gpu.add(child_id, blocks)
        self.writable[parent_id] = len(parent) * self.block_size
        self.writable[child_id] = count * self.block_size

    def free_unread(self, seq_id: int, position: int, keys: Sequence[bytes] = ()) -> None:
        """Free the blocks that neither the token at a position nor one after it reads.

        Their content stays in the prefix cache until its memory is needed.

        Args:
            keys: content keys of the sequence's full blocks, as in `append`.
        """
        for tables in self._bounded:
            tables.free_unread(seq_id, position, keys)

    def free(self, seq_id: int, held: int = 0, keys: Sequence[bytes] = ()) -> None:
        """Free the sequence's blocks on the GPU and in the swap space, if it has any.

        Args:
            held: number of tokens whose memory is in the blocks.
            keys: content keys of the full blocks, which stay cached until their memory is needed.
        """
        self.writable.pop(seq_id, None)
        # Evict the end first: it is useless without the beginning.
        if len(self.layers) == 1:
            table = self._first.remove(seq_id, held, keys)
            for num_lost, block in enumerate(reversed(table.held) if table else (), 1):
                self.gpu.release(block, num_lost)
        else:
            self._release_together(seq_id, held, keys)
        for tables in self.layers:
            if (table := tables.swapped.pop(seq_id, None)) is not None:
                for block in reversed(table.held):
                    self.cpu.release(block)

    def _release_together(self, seq_id: int, held: int, keys: Sequence[bytes]) -> None:
        """Free GPU blocks of several layer groups by position: what one has lost is of no use to others."""
        removed = []
        for tables in self.layers:
            if (table := tables.remove(seq_id, held, keys)) is not None:
                count = len(table.blocks)
                for i in range(table.num_freed, count):
                    removed.append(((i + 1) * tables.size, count - i, table.blocks[i]))
        removed.sort(reverse=True)
        for _, num_lost, block in removed:
            self.gpu.release(block, num_lost)

    # -- prefixes ------------------------------------------------------------------------------------

    def find_prefix(
        self, keys: Sequence[bytes], num_tokens: int | None = None, whole: bool = False
    ) -> Prefix:
        """Return the longest prefix of these keys of which every layer group has what later tokens read.

        Args:
            num_tokens: number of tokens of the sequence, the last of which is computed whether it is found or
                not; None: nothing of the prefix is computed.
            whole: find only what has all blocks, whether later tokens read them or not.
        """
        if len(self.layers) == 1 and not self._bounded:
            run, unused = self._first.cached_run(keys)
            return Prefix([run], [unused], len(run) * self._first.size)
        return longest_prefix(self.layers, keys, num_tokens, whole)

    def take_prefix(self, seq_id: int, keys: Sequence[bytes], found: Sequence[list[int]]) -> None:
        """Start a sequence's tables with the blocks that `find_prefix` found for the first of its keys."""
        for tables, blocks in zip(self.layers, found):
            tables.take(seq_id, keys, blocks)
        self.writable[seq_id] = 0
        if self.journal is not None:
            hits = [block for blocks in found for block in blocks if block != NO_BLOCK]
            self.note("prefix_hit", [seq_id], zip(hits, hits))

    def unify(self, seq_id: int) -> None:
        """Replace a sequence's blocks by the cached blocks with the same keys.

        Other sequences may have computed the same blocks at the same time. All blocks of the sequence must
        be full and written.
        """
        for tables in self.layers:
            tables.unify(seq_id)

    def content_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return what the blocks of all layer groups are found by that have the content of these keys."""
        return [key for tables in self.layers for key in tables.keys_of(keys, 0, len(keys))]

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
        if revoked:
            for tables in self.layers:
                tables.forget(revoked)

    # -- swapping ------------------------------------------------------------------------------------

    def can_swap_out(self, seq_ids: Iterable[int]) -> bool:
        """Return whether the swap space has room for the sequences' blocks."""
        lists = [tables.keyed_blocks(table) for tables, _, table in self._tables(seq_ids)]
        return num_to_move(lists, self.cpu) <= self.cpu.num_free

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks to the swap space; shared blocks stay shared there.

        Returns:
            (GPU block, CPU block) of the copies to make before the GPU blocks are written again. Content
            that the swap space already holds is not copied.
        """
        moving = self._tables(seq_ids)
        moved, copies = move([tables.keyed_blocks(table) for tables, _, table in moving], self.gpu, self.cpu)
        for (tables, seq_id, table), held in zip(moving, moved):
            tables.to_cpu(seq_id, table, held)
            self.writable.pop(seq_id, None)
        self.note("swap_out", dict.fromkeys(seq_id for _, seq_id, _ in moving), copies)
        return copies

    def num_swapped_blocks(self, seq_ids: Iterable[int]) -> int:
        """Return the number of free GPU blocks that swapping these sequences in takes."""
        lists = [tables.keyed_blocks(table) for tables, _, table in self._tables(seq_ids, swapped=True)]
        return num_to_move(lists, self.gpu)

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]]:
        """Move the sequences' blocks back to the GPU.

        Returns:
            (CPU block, GPU block) of the copies to make before the step that reads them. Content that is
            still, or again, on the GPU is not copied.
        """
        moving = self._tables(seq_ids, swapped=True)
        moved, copies = move([tables.keyed_blocks(table) for tables, _, table in moving], self.cpu, self.gpu)
        for (tables, seq_id, table), held in zip(moving, moved):
            tables.to_gpu(seq_id, table, held)
            self.writable[seq_id] = 0
        self.note("swap_in", dict.fromkeys(seq_id for _, seq_id, _ in moving), copies)
        return copies

    def _tables(
        self, seq_ids: Iterable[int], swapped: bool = False
    ) -> list[tuple[LayerTables, int, BlockTable]]:
        """Return the tables that these sequences have on the GPU, or in the swap space."""
        found = []
        for seq_id in seq_ids:
            for tables in self.layers:
                table = tables.swapped.get(seq_id) if swapped else tables.on_gpu.get(seq_id)
                if table is not None:
                    found.append((tables, seq_id, table))
        return found

    def check_integrity(self) -> None:
        """Check that the pools, the block tables and `writable` agree.

        Raises:
            RuntimeError: they do not.
        """
        check_tables(self.layers, self.gpu, self.cpu, self.writable)
