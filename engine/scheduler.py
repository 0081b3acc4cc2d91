"""Who computes how many tokens in the next step, who waits, who loses its blocks. No torch.

One token budget serves prefill and decode: every running sequence decodes one token, what is left of the
budget prefills prompts in chunks, first come first served. A request is a sequence group, scheduled and
preempted as a whole; the latest arrival is preempted first, and nothing new is admitted while anything is
preempted (paper, section 4.5).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

from .block_manager import BlockManager
from .request import Sequence, SequenceGroup, Status

BlockPairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens ``start`` to ``start + num_tokens - 1`` of a sequence, to be computed in this step."""

    group: SequenceGroup
    seq: Sequence
    start: int
    num_tokens: int
    num_samples: int  # tokens to sample after the last one; 0 while a prompt is not complete


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
class _Draft:
    """A plan in the making."""

    budget: int  # tokens left
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def freeze(self) -> Plan:
        return Plan(tuple(self.scheduled), tuple(self.swap_out), tuple(self.swap_in), tuple(self.copies))


class Scheduler:
    """Owns the queues and asks the block manager for memory.

    Args:
        blocks: the block manager.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of one step.
        max_model_len: most tokens of a sequence.
        swap: move the blocks of preempted groups to the swap space, if they fit.
        eos_token_ids: tokens that end a sequence unless its request ignores them.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        swap: bool,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._swap = swap
        self._eos_token_ids = eos_token_ids
        self._next_seq_id = 0
        # Each is in order of arrival. `running` stays so because only the latest is ever taken out of
        # turn, and nothing later is admitted before it is back.
        self.waiting: deque[SequenceGroup] = deque()
        self.preempted: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.num_preemptions = 0

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.preempted or self.running)

    def add(self, group: SequenceGroup, seed: int) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run, however long it waited.
        """
        params = group.params
        if group.prompt_len >= self._max_model_len:
            raise ValueError(
                f"the prompt has {group.prompt_len} tokens, and a sequence may have {self._max_model_len} "
                "(max_model_len), at least one of them sampled: shorten the prompt"
            )
        if params.n > self._max_num_seqs:
            raise ValueError(
                f"n is {params.n}, and at most {self._max_num_seqs} sequences run at once (max_num_seqs)"
            )
        # The last token of an output is never an input, so its keys and values are never stored.
        most = self._blocks.blocks_for(group.prompt_len + group.max_tokens - 1)
        shared = group.prompt_len // self._blocks.block_size
        needed = shared + params.n * (most - shared)
        if needed > self._blocks.gpu.num_blocks:
            raise ValueError(
                f"the request may need {needed} blocks of {self._blocks.block_size} tokens (prompt "
                f"{group.prompt_len}, max_tokens {group.max_tokens}, n {params.n}), and the KV cache has "
                f"{self._blocks.gpu.num_blocks}: ask for fewer tokens or give the engine more memory"
            )
        group.seqs.append(self._new_sequence(group, 0, group.prompt_token_ids, seed))
        self.waiting.append(group)

    def abort(self, group: SequenceGroup) -> None:
        """End a request wherever it is and free what it holds."""
        for seq in group.unfinished():
            self.finish(group, seq, "abort")

    def schedule(self) -> Plan:
        """Plan the next step and take the blocks it needs. The caller runs it, then calls `update`."""
        draft = _Draft(self._max_num_batched_tokens)
        preemptions = self.num_preemptions
        self._schedule_running(draft)
        if self.num_preemptions == preemptions and (self.preempted or self.waiting):
            self._admit(draft)
        return draft.freeze()

    def update(self, plan: Plan, samples: SequenceABC[SequenceABC[int]]) -> None:
        """Record what a step computed.

        Args:
            plan: the step.
            samples: for every scheduled sequence its sampled tokens, ``num_samples`` of them.
        """
        for item in plan.scheduled:
            item.seq.num_computed += item.num_tokens
            self._fork_waiting(item.group)
        for item, tokens in zip(plan.scheduled, samples):
            if not tokens:
                continue
            group = item.group
            for index in range(1, len(tokens)):  # the first step after the prompt of a request with n > 1
                child = self._new_sequence(group, index, group.prompt_token_ids, item.seq.seed)
                child.num_computed = group.prompt_len
                self._blocks.fork(item.seq.seq_id, child.seq_id, group.prompt_len)
                group.seqs.append(child)
            receivers = [item.seq] if len(tokens) == 1 else group.seqs
            for seq, token in zip(receivers, tokens):
                seq.token_ids.append(token)
                self._check_stop(group, seq)

    def finish(
        self, group: SequenceGroup, seq: Sequence, reason: str, stop_reason: str | int | None = None
    ) -> None:
        """End one sequence and free its blocks; with the last one the group leaves the queues."""
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        self._blocks.free(seq.seq_id)
        if not group.unfinished():
            self._remove(group)

    # -- running groups ------------------------------------------------------------------------------

    def _schedule_running(self, draft: _Draft) -> None:
        decodes = sum(seq.num_pending == 1 for group in self.running for seq in group.unfinished())
        prefill_budget = draft.budget - decodes
        index = 0
        while index < len(self.running):
            group = self.running[index]
            appends = self._appends(group, prefill_budget)
            while self._num_new_blocks(appends) > self._blocks.gpu.num_free:
                victim = self.running.pop()
                self._preempt(victim, draft)
                if victim is group:
                    return
            prefill_budget -= sum(n for seq, n in appends if seq.num_pending > 1)
            self._append(draft, group, appends)
            index += 1

    def _appends(self, group: SequenceGroup, prefill_budget: int) -> list[tuple[Sequence, int]]:
        """The group's sequences that have a turn, and their tokens in this step."""
        appends = []
        for position, seq in enumerate(group.unfinished()):
            if position and not self._blocks.holds(seq.seq_id):
                continue  # it will be forked from the first one, which is computing the prompt
            num_tokens = seq.num_pending
            if num_tokens > 1:
                num_tokens = min(num_tokens, prefill_budget)
                prefill_budget -= num_tokens
            if num_tokens > 0:
                appends.append((seq, num_tokens))
        return appends

    def _num_new_blocks(self, appends: list[tuple[Sequence, int]]) -> int:
        return self._blocks.num_new_blocks((seq.seq_id, seq.num_computed, n) for seq, n in appends)

    def _append(self, draft: _Draft, group: SequenceGroup, appends: list[tuple[Sequence, int]]) -> None:
        for seq, num_tokens in appends:
            copy = self._blocks.append(seq.seq_id, seq.num_computed, num_tokens)
            if copy is not None:
                draft.copies.append(copy)
            num_samples = 0
            if num_tokens == seq.num_pending:
                num_samples = group.params.n if len(group.seqs) == 1 else 1
            draft.scheduled.append(ScheduledSequence(group, seq, seq.num_computed, num_tokens, num_samples))
            draft.budget -= num_tokens

    def _preempt(self, group: SequenceGroup, draft: _Draft) -> None:
        self.num_preemptions += 1
        seqs = group.unfinished()
        seq_ids = [seq.seq_id for seq in seqs]
        if self._swap and self._blocks.can_swap_out(seq_ids):
            draft.swap_out += self._blocks.swap_out(seq_ids)
            group.status = Status.SWAPPED
        else:
            for seq in seqs:
                self._blocks.free(seq.seq_id)
                seq.num_computed = 0
            group.status = Status.PREEMPTED
        insort(self.preempted, group, key=lambda g: g.arrival)

    # -- groups without blocks -----------------------------------------------------------------------

    def _admit(self, draft: _Draft) -> None:
        """Bring back preempted groups, then admit new ones, while there is room for all they hold."""
        seats = self._max_num_seqs - sum(self._seats(group) for group in self.running)
        promised = sum(self._missing_blocks(group) for group in self.running)
        while self.preempted or self.waiting:
            group = self.preempted[0] if self.preempted else self.waiting[0]
            needed = self._missing_blocks(group)
            # A little memory stays free for the running to grow into, or they would evict the newcomer.
            reserve = max(1, self._blocks.gpu.num_blocks // 100) if self.running else 0
            turn = self._first_turn(group, draft.budget)
            if (
                not turn
                or self._seats(group) > seats
                or promised + needed + reserve > self._blocks.gpu.num_free
            ):
                return
            if self.preempted:
                self.preempted.pop(0)
            else:
                self.waiting.popleft()
            if group.status is Status.SWAPPED:
                draft.swap_in += self._blocks.swap_in([seq.seq_id for seq in group.unfinished()])
            group.status = Status.RUNNING
            self.running.append(group)
            self._append(draft, group, turn)
            seats -= self._seats(group)
            promised += self._missing_blocks(group)

    def _first_turn(self, group: SequenceGroup, budget: int) -> list[tuple[Sequence, int]]:
        """What a group computes in the step that admits it; nothing if its decodes do not fit the budget."""
        budget -= sum(seq.num_pending == 1 for seq in group.unfinished())
        return self._appends(group, budget) if budget >= 0 else []

    def _missing_blocks(self, group: SequenceGroup) -> int:
        """Blocks the group has yet to take to hold all its known tokens."""
        seqs = group.unfinished()
        shared = group.prompt_len // self._blocks.block_size
        held = [(seq.seq_id, seq.num_computed, seq.num_pending) for seq in seqs[:1]]
        missing = 0
        for seq in seqs[1:]:
            if self._blocks.holds(seq.seq_id):
                held.append((seq.seq_id, seq.num_computed, seq.num_pending))
            else:
                missing += self._blocks.blocks_for(len(seq.token_ids)) - shared
        missing += self._blocks.num_new_blocks(held)
        if group.status is Status.SWAPPED:
            missing += self._blocks.num_swapped_blocks(seq.seq_id for seq in seqs)
        return missing

    # -- sequences -----------------------------------------------------------------------------------

    def _seats(self, group: SequenceGroup) -> int:
        return group.params.n if len(group.seqs) == 1 else len(group.unfinished())

    def _new_sequence(self, group: SequenceGroup, index: int, token_ids: list[int], seed: int) -> Sequence:
        seq = Sequence(self._next_seq_id, index, list(token_ids), group.prompt_len, seed)
        self._next_seq_id += 1
        return seq

    def _fork_waiting(self, group: SequenceGroup) -> None:
        """After recomputing: give the prompt to the sequences that lost it with the first one."""
        seqs = group.unfinished()
        if len(seqs) < 2 or seqs[0].num_computed < group.prompt_len:
            return
        for seq in seqs[1:]:
            if seq.num_computed == 0:
                self._blocks.fork(seqs[0].seq_id, seq.seq_id, group.prompt_len)
                seq.num_computed = group.prompt_len

    def _check_stop(self, group: SequenceGroup, seq: Sequence) -> None:
        token = seq.token_ids[-1]
        if token in group.params.stop_token_ids:
            self.finish(group, seq, "stop", token)
        elif token in self._eos_token_ids and not group.params.ignore_eos:
            self.finish(group, seq, "stop")
        elif seq.num_output_tokens >= group.max_tokens:
            self.finish(group, seq, "length")

    def _remove(self, group: SequenceGroup) -> None:
        queue = {
            Status.WAITING: self.waiting,
            Status.PREEMPTED: self.preempted,
            Status.SWAPPED: self.preempted,
            Status.RUNNING: self.running,
        }[group.status]
        queue.remove(group)
        group.status = Status.FINISHED
