"""Allocate memory without paging, as the systems that the paper compares with (section 6.1). No torch.

Every output gets a contiguous range of blocks for its maximum length before it starts: their IDs follow each
other, so that what would be one tensor there is one part of the cache here, and the same kernels read it.
Nothing is shared, nothing grows and nothing is preempted. Each of several outputs of a request computes the
prompt on its own, as separate requests would.
"""

from __future__ import annotations

from ..memory.block_manager import BlockManager
from ..memory.prefix_search import NO_PREFIX, Prefix
from .group_memory import GroupMemory
from .request import Sequence, SequenceGroup


class BuddyAllocator:
    """Allocate contiguous ranges of blocks, whose sizes are powers of two.

    A range is halved until it has the size that is asked for; when both halves are free again, they become
    one. The lowest blocks are taken first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free: list[set[int]] = [
            set() for _ in range(num_blocks.bit_length())
        ]  # starts, by log2 of size
        self._orders: dict[int, int] = {}  # start of a run in use -> log2 of its size
        self._num_blocks = num_blocks
        start = 0
        for order in reversed(range(num_blocks.bit_length())):
            if num_blocks >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    def num_available(self, count: int) -> int:
        """Return how many ranges of ``count`` blocks can be allocated one after the other."""
        least = _order(count)
        return sum(len(self._free[order]) << (order - least) for order in range(least, len(self._free)))

    def allocate(self, count: int) -> int:
        """Take a range of at least ``count`` blocks, which must be there, and return its first block."""
        wanted = _order(count)
        order = next(order for order in range(wanted, len(self._free)) if self._free[order])
        start = min(self._free[order])
        self._free[order].remove(start)
        while order > wanted:
            order -= 1
            self._free[order].add(start + (1 << order))
        self._orders[start] = order
        return start

    def free(self, start: int) -> None:
        """Free the range that begins at this block."""
        order = self._orders.pop(start)
        # The buddy of a range that reaches past the end is never free.
        while order + 1 < len(self._free) and start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is in no range, or in two."""
        ranges = [(start, order) for order, starts in enumerate(self._free) for start in starts]
        covered = [
            block
            for start, order in [*ranges, *self._orders.items()]
            for block in range(start, start + (1 << order))
        ]
        if sorted(covered) != list(range(self._num_blocks)):
            raise RuntimeError("a block is in no range of the buddy allocator, or in two")
        for start, order in ranges:
            if start ^ (1 << order) in self._free[order]:
                raise RuntimeError("two free buddies have not become one")


def _order(count: int) -> int:
    return (count - 1).bit_length()


class ReservedMemory(GroupMemory):
    """Reserve contiguous ranges for all outputs of a group at once.

    Args:
        policy: number of tokens that an output gets: "orca-max" ``max_model_len``, "orca-pow2" its prompt and
            the next power of two of its ``max_tokens``, "orca-oracle" its prompt and ``max_tokens``.
    """

    preempts = False

    def __init__(self, blocks: BlockManager, policy: str, max_model_len: int) -> None:
        super().__init__(blocks, enable_prefix_caching=False)
        self._policy = policy
        self._max_model_len = max_model_len
        self._buddy = BuddyAllocator(blocks.gpu.num_blocks)

    def most(self, group: SequenceGroup, num_pinned: int = 0) -> int:
        # All ranges of a group have the same size, so they fit into empty memory exactly if their sum does.
        return group.width << _order(self._blocks_of_output(group))

    def needs(self, group: SequenceGroup) -> tuple[Prefix, int]:
        count = self._blocks_of_output(group)
        if self._buddy.num_available(count) < group.num_seats:
            return NO_PREFIX, self._blocks.gpu.num_blocks + 1  # more than can ever be free
        return NO_PREFIX, group.num_seats * count

    def missing(self, group: SequenceGroup, found: Prefix = NO_PREFIX) -> int:
        return 0

    def start(self, group: SequenceGroup, found: Prefix) -> None:
        # Until the prompt is computed, the first sequence keeps the ranges of the others behind its own.
        count = self._blocks_of_output(group)
        for seq in group.live:
            starts = [self._buddy.allocate(count) for _ in range(1 if group.forked else group.width)]
            blocks = [block for start in starts for block in range(start, start + count)]
            self._blocks.reserve(seq.seq_id, blocks)

    def fork(self, group: SequenceGroup, parent: Sequence, child: Sequence) -> None:
        self._blocks.split(parent.seq_id, child.seq_id, self._blocks_of_output(group))

    def release(self, group: SequenceGroup, seq: Sequence) -> None:
        if self._blocks.holds(seq.seq_id):
            for start in self._blocks.table(seq.seq_id)[:: self._blocks_of_output(group)]:
                self._buddy.free(start)
        self._blocks.free(seq.seq_id)

    def _blocks_of_output(self, group: SequenceGroup) -> int:
        return self._blocks.num_held(self._tokens_of_output(group))

    def _tokens_of_output(self, group: SequenceGroup) -> int:
        if self._policy == "orca-max":
            return self._max_model_len
        if self._policy == "orca-pow2":
            return min(group.prompt_len + (1 << _order(group.max_tokens)), self._max_model_len)
        return group.prompt_len + group.max_tokens - 1  # the last token is never an input


def group_memory(
    policy: str, blocks: BlockManager, enable_prefix_caching: bool, max_model_len: int
) -> GroupMemory:
    """Return the memory of groups under a memory policy.

    All but "paged" go without the prefix cache, and free nothing before a sequence ends.
    """
    if policy == "paged":
        return GroupMemory(blocks, enable_prefix_caching)
    return ReservedMemory(blocks, policy, max_model_len)


def longest(policy: str, num_blocks: int) -> int:
    """Return the maximum number of blocks of a sequence."""
    return num_blocks if policy == "paged" else 1 << (num_blocks.bit_length() - 1)
