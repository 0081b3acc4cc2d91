"""Answer "does it fit?": ever, beside the groups that run, and in the free blocks. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC

from ..memory.block_manager import BlockManager
from .admission import AdmissionPolicy
from .group_memory import GroupMemory
from .pinned_prefixes import PinnedPrefixes
from .request import Sequence, SequenceGroup

Turn = list[tuple[Sequence, int]]  # sequences and the number of tokens that each computes in a step


class AdmissionCheck:
    """Compare what groups need with what there is.

    Args:
        blocks: the block manager.
        memory: the blocks of groups.
        pinned: the prefixes that keep their blocks.
        policy: decides how many blocks stay free when a group is admitted.
        max_num_seqs: maximum number of sequences in a step.
        max_model_len: maximum number of tokens of a sequence.
    """

    def __init__(
        self,
        blocks: BlockManager,
        memory: GroupMemory,
        pinned: PinnedPrefixes,
        policy: AdmissionPolicy,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._blocks = blocks
        self._memory = memory
        self._pinned = pinned
        self._policy = policy
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len

    def check(self, group: SequenceGroup) -> None:
        """Raise ValueError for a request that does not fit even alone beside the pinned prefixes."""
        params = group.params
        if group.prompt_len + (not params.only_prompt) > self._max_model_len:
            sampled = "" if params.only_prompt else ", at least one of them sampled"
            raise ValueError(
                f"the prompt has {group.prompt_len} tokens, and a sequence may have {self._max_model_len} "
                f"(max_model_len){sampled}: shorten the prompt"
            )
        if group.width > self._max_num_seqs:
            name = "beam_width" if params.beam_width else "n" if group.width == params.n else "best_of"
            raise ValueError(
                f"{name} is {group.width}, and at most {self._max_num_seqs} sequences run at once "
                "(max_num_seqs): lower it"
            )
        if params.beam_width and not self._memory.preempts:
            raise ValueError("beam_width needs memory that beams can share: set memory_policy='paged'")
        needed, pinned = self._most(group), self._pinned.num_blocks
        if needed + pinned > self._blocks.gpu.num_blocks:
            held = f", {pinned} of them taken by pinned prefixes" if pinned else ""
            raise ValueError(
                f"the request may need {needed} blocks of {self._blocks.block_size} tokens (prompt "
                f"{group.prompt_len}, max_tokens {group.max_tokens}, {group.width} outputs), and the KV "
                f"cache has {self._blocks.gpu.num_blocks}{held}: ask for fewer tokens or give the engine "
                "more memory"
            )

    def check_prefix(self, group: SequenceGroup, others: Iterable[SequenceGroup]) -> None:
        """Raise ValueError for a prefix that no prompt can have, or that leaves too little for a request.

        Args:
            others: the unfinished groups.
        """
        keys = self._memory.keys(group, group.seqs[0], group.prompt_len)
        taken, total = self._pinned.num_blocks_with(keys), self._blocks.gpu.num_blocks
        most = max((self._most(other, keys) for other in others if not other.is_prefix), default=0)
        if taken + most > total:
            promised = f", and a request may need {most} more" if most else ""
            raise ValueError(
                f"the pinned prefixes would take {taken} blocks{promised}; the KV cache has {total}: "
                "shorten the prefix, remove another one, or give the engine more memory"
            )
        if group.prompt_len >= self._max_model_len:  # the model may have no positions for it
            raise ValueError(
                f"the prefix has {group.prompt_len} tokens in full blocks, and a prompt must have fewer than "
                f"{self._max_model_len} (max_model_len): shorten the prefix"
            )

    def fits(self, group: SequenceGroup, staying: list[SequenceGroup], num_freed: int = 0) -> bool:
        """Return whether a group can run beside others.

        Args:
            group: a group without GPU blocks.
            staying: the groups that run beside it.
            num_freed: number of blocks to count as free besides those that are.
        """
        if group.num_seats > self.num_seats_left(staying):
            return False
        needed = self.num_promised(staying) + self._memory.needs(group)[1] + self.num_reserved(group, staying)
        return needed <= self._blocks.gpu.num_free + num_freed

    def fits_now(self, turn: Turn) -> bool:
        """Return whether there are free blocks for the tokens of running sequences."""
        num_free = self._blocks.gpu.num_free
        if sum(num_tokens for _, num_tokens in turn) * len(self._blocks.layers) <= num_free:
            return True  # a token takes one block of a layer group at most
        new = self._blocks.num_new_blocks([(seq.seq_id, seq.num_computed, n) for seq, n in turn])
        return new <= num_free

    def num_seats_left(self, running: list[SequenceGroup]) -> int:
        """Return the number of sequences that can run beside these groups."""
        return self._max_num_seqs - sum(group.num_seats for group in running)

    def num_promised(self, running: list[SequenceGroup]) -> int:
        """Return the number of blocks that these groups have yet to take for the tokens they have."""
        return sum(self._memory.missing(group) for group in running if group.prefilling)

    def num_reserved(self, group: SequenceGroup, running: list[SequenceGroup]) -> int:
        """Return the number of blocks that stay free when a group is admitted beside these."""
        if not running or not self._memory.preempts:
            return 0
        growth = (self._memory.growth(each) for each in (group, *running))
        return self._policy.num_reserved(self._blocks.gpu.num_blocks, growth)

    def _most(self, group: SequenceGroup, pinned: SequenceABC[bytes] = ()) -> int:
        """Return the number of blocks of a group at its largest, without those of pinned prefixes.

        Args:
            pinned: keys of blocks to count as pinned besides those that are.
        """
        covered = 0
        if (self._pinned or pinned) and self._memory.reads_cache(group):
            num_keys = self._pinned.num_covered(self._memory.prompt_keys(group), pinned)
            covered = (
                num_keys * self._blocks.block_size // self._blocks.prefix_size * self._blocks.prefix_size
            )
        return self._memory.most(group, covered)
