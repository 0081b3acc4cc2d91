"""Define the plan of a step, which the scheduler makes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Sequence, SequenceGroup

BlockPairs = tuple[tuple[int, int], ...]


@dataclass(eq=False, slots=True)  # not frozen: making one would take four times as long
class ScheduledSequence:
    """Tokens ``start`` to ``start + num_tokens - 1`` of a sequence, to be computed in a step."""

    group: SequenceGroup
    seq: Sequence
    start: int
    num_tokens: int
    num_samples: int  # tokens to sample after the last one; 0 while a prompt is not complete
    # Number of the first of these tokens whose keys and values are in shared blocks: they are computed for
    # the tokens after them, and not written.
    num_stored: int = 0

    @property
    def num_prompt_logits(self) -> int:
        """Return the number of first tokens whose logits are wanted for the prompt's own log probabilities.

        The logits after the last token, which are sampled from, do not count.
        """
        if not self.group.params.needs_whole_prompt:
            return 0
        return max(0, min(self.num_tokens, self.group.prompt_len - 1 - self.start))

    @property
    def receivers(self) -> list[Sequence]:
        """Return the sequences of the samples, in order; to be called after `Scheduler.advance`."""
        return [self.seq] if self.num_samples == 1 else self.group.seqs[: self.num_samples]


@dataclass(frozen=True)
class Plan:
    """A step. The moves of blocks run first, in the order of the fields, then the tokens.

    Args:
        swap_out: (GPU block, CPU block). swap_in: (CPU block, GPU block). copies: (source, destination).
        ending: the sequences to which the step gives the last token that they may have; set by
            `Scheduler.advance`.
    """

    scheduled: tuple[ScheduledSequence, ...] = ()
    swap_out: BlockPairs = ()
    swap_in: BlockPairs = ()
    copies: BlockPairs = ()
    ending: list[tuple[SequenceGroup, Sequence]] = field(default_factory=list)


@dataclass
class Draft:
    """Collect a plan while it is made."""

    budget: int  # tokens left
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def freeze(self) -> Plan:
        """Return the plan."""
        return Plan(tuple(self.scheduled), tuple(self.swap_out), tuple(self.swap_in), tuple(self.copies))
