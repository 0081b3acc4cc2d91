"""Decide which sequences compute how many tokens in the next step. No torch.

One token budget serves prefill and decode: every running sequence decodes one token, what is left of the
budget prefills prompts in chunks, in the order of rank, which the scheduling policy gives (`order.py`).
A request is a sequence group, scheduled and preempted as a whole; the group that ranks last is preempted
first, and no group is admitted before a preempted one that ranks above it (paper, section 4.5).

The cost of a plan is that of what changes. A group that decodes into slots it has costs a comparison a
sequence; block tables, counts and hashes are touched when a sequence needs a block, which is once in a block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC

from ..config import EngineConfig
from ..memory.block_manager import BlockManager
from ..memory.prefix_hash import root_key
from .admission import make_admission_policy
from .admission_check import AdmissionCheck, Turn
from .contiguous_memory import group_memory
from .failed_step import readers_of_others
from .order import make_scheduling_policy
from .overlap import reason_for_host
from .pinned_prefixes import PinnedPrefixes
from .preemption import Preemption
from .queues import Queues
from .request import Beams, Candidates, Sequence, SequenceGroup, Status
from .sequences import Sequences
from .step_plan import Draft, Plan, ScheduledSequence


class Scheduler:
    """Plan steps, and take the blocks that they need from the block manager.

    Args:
        config: settings; ``max_model_len`` and ``preemption_mode`` are not read.
        blocks: the block manager.
        preemption: decides whether the blocks of preempted groups are dropped or swapped out.
        max_model_len: maximum number of tokens of a sequence.
        eos_token_ids: tokens that end a sequence unless its request ignores them.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        blocks: BlockManager,
        preemption: Preemption,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._blocks = blocks
        self._preemption = preemption
        self._eos_token_ids = eos_token_ids
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._policy = make_scheduling_policy(config.scheduling_policy)
        self.reads_priority = self._policy.reads_priority
        self._static_batching = config.batching == "static"
        self._memory = group_memory(config.memory_policy, blocks, config.enable_prefix_caching, max_model_len)
        self._queues = Queues()
        self.waiting, self.running = self._queues.waiting, self._queues.running
        self.preempted = self._queues.preempted
        self._sequences = Sequences(self._queues, self._memory, blocks)
        self.pinned = PinnedPrefixes(blocks.content_keys)
        admission = make_admission_policy(config.admission_policy)
        self._admission = AdmissionCheck(
            blocks, self._memory, self.pinned, admission, config.max_num_seqs, max_model_len
        )
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens of admitted groups, and those of them that were in the cache
        self.num_prefix_hits = 0

    # -- requests ------------------------------------------------------------------------------------

    def has_unfinished(self) -> bool:
        """Return whether a request or a prefix has tokens to compute, besides those of launched steps."""
        return len(self._queues) > 0

    def add(self, group: SequenceGroup, seed: int) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run, however long it waited.
        """
        self._prepare(group, seed)
        self._admission.check(group)
        group.stop_ids = group.params.ending_tokens(self._eos_token_ids)
        group.needs_host = reason_for_host(group)
        if group.params.beam_width:
            group.beams = Beams()
        self._queues.add(group)

    def abort(self, group: SequenceGroup) -> None:
        """End a request wherever it is and free what it holds."""
        for seq in group.seqs:
            if not seq.finished:
                self.finish(group, seq, "abort")

    def finish(
        self, group: SequenceGroup, seq: Sequence, reason: str, stop_reason: str | int | None = None
    ) -> None:
        """End a sequence by its last known token and free its blocks; with the last one the group ends."""
        self._sequences.finish(group, seq, reason, stop_reason)

    def _prepare(self, group: SequenceGroup, seed: int) -> None:
        group.rank = self._policy.place(group)
        group.root_key = root_key(group.cache_salt)
        self._sequences.create(group, 0, group.prompt_token_ids, seed)

    # -- pinned prefixes -----------------------------------------------------------------------------

    def add_prefix(self, group: SequenceGroup) -> None:
        """Queue a prefix of full blocks, to be computed and then kept in memory until it is removed.

        Raises:
            ValueError: it does not fit beside what was promised to requests and other prefixes.
        """
        group.is_prefix = True
        self._prepare(group, seed=0)
        self._admission.check_prefix(group, [*self.waiting, *self.preempted, *self.running])
        self.pinned.add(group)
        self._queues.add(group)

    def remove_prefix(self, prefix_id: str) -> None:
        """Let go of a prefix; its blocks stay in the cache until their memory is needed.

        Raises:
            KeyError: there is none of this name.
        """
        group = self.pinned.remove(prefix_id)
        if group.status is not Status.PINNED:
            self._queues.remove(group)
        self._memory.release(group, group.live.pop())
        group.status = Status.FINISHED

    def num_pinned_blocks(self) -> int:
        """Return the number of blocks that hold prefixes which have been computed."""
        groups = self.pinned.groups.values()
        return self._blocks.num_distinct([g.live[0].seq_id for g in groups if g.status is Status.PINNED])

    # -- a step --------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Plan the next step and take the blocks it needs.

        The caller launches the step and calls `advance`; or, after an error, `moves_failed`, or `hold` and an
        `advance` for every part that could be launched. The tokens of the step before may be unknown, unless
        `Overlap` has a reason to wait for them; those of earlier steps are not.
        """
        self._sequences.retire()
        draft = Draft(self._max_num_batched_tokens)
        admits = not (self._static_batching and self.running)
        victim = self._make_way(draft) if admits and self._policy.preempts and self._memory.preempts else None
        preemptions = self.num_preemptions
        self._schedule_running(draft)
        if admits and self.num_preemptions == preemptions and (self.preempted or self.waiting):
            self._admit(draft, victim)
        return draft.freeze()

    def advance(self, plan: Plan) -> None:
        """Record that a step was launched: what it computes and samples, but for the tokens.

        In the order of the launches, each followed by a `resolve`, also in this order.
        """
        self._blocks.confirm()
        self._sequences.advance(plan)

    def resolve(
        self,
        plan: Plan,
        samples: SequenceABC[SequenceABC[int]],
        candidates: Mapping[int, Candidates] | None = None,
    ) -> list[ScheduledSequence]:
        """Record the tokens that a launched step has sampled, and end the sequences that they end.

        Args:
            plan: the step.
            samples: for every scheduled sequence its sampled tokens, ``num_samples`` of them; none for beams.
            candidates: of the beams, by their position in the plan.

        Returns:
            The scheduled sequences that ended after the launch, whose tokens count for nothing.
        """
        return self._sequences.resolve(plan, samples, candidates or {})

    def hold(self, scheduled: SequenceABC[ScheduledSequence]) -> list[ScheduledSequence]:
        """Keep the plan of a step that failed while it was computed, to be computed in parts.

        Moves of blocks have run; what these sequences have computed before is as it was, and what the step
        wrote is written again. Groups that were to read what others write in the same step lose their blocks:
        they could not run without them.

        Returns:
            What can be computed in any order, group by group, each followed by an `advance`.
        """
        self._blocks.revoke()
        dependent = readers_of_others(scheduled, self._blocks)
        self._start_again([group for group in self.running if group in dependent])
        return [item for item in scheduled if item.group not in dependent]

    def moves_failed(self) -> None:
        """Drop all blocks after an error in moving some: what they hold is unknown, and is computed again."""
        self._blocks.revoke()
        swapped = [group for group in self.preempted if group.status is Status.SWAPPED]
        self._start_again([*self.running, *swapped])

    def _start_again(self, groups: list[SequenceGroup], keep: bool = False) -> None:
        for group in groups:
            self._queues.remove(group)
            self._memory.drop(group, keep)
            self._queues.add(group)

    def _rank_by_cache(self, group: SequenceGroup) -> tuple[float, int]:
        num_cached = self._memory.needs(group)[0].num_tokens
        return self._policy.place(group, num_cached)

    # -- running groups ------------------------------------------------------------------------------

    def _schedule_running(self, draft: Draft) -> None:
        """Schedule the running groups in order of rank; preempt from the end where blocks are missing."""
        writable, scheduled = self._blocks.writable, draft.scheduled
        prefill_budget = None
        num_decoding = 0
        for group in self.running:  # preemption shortens the queue from its end
            if not group.prefilling and _have_slots(group.live, writable):
                for seq in group.live:
                    scheduled.append(ScheduledSequence(group, seq, seq.num_computed, 1, 1))
                num_decoding += len(group.live)
                continue
            if group.prefilling and prefill_budget is None:
                prefill_budget = self._prefill_budget()
            turn = self._turn(group, prefill_budget or 0)
            if prefill_budget is not None:
                prefill_budget -= sum(count for seq, count in turn if seq.num_pending > 1)
            for seq, _ in turn:
                self._memory.free_unread(group, seq)
            if self._preempt_until_it_fits(draft, group, turn):
                self._append(draft, group, turn)
        draft.budget -= num_decoding

    def _prefill_budget(self) -> int:
        """Return the number of tokens of a step that are left when every running sequence decodes."""
        decoding = sum(seq.num_pending == 1 for group in self.running for seq in group.live)
        return self._max_num_batched_tokens - decoding

    def _turn(self, group: SequenceGroup, prefill_budget: int) -> Turn:
        """Return the sequences of a group that compute tokens in this step, and how many."""
        turn = []
        for position, seq in enumerate(group.live):
            if position and not self._blocks.holds(seq.seq_id):
                continue  # it will be forked from the first one, which is computing the prompt
            num_tokens = seq.num_pending
            if num_tokens > 1:
                longest = self._memory.longest_step(group, seq, seq.num_computed)
                num_tokens = min(num_tokens, prefill_budget, longest)
                prefill_budget -= num_tokens
            if num_tokens > 0:
                turn.append((seq, num_tokens))
        return turn

    def _preempt_until_it_fits(self, draft: Draft, group: SequenceGroup, turn: Turn) -> bool:
        """Preempt the groups that rank last until there are blocks for the turn of a running group.

        Returns:
            False where the group itself has been preempted.
        """
        while not self._admission.fits_now(turn):
            victim = self.running.pop()
            self._preempt(victim, draft)
            if victim is group:
                return False
        return True

    def _append(self, draft: Draft, group: SequenceGroup, turn: Turn, num_stored: int = 0) -> None:
        """Take blocks for the tokens of a turn and schedule them.

        Args:
            num_stored: number of the first tokens whose keys and values are in shared blocks already.
        """
        writable = self._blocks.writable
        for seq, num_tokens in turn:
            start = seq.num_computed
            has_slot = not group.prefilling and start < writable[seq.seq_id]
            if num_tokens > num_stored and not has_slot:
                keys = self._memory.keys(group, seq, start + num_tokens)
                draft.copies += self._blocks.append(seq.seq_id, start, num_tokens, keys)
            num_samples = 0
            if start + num_tokens == len(seq.token_ids) and not group.is_prefix:
                num_samples = 1 if group.forked else group.width
            item = ScheduledSequence(group, seq, start, num_tokens, num_samples, num_stored)
            draft.scheduled.append(item)
            draft.budget -= num_tokens

    def _preempt(self, group: SequenceGroup, draft: Draft) -> None:
        """Take the blocks of a group that is in no queue any more."""
        self.num_preemptions += 1
        if self._preemption.swaps(group, self._blocks):
            draft.swap_out += self._blocks.swap_out([seq.seq_id for seq in group.live])
            group.status = Status.SWAPPED
        else:
            self._blocks.note("recompute", [seq.seq_id for seq in group.live])
            self._memory.drop(group)
        self._queues.add(group)

    # -- groups without blocks -----------------------------------------------------------------------

    def _admit(self, draft: Draft, victim: SequenceGroup | None) -> None:
        """Admit preempted and waiting groups in order of rank, as long as all that they hold fits.

        Args:
            victim: the first in order that was preempted in this step; it waits for the next one.
        """
        seats = self._admission.num_seats_left(self.running)
        promised = self._admission.num_promised(self.running)
        if self._policy.num_reranked and seats and promised < self._blocks.gpu.num_free:
            self._queues.rerank(self._policy.num_reranked, self._rank_by_cache)
        while (group := self._queues.next_to_admit()) is not None and group is not victim:
            reserved = promised + self._admission.num_reserved(group, self.running)
            if group.num_seats > seats or reserved > self._blocks.gpu.num_free:
                return  # before its prompt is looked for in the cache
            found, needed = self._memory.needs(group)
            first = group.live[0]
            if group.status is Status.SWAPPED:
                decodes = sum(seq.num_pending == 1 for seq in group.live)
                turn = self._turn(group, draft.budget - decodes) if decodes <= draft.budget else []
                cached = stored = 0
            else:
                # A full hit still computes the last token, for what comes after it, but does not write it.
                cached = min(found.num_tokens, len(first.token_ids) - 1)
                stored = found.num_tokens - cached
                longest = self._memory.longest_step(group, first, cached)
                count = min(len(first.token_ids) - cached, draft.budget, longest)
                turn = [(first, count)] if count > 0 else []
            if not turn or needed + reserved > self._blocks.gpu.num_free:
                if group.status is not Status.SWAPPED or self.running:
                    return
                # It has a copy of its own of blocks that a prefix was given since, and never fits beside it.
                self._blocks.note("recompute", [seq.seq_id for seq in group.live])
                self._start_again([group], keep=True)
                continue
            self._queues.remove(group)
            if group.status is Status.SWAPPED:
                draft.swap_in += self._blocks.swap_in([seq.seq_id for seq in group.live])
            else:
                self._memory.start(group, found)
                first.num_computed = cached
                if self._memory.reads_cache(group):
                    self.num_prefix_queries += len(first.token_ids)
                    self.num_prefix_hits += cached
            if group.first_scheduled is None:
                group.first_scheduled, group.num_cached_tokens = time.monotonic(), cached
            group.status = Status.RUNNING
            self._queues.add(group)
            self._append(draft, group, turn, stored)
            seats -= group.num_seats
            if len(group.live) > 1 or turn[0][1] < first.num_pending:
                promised += self._memory.missing(group)

    def _make_way(self, draft: Draft) -> SequenceGroup | None:
        """Preempt groups that rank after the next one to be admitted, if it fits then.

        Returns:
            The victim that ranks first; None where there is none.
        """
        group, victim = self._queues.next_to_admit(), None
        if group is None or not self.running or group.rank > self.running[-1].rank:
            return None
        above = [other for other in self.running if other.rank < group.rank]
        below = self.running[len(above) :]
        freed = self._blocks.num_distinct(seq.seq_id for other in below for seq in other.live)
        if not self._admission.fits(group, above, freed):
            return None
        while len(self.running) > len(above) and not self._admission.fits(group, self.running):
            victim = self.running.pop()
            self._preempt(victim, draft)
        return victim


def _have_slots(live: list[Sequence], writable: Mapping[int, int]) -> bool:
    """Return whether each sequence can write its next token into a block that it has."""
    for seq in live:  # noqa: SIM110  `all` over a generator takes twice as long
        if seq.num_computed >= writable[seq.seq_id]:
            return False
    return True
