"""What the scheduler decides for one step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Sequence, SequenceGroup

BlockPairs = tuple[tuple[int, int], ...]


@dataclass(eq=False, slots=True)  # not frozen: making one would take four times as long
class ScheduledSequence:
    """Tokens ``start`` to ``start + num_tokens - 1`` of a sequence, to be computed in this step. Nobody
    changes it."""

    group: SequenceGroup
    seq: Sequence
    start: int
    num_tokens: int
    num_samples: int  # tokens to sample after the last one; 0 while a prompt is not complete
    # The keys and values of the first so many are in the cache and shared: they are computed for what comes
    # after them and not written.
    num_stored: int = 0

    @property
    def num_prompt_logits(self) -> int:
        """Of how many tokens, from the first one on, the logits are wanted for what comes after them in the
        prompt; those after the last token that are sampled from do not count."""
        if not self.group.params.needs_whole_prompt:
            return 0
        return max(0, min(self.num_tokens, self.group.prompt_len - 1 - self.start))

    @property
    def receivers(self) -> list[Sequence]:
        """The sequences that the samples belong to, in order; after the plan's `Scheduler.update`."""
        return [self.seq] if self.num_samples == 1 else self.group.seqs[: self.num_samples]


@dataclass(frozen=True)
class Plan:
    """One step. The moves of blocks run first, in this order, then the tokens.

    Args:
        swap_out: (GPU block, CPU block). swap_in: (CPU block, GPU block). copies: (source, destination).
    """

    scheduled: tuple[ScheduledSequence, ...] = ()
    swap_out: BlockPairs = ()
    swap_in: BlockPairs = ()
    copies: BlockPairs = ()


@dataclass
class Draft:
    """A plan in the making."""

    budget: int  # tokens left
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def freeze(self) -> Plan:
        return Plan(tuple(self.scheduled), tuple(self.swap_out), tuple(self.swap_in), tuple(self.copies))
