"""Create, fork, extend and end the sequences of groups. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC

from ..memory.block_manager import BlockManager
from .beam_search import advance
from .group_memory import GroupMemory
from .queues import Queues
from .request import Beams, Candidates, Sequence, SequenceGroup, Status
from .step_plan import Plan, ScheduledSequence


class Sequences:
    """Change the sequences of groups, and the queues and blocks with them.

    Args:
        queues: the queues; a group leaves them with its last sequence.
        memory: the blocks of groups.
    """

    def __init__(self, queues: Queues, memory: GroupMemory, blocks: BlockManager) -> None:
        self._queues = queues
        self._memory = memory
        self._blocks = blocks
        self._next_seq_id = 0

    def create(self, group: SequenceGroup, index: int, token_ids: list[int], seed: int) -> Sequence:
        """Add a sequence without blocks to a group."""
        seq = Sequence(self._next_seq_id, index, list(token_ids), group.prompt_len, seed)
        self._next_seq_id += 1
        group.seqs.append(seq)
        group.live.append(seq)
        return seq

    def fork(self, group: SequenceGroup, parent: Sequence, index: int) -> Sequence:
        """Add a sequence with the parent's tokens, which shares the parent's blocks."""
        child = self.create(group, index, parent.token_ids, parent.seed)
        self._memory.fork(group, parent, child)
        return child

    def drop(self, group: SequenceGroup, seq: Sequence) -> None:
        """Remove one of several sequences from a group as if it had never been there."""
        group.live.remove(seq)
        group.seqs.remove(seq)
        self._memory.release(group, seq)

    def finish(
        self, group: SequenceGroup, seq: Sequence, reason: str, stop_reason: str | int | None = None
    ) -> None:
        """End a sequence and free its blocks; with the last one the group leaves the queues."""
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        group.live.remove(seq)
        group.num_seats -= 1
        self._memory.release(group, seq)
        if not group.live:
            self._queues.remove(group)
            group.status = Status.FINISHED

    def extend(
        self,
        plan: Plan,
        samples: SequenceABC[SequenceABC[int]],
        candidates: Mapping[int, Candidates],
    ) -> None:
        """Append what a step sampled; see `Scheduler.update`."""
        prefilling = []
        searches: dict[SequenceGroup, Beams] = {}
        for position, best in candidates.items():
            item = plan.scheduled[position]
            beams = item.group.beams
            assert beams is not None
            beams.candidates[item.seq.seq_id] = best
            searches[item.group] = beams
        for item, tokens in zip(plan.scheduled, samples):
            group, seq = item.group, item.seq
            if group.prefilling:
                prefilling.append((item, tokens))
                continue
            seq.num_computed += 1
            if not tokens:
                continue  # a beam
            token, token_ids = tokens[0], seq.token_ids
            token_ids.append(token)
            if token in group.stop_ids or len(token_ids) - seq.prompt_len >= group.max_tokens:
                self._stop(group, seq)
        if prefilling:
            self._extend_prefilling(prefilling)
        for group, beams in searches.items():
            self._advance_beams(group, beams)

    def _extend_prefilling(self, computed: list[tuple[ScheduledSequence, SequenceABC[int]]]) -> None:
        for item, _ in computed:
            item.seq.num_computed += item.num_tokens
            self._memory.fork_waiting(item.group)
        for item, tokens in computed:
            group = item.group
            receivers = [item.seq]
            if tokens and not group.forked:  # the first step after the prompt
                group.forked = True
                receivers += [self.fork(group, item.seq, index) for index in range(1, len(tokens))]
            for seq, token in zip(receivers, tokens):
                seq.token_ids.append(token)
                if token in group.stop_ids or seq.num_output_tokens >= group.max_tokens:
                    self._stop(group, seq)
        for group in dict.fromkeys(item.group for item, _ in computed):
            if group.is_prefix and group.live[0].num_pending == 0:
                self._blocks.unify(group.live[0].seq_id)
                self._queues.remove(group)
                group.status = Status.PINNED
            elif group.forked and all(
                seq.num_pending == 1 and self._blocks.holds(seq.seq_id) for seq in group.live
            ):
                group.prefilling = False

    def _advance_beams(self, group: SequenceGroup, beams: Beams) -> None:
        """Take a step of beam search when all beams are computed."""
        if any(seq.num_pending for seq in group.live):
            return
        group.forked = True
        if advance(group, beams, self.fork, self.drop):
            for seq in list(group.live):
                self.finish(group, seq, "stop")
        else:
            group.prefilling = False

    def _stop(self, group: SequenceGroup, seq: Sequence) -> None:
        """End a sequence by its last token."""
        token = seq.token_ids[-1]
        if token in group.params.stop_token_ids:
            self.finish(group, seq, "stop", token)
        elif token in group.stop_ids:
            self.finish(group, seq, "stop")
        else:
            self.finish(group, seq, "length")
