"""Whether a request could ever run, and a prefix be kept beside those there are. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..memory.block_manager import BlockManager
from .group_memory import GroupMemory
from .pinned_prefixes import PinnedPrefixes
from .request import SequenceGroup


class Capacity:
    """Refuses what would wait for ever.

    Args:
        pinned: the prefixes that keep their blocks.
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of a sequence.
    """

    def __init__(
        self,
        blocks: BlockManager,
        memory: GroupMemory,
        pinned: PinnedPrefixes,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._blocks = blocks
        self._memory = memory
        self._pinned = pinned
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len

    def check(self, group: SequenceGroup) -> None:
        """Raise ValueError where a request does not fit even alone, beside the pinned prefixes."""
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
        """Raise ValueError where a prefix does not fit beside the other ones and any of the requests, or is
        longer than a prompt can be."""
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

    def _most(self, group: SequenceGroup, pinned: Sequence[bytes] = ()) -> int:
        """The group's blocks at its largest, without those of pinned prefixes, ``pinned`` among them."""
        covered = 0
        if (self._pinned or pinned) and self._memory.reads_cache(group):
            covered = self._pinned.num_covered(self._memory.prompt_keys(group), pinned)
        return self._memory.most(group) - covered
