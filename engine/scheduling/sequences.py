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
        self._launched: Plan | None = None  # the last launched step, until its tokens are known

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
        """End a sequence by its last known token and free its blocks.

        A launched step may compute that token and sample another one: what it writes lies behind all that the
        prefix cache keeps, and is written before the memory has another use.
        """
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        if seq.token_ids[-1] < 0:
            end = seq.num_known
            del seq.token_ids[end:]
            seq.num_computed = min(seq.num_computed, end - 1)
        if seq in group.live:
            self._leave(group, seq)
        if not group.live and all(other.finish_reason is not None for other in group.seqs):
            group.status = Status.FINISHED

    def _leave(self, group: SequenceGroup, seq: Sequence) -> None:
        """Free the blocks and the seat of a sequence; with the last one the group leaves the queues."""
        group.live.remove(seq)
        group.num_seats -= 1
        self._memory.release(group, seq)
        if not group.live:
            self._queues.remove(group)

    # -- a step --------------------------------------------------------------------------------------

    def advance(self, plan: Plan) -> None:
        """Count what a launched step computes, and make room for the tokens; see `Scheduler.advance`."""
        self._launched = plan
        prefilling = []
        unknown = -1  # stands for the next sampled token
        for item in plan.scheduled:
            group = item.group
            if group.prefilling:
                prefilling.append((item, unknown))
                if group.beams is None:
                    unknown -= item.num_samples
                continue
            seq = item.seq
            seq.num_computed += 1
            if group.beams is not None:
                continue  # tokens are chosen among the candidates of all beams
            token_ids = seq.token_ids
            token_ids.append(unknown)
            unknown -= 1
            if len(token_ids) - seq.prompt_len >= group.max_tokens:
                plan.ending.append((group, seq))
        if prefilling:
            self._advance_prefilling(plan, prefilling)

    def _advance_prefilling(self, plan: Plan, computed: list[tuple[ScheduledSequence, int]]) -> None:
        for item, _ in computed:
            item.seq.num_computed += item.num_tokens
            self._memory.fork_waiting(item.group)
        for item, unknown in computed:
            group = item.group
            if not item.num_samples or group.beams is not None:
                continue
            receivers = [item.seq]
            if not group.forked:  # the first step after the prompt
                group.forked = True
                receivers += [self.fork(group, item.seq, index) for index in range(1, item.num_samples)]
            for index, seq in enumerate(receivers):
                seq.token_ids.append(unknown - index)
                if len(seq.token_ids) - seq.prompt_len >= group.max_tokens:
                    plan.ending.append((group, seq))
        for group in dict.fromkeys(item.group for item, _ in computed):
            if group.is_prefix and group.live[0].num_pending == 0:
                self._blocks.unify(group.live[0].seq_id)
                self._queues.remove(group)
                group.status = Status.PINNED
            elif group.forked and all(
                seq.num_pending == 1 and self._blocks.holds(seq.seq_id) for seq in group.live
            ):
                group.prefilling = False

    def retire(self) -> None:
        """Free the blocks of sequences that get their last token by the launched step; `resolve` ends them.

        All tokens that the step computes are known by now, so that the prefix cache can keep them.
        """
        if self._launched is not None:
            for group, seq in self._launched.ending:
                if seq in group.live:
                    self._leave(group, seq)

    def resolve(
        self,
        plan: Plan,
        samples: SequenceABC[SequenceABC[int]],
        candidates: Mapping[int, Candidates],
    ) -> list[ScheduledSequence]:
        """Put the sampled tokens in place, and end what they end; see `Scheduler.resolve`."""
        if self._launched is plan:
            self._launched = None
        wasted = []
        for item, tokens in zip(plan.scheduled, samples):
            if not tokens:
                continue  # a beam, or a prompt that is not complete
            seq = item.seq
            if seq.finish_reason is not None:
                wasted.append(item)
                continue
            seq.token_ids[item.start + item.num_tokens] = token = tokens[0]
            if token in item.group.stop_ids:
                self._stop(item.group, seq, token)
            if len(tokens) > 1:
                for fork, token in zip(item.receivers[1:], tokens[1:]):
                    fork.token_ids[item.start + item.num_tokens] = token
                    if token in item.group.stop_ids:
                        self._stop(item.group, fork, token)
        for group, seq in plan.ending:
            if seq.finish_reason is None:
                self.finish(group, seq, "length")
        if candidates:
            wasted += self._resolve_beams(plan, candidates)
        return wasted

    def _resolve_beams(self, plan: Plan, candidates: Mapping[int, Candidates]) -> list[ScheduledSequence]:
        searches: dict[SequenceGroup, Beams] = {}
        wasted = []
        for position, best in candidates.items():
            item = plan.scheduled[position]
            if item.seq.finished:
                wasted.append(item)
                continue
            beams = item.group.beams
            assert beams is not None
            beams.candidates[item.seq.seq_id] = best
            searches[item.group] = beams
        for group, beams in searches.items():
            self._advance_beams(group, beams)
        return wasted

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

    def _stop(self, group: SequenceGroup, seq: Sequence, token: int) -> None:
        """End a sequence by a token that ends it."""
        self.finish(group, seq, "stop", token if token in group.params.stop_token_ids else None)
