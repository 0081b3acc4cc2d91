"""Translate what sequence groups need into calls of the block manager. No torch."""

from __future__ import annotations

from ..memory.block_manager import BlockManager
from ..memory.block_tables import NO_BLOCK
from ..memory.prefix_hash import extend_keys
from .request import Sequence, SequenceGroup, Status


class GroupMemory:
    """Find, count, take and free the blocks of groups.

    Args:
        enable_prefix_caching: find full blocks by their tokens, and let them be found.
        window: maximum number of tokens, its own included, that a token sees in any layer; None where a layer
            sees all.
    """

    preempts = True  # groups take more as they grow, and may lose it

    def __init__(self, blocks: BlockManager, enable_prefix_caching: bool, window: int | None = None) -> None:
        self._blocks = blocks
        self._caching = enable_prefix_caching
        self._window = window

    def reads_cache(self, group: SequenceGroup) -> bool:
        """Return whether the group may use blocks that the prefix cache holds."""
        return self._caching and not group.skip_reading_prefix_cache

    def keys(self, group: SequenceGroup, seq: Sequence, num_tokens: int) -> list[bytes]:
        """Return the keys of a sequence's full blocks, at least of those in its first ``num_tokens`` tokens.

        A block with a token that is not known yet has no key. Empty without a prefix cache.
        """
        size = self._blocks.block_size
        if self._caching and num_tokens >= (len(seq.keys) + 1) * size:
            num_tokens = min(num_tokens, seq.num_known)
            extend_keys(seq.keys, group.root_key, seq.token_ids, num_tokens, size)
        return seq.keys

    def prompt_keys(self, group: SequenceGroup) -> list[bytes]:
        """Return the keys of the prompt's full blocks."""
        keys = self.keys(group, group.seqs[0], group.prompt_len)
        return keys[: group.prompt_len // self._blocks.block_size]

    def release(self, group: SequenceGroup, seq: Sequence) -> None:
        """Free the sequence's blocks; the prefix cache keeps the full ones that it has computed."""
        self._blocks.free(seq.seq_id, seq.num_computed, self.keys(group, seq, seq.num_computed))

    def free_unseen(self, group: SequenceGroup, seq: Sequence) -> None:
        """Free the blocks before the window of the sequence's next token."""
        if self._window is not None and not group.is_prefix:
            first_seen = seq.num_computed - self._window + 1
            if first_seen >= self._blocks.block_size:
                self._blocks.free_before(seq.seq_id, first_seen, self.keys(group, seq, seq.num_computed))

    def drop(self, group: SequenceGroup, keep: bool = True) -> None:
        """Free all blocks of the group, to be computed again; with ``keep`` the prefix cache keeps them."""
        for seq in group.live:
            if not keep:
                seq.num_computed = 0
            self.release(group, seq)
            seq.num_computed = 0
        group.status = Status.PREEMPTED
        group.prefilling = True

    def most(self, group: SequenceGroup) -> int:
        """Return the maximum number of blocks that the group can come to have."""
        # The last token of an output is never an input, so its keys and values are never stored.
        most = self._blocks.blocks_for(group.prompt_len + group.max_tokens - 1)
        shared = group.prompt_len // self._blocks.block_size
        return shared + group.width * (most - shared)

    def needs(self, group: SequenceGroup) -> tuple[list[int], int]:
        """Return what a group without GPU blocks needs to hold all tokens that it has.

        Returns:
            Its first blocks that the prefix cache holds, and the number of free blocks to take.
        """
        if group.status is Status.SWAPPED:
            swapped = self._blocks.num_swapped_blocks([seq.seq_id for seq in group.live])
            return [], swapped + self.missing(group)
        found: list[int] = []
        unused = 0
        if self.reads_cache(group):
            first = group.live[0]
            found, unused = self._blocks.find_prefix(self.keys(group, first, len(first.token_ids)))
        return found, self.missing(group) - len(found) + unused

    def missing(self, group: SequenceGroup) -> int:
        """Return the number of blocks to take until the group holds all tokens that it has."""
        shared = group.prompt_len // self._blocks.block_size
        held = []
        missing = 0
        for position, seq in enumerate(group.live):
            if self._blocks.holds(seq.seq_id):
                held.append((seq.seq_id, seq.num_computed, seq.num_pending))
            else:
                missing += self._blocks.blocks_for(len(seq.token_ids)) - (shared if position else 0)
        return missing + (self._blocks.num_new_blocks(held) if held else 0)

    def growth(self, group: SequenceGroup) -> int:
        """Return the maximum number of blocks that the group may take besides those counted for its tokens.

        These are the ones that it holds and, until it decodes, those that it needs for all tokens it has.
        """
        shared = group.prompt_len // self._blocks.block_size
        of_output = self._blocks.blocks_for(group.prompt_len + group.max_tokens - 1) - shared
        tables = (self._blocks.place(seq.seq_id)[1] for seq in group.live)
        counted = len({block for table in tables for block in table if block != NO_BLOCK})
        if group.prefilling or group.status is not Status.RUNNING:
            counted += self.missing(group)
        return max(0, shared + group.num_seats * of_output - counted)

    def start(self, group: SequenceGroup, found: list[int]) -> None:
        """Take the blocks that `needs` found in the prefix cache for a group that has none."""
        if found:
            first = group.live[0]
            self._blocks.take_prefix(first.seq_id, first.keys, found)

    def fork(self, group: SequenceGroup, parent: Sequence, child: Sequence) -> None:
        """Share what the parent has computed with a new sequence of the group."""
        child.keys = list(parent.keys)
        child.num_computed = parent.num_computed
        self._blocks.fork(parent.seq_id, child.seq_id, parent.num_computed)

    def fork_waiting(self, group: SequenceGroup) -> None:
        """Share the recomputed prompt with the sequences that lost it with the first one.

        Or as many of their own tokens as the prefix cache holds, where that is more.
        """
        first, size = group.live[0], self._blocks.block_size
        if first.num_computed < group.prompt_len:
            return
        for seq in group.live[1:]:
            if self._blocks.holds(seq.seq_id):
                continue
            # The last token has to be computed for what comes after it.
            keys = self.keys(group, seq, len(seq.token_ids) - 1)[: (len(seq.token_ids) - 1) // size]
            found, _ = self._blocks.find_prefix(keys)
            if len(found) * size > group.prompt_len:
                # What is found of the prompt may be another copy than the first one's, which may have given
                # its own back.
                shared = self._blocks.table(first.seq_id)[: group.prompt_len // size]
                blocks = [other if own == NO_BLOCK else own for own, other in zip(shared, found)]
                self._blocks.take_prefix(seq.seq_id, keys, [*blocks, *found[len(shared) :]])
                seq.num_computed = len(found) * size
            else:
                self._blocks.fork(first.seq_id, seq.seq_id, group.prompt_len)
                seq.num_computed = group.prompt_len
