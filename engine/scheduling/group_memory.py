"""Translate what sequence groups need into calls of the block manager. No torch."""

from __future__ import annotations

from ..memory.block_manager import BlockManager
from ..memory.block_tables import NO_BLOCK
from ..memory.prefix_hash import extend_keys
from ..memory.prefix_search import NO_PREFIX, Prefix
from .request import Sequence, SequenceGroup, Status


class GroupMemory:
    """Find, count, take and free the blocks of groups.

    Args:
        enable_prefix_caching: find full blocks by their tokens, and let them be found.
    """

    preempts = True  # groups take more as they grow, and may lose it

    def __init__(self, blocks: BlockManager, enable_prefix_caching: bool) -> None:
        self._blocks = blocks
        self._caching = enable_prefix_caching

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

    def free_unread(self, group: SequenceGroup, seq: Sequence) -> None:
        """Free the blocks that the sequence's next token and those after it do not read."""
        if self._blocks.frees_unread and not group.is_prefix:
            self._blocks.free_unread(seq.seq_id, seq.num_computed, self.keys(group, seq, seq.num_computed))

    def longest_step(self, group: SequenceGroup, seq: Sequence, start: int) -> int:
        """Return the maximum number of tokens of a sequence in a step that begins at its token ``start``.

        Where layers keep states, a step ends where another sequence is to go on: at the end of a block, and
        at that of a prompt whose other outputs wait for it.
        """
        if not self._blocks.has_states:
            return len(seq.token_ids)
        most = self._blocks.longest_append(start)
        return min(most, group.prompt_len - start) if start < group.prompt_len else most

    def drop(self, group: SequenceGroup, keep: bool = True) -> None:
        """Free all blocks of the group, to be computed again; with ``keep`` the prefix cache keeps them."""
        for seq in group.live:
            if not keep:
                seq.num_computed = 0
            self.release(group, seq)
            seq.num_computed = 0
        group.status = Status.PREEMPTED
        group.prefilling = True

    def most(self, group: SequenceGroup, num_pinned: int = 0) -> int:
        """Return the maximum number of blocks that the group can come to have.

        Args:
            num_pinned: number of the first tokens of its prompt whose full blocks do not count.
        """
        # The last token of an output is never an input, so its memory is never written.
        num_tokens = group.prompt_len + group.max_tokens - 1
        return self._blocks.num_held(num_tokens, group.prompt_len, num_pinned, group.width)

    def needs(self, group: SequenceGroup) -> tuple[Prefix, int]:
        """Return what a group without GPU blocks needs to hold all tokens that it has.

        Returns:
            What the prefix cache holds of it, and the number of free blocks to take.
        """
        if group.status is Status.SWAPPED:
            swapped = self._blocks.num_swapped_blocks([seq.seq_id for seq in group.live])
            return NO_PREFIX, swapped + self.missing(group)
        if not self.reads_cache(group):
            return NO_PREFIX, self.missing(group)
        first = group.live[0]
        keys, num_tokens = self.keys(group, first, len(first.token_ids)), len(first.token_ids)
        if len(group.live) > 1 and self._blocks.frees_unread:
            keys = keys[: group.prompt_len // self._blocks.block_size]  # the other outputs go on from there
        # What is pinned is read by prompts that have any part of it in common.
        found = self._blocks.find_prefix(keys, num_tokens, whole=group.is_prefix)
        return found, self.missing(group, found)

    def missing(self, group: SequenceGroup, found: Prefix = NO_PREFIX) -> int:
        """Return the number of blocks to take until the group holds all tokens that it has.

        Args:
            found: what the first sequence begins with, if it has no blocks: those that are unused count.
        """
        held = []
        missing = 0
        for position, seq in enumerate(group.live):
            if self._blocks.holds(seq.seq_id):
                held.append((seq.seq_id, seq.num_computed, seq.num_pending))
            elif position:
                missing += self._blocks.num_held(len(seq.token_ids), group.prompt_len, group.prompt_len)
            else:
                missing += self._blocks.num_to_take(len(seq.token_ids), found, whole=group.is_prefix)
        return missing + (self._blocks.num_new_blocks(held) if held else 0)

    def growth(self, group: SequenceGroup) -> int:
        """Return the maximum number of blocks that the group may take besides those counted for its tokens.

        These are the ones that it holds and, until it decodes, those that it needs for all tokens it has.
        """
        num_tokens = group.prompt_len + group.max_tokens - 1
        most = self._blocks.num_held(num_tokens, group.prompt_len, 0, group.num_seats)
        owned = (t.owned(seq.seq_id) for seq in group.live for t in self._blocks.layers)
        counted = len({block for blocks in owned for block in blocks})
        if group.prefilling or group.status is not Status.RUNNING:
            counted += self.missing(group)
        return max(0, most - counted)

    def start(self, group: SequenceGroup, found: Prefix) -> None:
        """Take the blocks that `needs` found in the prefix cache for a group that has none."""
        if found.num_tokens:
            first = group.live[0]
            self._blocks.take_prefix(first.seq_id, first.keys, found.tables)

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
            found = self._blocks.find_prefix(keys)
            if found.num_tokens > group.prompt_len:
                tables = [
                    self._shared_of_prompt(group, first, layer_group, blocks)
                    for layer_group, blocks in enumerate(found.tables)
                ]
                self._blocks.take_prefix(seq.seq_id, keys, tables)
                seq.num_computed = found.num_tokens
            else:
                self._blocks.fork(first.seq_id, seq.seq_id, group.prompt_len)
                seq.num_computed = group.prompt_len

    def _shared_of_prompt(
        self, group: SequenceGroup, first: Sequence, layer_group: int, found: list[int]
    ) -> list[int]:
        """Return blocks that were found, those of the prompt replaced by the first sequence's.

        What is found of the prompt may be another copy than the first one's, which may have given its own
        back.
        """
        shared = group.prompt_len // self._blocks.block_sizes[layer_group]
        own = self._blocks.table(first.seq_id, layer_group)[:shared]
        return [other if NO_BLOCK in (block, other) else block for block, other in zip(own, found)] + found[
            len(own) :
        ]
