"""Who computes how many tokens in the next step, who waits, who loses its blocks. No torch.

One token budget serves prefill and decode: every running sequence decodes one token, what is left of the
budget prefills prompts in chunks, in the order of rank: first come first served, or by priority and then so.
A request is a sequence group, scheduled and preempted as a whole; the one that ranks last is preempted first,
and nothing is admitted before what ranks above it and is preempted (paper, section 4.5).

Planning costs what changes. A group that decodes into slots it has costs a comparison a sequence; block
tables, counts and hashes are touched when a sequence needs a block, which is once in a block.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC

from ..memory.block_manager import BlockManager
from ..memory.prefix_hash import root_key
from .admission_check import Capacity
from .beam_search import advance
from .contiguous_memory import group_memory
from .group_memory import Room
from .pinned_prefixes import PinnedPrefixes
from .preemption import Preemption
from .request import Beams, Candidates, Sequence, SequenceGroup, Status
from .step_plan import Draft, Plan, ScheduledSequence

Turn = list[tuple[Sequence, int]]  # sequences and how many tokens each computes


class Scheduler:
    """Owns the queues and asks the block manager for memory.

    Args:
        blocks: the block manager.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of one step.
        max_model_len: most tokens of a sequence.
        preemption: what becomes of the blocks of preempted groups.
        eos_token_ids: tokens that end a sequence unless its request ignores them.
        enable_prefix_caching: look for blocks that hold the beginning of a prompt already.
        by_priority: rank requests by their priority first, lower ones before higher.
        memory_policy: one of `MEMORY_POLICIES`.
        static: admit a batch when the one before has ended, and nothing meanwhile.
        window: maximum number of tokens that a token sees in any layer, its own included; None where a layer
            sees all. Blocks that no token to come sees are given back.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        preemption: Preemption,
        eos_token_ids: frozenset[int],
        enable_prefix_caching: bool = True,
        by_priority: bool = False,
        memory_policy: str = "paged",
        static: bool = False,
        window: int | None = None,
    ) -> None:
        self._blocks = blocks
        self._max_num_batched_tokens = max_num_batched_tokens
        self._preemption = preemption
        self._eos_token_ids = eos_token_ids
        self._memory = group_memory(memory_policy, blocks, enable_prefix_caching, max_model_len, window)
        self._room = Room(blocks, self._memory, max_num_seqs)
        self._by_priority = by_priority
        self._makes_way = by_priority and self._memory.preempts
        self._static = static
        self._next_seq_id = 0
        # Each is in order of rank. What runs ranks before what is preempted and what waits, unless something
        # that ranks before it has come and does not fit yet.
        self.waiting: list[SequenceGroup] = []
        self.preempted: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.pinned = PinnedPrefixes()
        self._capacity = Capacity(blocks, self._memory, self.pinned, max_num_seqs, max_model_len)
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens of admitted groups, and those of them that were in the cache
        self.num_prefix_hits = 0

    # -- requests ------------------------------------------------------------------------------------

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.preempted or self.running)

    def add(self, group: SequenceGroup, seed: int) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run, however long it waited.
        """
        self._prepare(group, seed)
        self._capacity.check(group)
        params = group.params
        group.stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            group.stop_ids |= self._eos_token_ids
        if params.beam_width:
            group.beams = Beams()
        insort(self.waiting, group, key=_rank)

    def abort(self, group: SequenceGroup) -> None:
        """End a request wherever it is and free what it holds."""
        for seq in list(group.live):
            self.finish(group, seq, "abort")

    def finish(
        self, group: SequenceGroup, seq: Sequence, reason: str, stop_reason: str | int | None = None
    ) -> None:
        """End one sequence and free its blocks; with the last one the group leaves the queues."""
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        group.live.remove(seq)
        group.num_seats -= 1
        self._memory.release(group, seq)
        if not group.live:
            self._queue_of(group).remove(group)
            group.status = Status.FINISHED

    def fork(self, group: SequenceGroup, parent: Sequence, index: int) -> Sequence:
        """A further sequence of the group, with the parent's tokens."""
        child = self._new_sequence(group, index, parent.token_ids, parent.seed)
        self._memory.fork(group, parent, child)
        return child

    def drop(self, group: SequenceGroup, seq: Sequence) -> None:
        """Take a sequence out of its group as if it had never been, one of several."""
        group.live.remove(seq)
        group.seqs.remove(seq)
        self._memory.release(group, seq)

    # -- pinned prefixes -----------------------------------------------------------------------------

    def add_prefix(self, group: SequenceGroup) -> None:
        """Queue a prefix of full blocks, to be computed and then kept in memory until it is removed.

        Raises:
            ValueError: it does not fit beside what was promised to requests and other prefixes.
        """
        group.is_prefix = True
        self._prepare(group, seed=0)
        self._capacity.check_prefix(group, [*self.waiting, *self.preempted, *self.running])
        self.pinned.add(group)
        insort(self.waiting, group, key=_rank)

    def remove_prefix(self, prefix_id: str) -> None:
        """Let go of a prefix; its blocks stay in the cache until their memory is needed.

        Raises:
            KeyError: there is none of this name.
        """
        group = self.pinned.remove(prefix_id)
        if group.status is not Status.PINNED:
            self._queue_of(group).remove(group)
        self._memory.release(group, group.live.pop())
        group.status = Status.FINISHED

    def num_pinned_blocks(self) -> int:
        """Blocks that the prefixes computed so far hold."""
        groups = self.pinned.groups.values()
        done = [g.live[0].seq_id for g in groups if g.status is Status.PINNED]
        return self._blocks.num_distinct(done)

    # -- a step --------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Plan the next step and take the blocks it needs. The caller runs it, then calls `update`; or, after
        an error, `moves_failed`, or `hold` and an `update` for every part that could be computed."""
        draft = Draft(self._max_num_batched_tokens)
        admits = not (self._static and self.running)
        made_way = self._make_way(draft) if self._makes_way and admits else None
        preemptions = self.num_preemptions
        self._schedule_running(draft)
        if admits and self.num_preemptions == preemptions and (self.preempted or self.waiting):
            self._admit(draft, made_way)
        return draft.freeze()

    def update(
        self,
        plan: Plan,
        samples: SequenceABC[SequenceABC[int]],
        candidates: Mapping[int, Candidates] | None = None,
    ) -> None:
        """Record what a step computed.

        Args:
            plan: the step.
            samples: for every scheduled sequence its sampled tokens, ``num_samples`` of them; none for beams.
            candidates: of the beams, by their position in the plan.
        """
        self._blocks.confirm()
        prefilling = []
        searches: dict[SequenceGroup, Beams] = {}
        for position, found in (candidates or {}).items():
            item = plan.scheduled[position]
            beams = item.group.beams
            assert beams is not None
            beams.candidates[item.seq.seq_id] = found
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
            self._update_prefilling(prefilling)
        for group, beams in searches.items():
            self._advance_beams(group, beams)

    def hold(self, scheduled: SequenceABC[ScheduledSequence]) -> list[ScheduledSequence]:
        """After an error in computing a step, keep what it had planned, to be computed in parts.

        Moves of blocks have run; what these sequences have computed before is as it was, and what the step
        wrote is written again. Groups that were to read what others write in the same step lose their blocks:
        they could not run without them.

        Returns:
            What can be computed in any order, group by group, each followed by an `update`.
        """
        self._blocks.revoke()
        size = self._blocks.block_size
        writers: dict[int, SequenceGroup] = {}
        for item in scheduled:
            first, end = (item.start + item.num_stored) // size, item.start + item.num_tokens
            written = self._blocks.table(item.seq.seq_id)[first : self._blocks.blocks_for(end)]
            writers.update(dict.fromkeys(written, item.group))
        dependent = {
            item.group
            for item in scheduled
            for block in self._blocks.table(item.seq.seq_id)
            if writers.get(block, item.group) is not item.group
        }
        self._start_again([group for group in self.running if group in dependent])
        return [item for item in scheduled if item.group not in dependent]

    def moves_failed(self) -> None:
        """After an error in moving blocks nobody knows what they hold: all of them are computed again."""
        self._blocks.revoke()
        swapped = [group for group in self.preempted if group.status is Status.SWAPPED]
        self._start_again([*self.running, *swapped])

    def _start_again(self, groups: list[SequenceGroup]) -> None:
        for group in groups:
            self._queue_of(group).remove(group)
            self._memory.drop(group, keep=False)
            insort(self.preempted, group, key=_rank)

    # -- running groups ------------------------------------------------------------------------------

    def _schedule_running(self, draft: Draft) -> None:
        writable, scheduled = self._blocks.writable, draft.scheduled
        prefill_budget: int | None = None
        decoding = 0
        for group in self.running:  # the last of them are taken out while it goes on
            if not group.prefilling:
                before = len(scheduled)
                for seq in group.live:
                    start = seq.num_computed
                    if start >= writable[seq.seq_id]:
                        del scheduled[before:]
                        break
                    scheduled.append(ScheduledSequence(group, seq, start, 1, 1))
                else:
                    decoding += len(group.live)
                    continue
                turn = [(seq, 1) for seq in group.live]
            else:
                if prefill_budget is None:
                    prefill_budget = self._prefill_budget()
                turn = self._turn(group, prefill_budget)
                prefill_budget -= sum(n for seq, n in turn if seq.num_pending > 1)
            for seq, _ in turn:
                self._memory.free_unseen(group, seq)
            while not self._fits(turn):
                victim = self.running.pop()
                self._preempt(victim, draft)
                if victim is group:
                    return
            self._append(draft, group, turn)
        draft.budget -= decoding

    def _prefill_budget(self) -> int:
        """Tokens of a step that are left when every running sequence decodes."""
        decoding = sum(seq.num_pending == 1 for group in self.running for seq in group.live)
        return self._max_num_batched_tokens - decoding

    def _turn(self, group: SequenceGroup, prefill_budget: int) -> Turn:
        """The group's sequences that have a turn, and their tokens in this step."""
        turn = []
        for position, seq in enumerate(group.live):
            if position and not self._blocks.holds(seq.seq_id):
                continue  # it will be forked from the first one, which is computing the prompt
            num_tokens = seq.num_pending
            if num_tokens > 1:
                num_tokens = min(num_tokens, prefill_budget)
                prefill_budget -= num_tokens
            if num_tokens > 0:
                turn.append((seq, num_tokens))
        return turn

    def _fits(self, turn: Turn) -> bool:
        """Whether there are blocks for these tokens."""
        num_free = self._blocks.gpu.num_free
        if sum(num_tokens for _, num_tokens in turn) <= num_free:
            return True  # a token takes one block at most
        new = self._blocks.num_new_blocks([(seq.seq_id, seq.num_computed, n) for seq, n in turn])
        return new <= num_free

    def _append(self, draft: Draft, group: SequenceGroup, turn: Turn, num_stored: int = 0) -> None:
        writable = self._blocks.writable
        for seq, num_tokens in turn:
            start = seq.num_computed
            has_slot = not group.prefilling and start < writable[seq.seq_id]
            if num_tokens > num_stored and not has_slot:
                keys = self._memory.keys(group, seq, start + num_tokens)
                copy = self._blocks.append(seq.seq_id, start, num_tokens, keys)
                if copy is not None:
                    draft.copies.append(copy)
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
            self._memory.drop(group)
        insort(self.preempted, group, key=_rank)

    # -- groups without blocks -----------------------------------------------------------------------

    def _next(self) -> SequenceGroup | None:
        if self.preempted and not (self.waiting and self.waiting[0].rank < self.preempted[0].rank):
            return self.preempted[0]
        return self.waiting[0] if self.waiting else None

    def _admit(self, draft: Draft, made_way: SequenceGroup | None) -> None:
        """Bring back preempted groups and admit new ones, in order, while there is room for all they hold.

        Args:
            made_way: the first in order that was preempted in this step; it waits for the next one.
        """
        seats, promised = self._room.seats(self.running), self._room.promised(self.running)
        while (group := self._next()) is not None and group is not made_way:
            reserved = promised + self._room.reserve(self.running)
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
                in_blocks = len(found) * self._blocks.block_size
                cached = min(in_blocks, len(first.token_ids) - 1)
                stored = in_blocks - cached
                count = min(len(first.token_ids) - cached, draft.budget)
                turn = [(first, count)] if count > 0 else []
            if not turn or needed + reserved > self._blocks.gpu.num_free:
                return
            (self.waiting if group.status is Status.WAITING else self.preempted).pop(0)
            if group.status is Status.SWAPPED:
                draft.swap_in += self._blocks.swap_in([seq.seq_id for seq in group.live])
            else:
                self._memory.start(group, found)
                first.num_computed = cached
                if self._memory.reads_cache(group):
                    self.num_prefix_queries += len(first.token_ids)
                    self.num_prefix_hits += cached
            group.status = Status.RUNNING
            insort(self.running, group, key=_rank)
            self._append(draft, group, turn, stored)
            seats -= group.num_seats
            if len(group.live) > 1 or turn[0][1] < first.num_pending:
                promised += self._memory.missing(group)

    def _make_way(self, draft: Draft) -> SequenceGroup | None:
        """Preempt what ranks after the first that waits, if it fits then; gives the first of the victims."""
        group, victim = self._next(), None
        if group is None or not self.running or group.rank > self.running[-1].rank:
            return None
        above = [other for other in self.running if other.rank < group.rank]
        below = self.running[len(above) :]
        freed = self._blocks.num_distinct(seq.seq_id for other in below for seq in other.live)
        if not self._room.fits(group, above, freed):
            return None
        while len(self.running) > len(above) and not self._room.fits(group, self.running):
            victim = self.running.pop()
            self._preempt(victim, draft)
        return victim

    # -- sequences -----------------------------------------------------------------------------------

    def _prepare(self, group: SequenceGroup, seed: int) -> None:
        group.rank = (group.priority if self._by_priority else 0, group.arrival)
        group.root_key = root_key(group.cache_salt)
        self._new_sequence(group, 0, group.prompt_token_ids, seed)

    def _new_sequence(self, group: SequenceGroup, index: int, token_ids: list[int], seed: int) -> Sequence:
        seq = Sequence(self._next_seq_id, index, list(token_ids), group.prompt_len, seed)
        self._next_seq_id += 1
        group.seqs.append(seq)
        group.live.append(seq)
        return seq

    def _update_prefilling(self, computed: list[tuple[ScheduledSequence, SequenceABC[int]]]) -> None:
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
                self.running.remove(group)
                group.status = Status.PINNED
            elif group.forked and all(
                seq.num_pending == 1 and self._blocks.holds(seq.seq_id) for seq in group.live
            ):
                group.prefilling = False

    def _advance_beams(self, group: SequenceGroup, beams: Beams) -> None:
        """One step of beam search; while beams are recomputed the first to be ready wait for the others."""
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

    def _queue_of(self, group: SequenceGroup) -> list[SequenceGroup]:
        if group.status is Status.RUNNING:
            return self.running
        return self.waiting if group.status is Status.WAITING else self.preempted


def _rank(group: SequenceGroup) -> tuple[int, int]:
    return group.rank
