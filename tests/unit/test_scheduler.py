"""The scheduler's promises in drawn loads, with a simulated model behind it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupaged.engine import SamplingParams
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.request import SequenceGroup, Status
from cupaged.engine.scheduler import Scheduler
from tests.unit.paged_memory import PagedMemory

EOS = 99


class Simulation:
    """Steps a scheduler, computes in a simulated memory, and checks every promise after every step."""

    def __init__(
        self,
        *,
        num_blocks: int,
        num_cpu_blocks: int = 0,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        swap: bool = False,
        seed: int = 0,
        eos_chance: float = 0.0,
    ) -> None:
        self.blocks = BlockManager(num_blocks, num_cpu_blocks, block_size)
        self.memory = PagedMemory(self.blocks)
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.max_model_len = num_blocks * block_size
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs, budget, self.max_model_len, swap, frozenset([EOS])
        )
        self.random = random.Random(seed)
        self.eos_chance = eos_chance
        self.groups: list[SequenceGroup] = []
        self.num_swaps = 0

    def add(self, prompt_len: int, max_tokens: int, n: int = 1) -> SequenceGroup:
        prompt = [self.random.randrange(EOS) for _ in range(prompt_len)]
        max_tokens = min(max_tokens, self.max_model_len - prompt_len)
        params = SamplingParams(n=n, max_tokens=max(1, max_tokens))
        group = SequenceGroup("r", None, prompt, params, max_tokens, len(self.groups))
        self.scheduler.add(group, self.random.getrandbits(64))
        self.groups.append(group)
        return group

    def unfinished(self) -> list[SequenceGroup]:
        return [group for group in self.groups if not group.finished]

    def step(self) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting)
        oldest = self.unfinished()[0]
        plan = scheduler.schedule()
        self.num_swaps += len(plan.swap_out)
        self.check_queues(waiting)

        assert sum(item.num_tokens for item in plan.scheduled) <= self.budget
        assert oldest in [item.group for item in plan.scheduled], "the oldest request starves"
        assert len({item.seq.seq_id for item in plan.scheduled}) == len(plan.scheduled)
        self.memory.move(plan.swap_out, plan.swap_in, plan.copies)
        for item in plan.scheduled:
            assert item.group.status is Status.RUNNING
            assert item.start == item.seq.num_computed
            assert item.num_tokens >= 1
        for group in scheduler.running:  # a group decodes as one
            planned = [item.seq for item in plan.scheduled if item.group is group]
            decoding = [seq for seq in group.unfinished() if seq.num_pending == 1]
            if planned or group is oldest:
                assert not [seq for seq in decoding if seq not in planned]
        # Writes first: a block that a step shares wrongly is read wrongly.
        for item in plan.scheduled:
            end = item.start + item.num_tokens
            self.memory.write(item.seq.seq_id, item.start, item.seq.token_ids[:end])
        samples = []
        for item in plan.scheduled:
            end = item.start + item.num_tokens
            self.memory.check(item.seq.seq_id, item.seq.token_ids[:end])
            assert bool(item.num_samples) == (end == len(item.seq.token_ids))
            first = len(item.group.seqs) == 1
            assert item.num_samples in ((0, item.group.params.n) if first else (0, 1))
            samples.append([self.draw() for _ in range(item.num_samples)])
        scheduler.update(plan, samples)
        self.blocks.check_integrity()
        self.memory.poison_free()

    def draw(self) -> int:
        return EOS if self.random.random() < self.eos_chance else self.random.randrange(EOS)

    def check_queues(self, waiting_before: list[SequenceGroup]) -> None:
        scheduler = self.scheduler
        for queue in (scheduler.running, scheduler.preempted, list(scheduler.waiting)):
            arrivals = [group.arrival for group in queue]
            assert arrivals == sorted(arrivals)
        # Running are the earliest, then the preempted: the latest lost its blocks first.
        order = [g.arrival for g in (*scheduler.running, *scheduler.preempted, *scheduler.waiting)]
        assert order == sorted(order)
        assert order == [group.arrival for group in self.unfinished()]
        if len(scheduler.waiting) < len(waiting_before):
            assert not scheduler.preempted, "something new was admitted while something is preempted"
        seats = sum(
            group.params.n if len(group.seqs) == 1 else len(group.unfinished()) for group in scheduler.running
        )
        assert seats <= self.max_num_seqs
        for group in scheduler.preempted:
            assert group.status in (Status.PREEMPTED, Status.SWAPPED)
            holders = [seq for seq in group.unfinished() if self.blocks.holds(seq.seq_id)]
            assert bool(holders) == (group.status is Status.SWAPPED), "a group loses all its blocks or none"
        for group in scheduler.waiting:
            assert not any(self.blocks.holds(seq.seq_id) for seq in group.seqs)

    def run(self, limit: int = 10000) -> None:
        while self.scheduler.has_unfinished():
            limit -= 1
            assert limit, "requests do not finish"
            self.step()
        assert not self.unfinished()
        assert self.blocks.gpu.num_free == self.blocks.gpu.num_blocks
        assert self.blocks.cpu.num_free == self.blocks.cpu.num_blocks
        for group in self.groups:
            for seq in group.seqs:
                if seq.finish_reason == "length":
                    assert seq.num_output_tokens == group.max_tokens
                elif seq.finish_reason == "stop":
                    assert seq.token_ids[-1] == EOS
                assert seq.token_ids[: seq.prompt_len] == group.prompt_token_ids


REQUEST = st.tuples(
    st.integers(1, 40),  # tokens of the prompt
    st.integers(1, 25),  # of an output
    st.sampled_from([1, 1, 1, 2, 3, 4]),  # outputs
    st.sampled_from([0, 0, 1, 5]),  # steps until the next arrives
    st.integers(0, 30),  # step after which it is aborted, if it is
    st.sampled_from([False, False, False, False, True]),  # whether it is
)


@given(
    requests=st.lists(REQUEST, min_size=6, max_size=14),
    num_blocks=st.integers(6, 30),
    num_cpu_blocks=st.integers(0, 24),
    block_size=st.sampled_from([1, 2, 4, 8]),
    max_num_seqs=st.sampled_from([8, 6, 4, 3, 2, 1]),
    more_budget=st.integers(0, 24),
    swap=st.booleans(),
    seed=st.integers(0, 2**32),
    eos_chance=st.sampled_from([0.0, 0.05]),
)
@settings(max_examples=300, deadline=None, print_blob=True)
def test_any_load_is_served_in_order(
    requests, num_blocks, num_cpu_blocks, block_size, max_num_seqs, more_budget, swap, seed, eos_chance
):
    simulation = Simulation(
        num_blocks=num_blocks,
        num_cpu_blocks=num_cpu_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + more_budget,
        swap=swap,
        seed=seed,
        eos_chance=eos_chance,
    )
    aborts: list[tuple[int, SequenceGroup]] = []
    step = 0

    def advance() -> None:
        nonlocal step
        for when, group in aborts:
            if when <= step and not group.finished:
                simulation.scheduler.abort(group)
        simulation.blocks.check_integrity()
        if simulation.scheduler.has_unfinished():
            simulation.step()
        step += 1

    for prompt_len, max_tokens, n, wait, abort_after, aborted in requests:
        try:
            group = simulation.add(prompt_len, max_tokens, n)
        except ValueError:
            assert prompt_len >= simulation.max_model_len or n > 1, "a single output that fits is refused"
            continue
        if aborted:
            aborts.append((step + abort_after, group))
        for _ in range(wait):
            advance()
    while aborts and step <= max(when for when, _ in aborts):
        advance()
    simulation.run()


def test_a_request_that_needs_exactly_the_pool_runs_and_one_block_more_is_refused():
    """Prompt of 1.5 blocks, 3 outputs to the end of the 2nd: one block shared, three of their own."""
    simulation = Simulation(num_blocks=4)
    simulation.add(6, 3, n=3)
    with pytest.raises(ValueError, match="may need 7 blocks"):
        simulation.add(6, 4, n=3)
    simulation.run()


def test_refusals_name_the_limit():
    simulation = Simulation(num_blocks=4, max_num_seqs=3)
    with pytest.raises(ValueError, match="max_model_len"):
        simulation.add(16, 1)
    with pytest.raises(ValueError, match="max_num_seqs"):
        simulation.add(2, 1, n=4)
    assert not simulation.scheduler.has_unfinished()


def test_the_latest_is_preempted_first_and_comes_back_before_anything_new():
    """Two requests of two blocks that grow in a pool of five; a third waits."""
    simulation = Simulation(num_blocks=5, budget=32)
    first, second = simulation.add(8, 9), simulation.add(8, 4)
    simulation.step()
    third = simulation.add(1, 1)
    statuses = []
    while not first.finished:
        simulation.step()
        statuses.append((second.status, third.status))
    assert (Status.PREEMPTED, Status.WAITING) in statuses
    assert (Status.PREEMPTED, Status.RUNNING) not in statuses
    assert simulation.scheduler.num_preemptions == 1
    simulation.run()


@pytest.mark.parametrize(("num_cpu_blocks", "status"), [(5, Status.SWAPPED), (1, Status.PREEMPTED)])
def test_a_group_is_swapped_as_a_whole_or_dropped_as_a_whole(num_cpu_blocks, status):
    """Of the second request's outputs none stays; where the swap space is too small all are dropped."""
    simulation = Simulation(num_blocks=6, num_cpu_blocks=num_cpu_blocks, swap=True, budget=32)
    first, second = simulation.add(8, 12), simulation.add(6, 6, n=2)
    while second.status not in (Status.PREEMPTED, Status.SWAPPED):
        simulation.step()
    assert second.status is status
    assert len(second.unfinished()) == 2
    assert first.status is Status.RUNNING
    while second.status is not Status.RUNNING or not all(seq.num_computed for seq in second.seqs):
        simulation.step()
    tables = [simulation.blocks.table(seq.seq_id) for seq in second.seqs]
    assert tables[0][0] == tables[1][0], "the prompt's full block is shared again"
    assert bool(simulation.num_swaps) == (status is Status.SWAPPED)
    simulation.run()


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes():
    """Every running sequence decodes in every step, whatever the prompt takes."""
    simulation = Simulation(num_blocks=64, budget=8)
    first = simulation.add(3, 20)
    simulation.step()
    long = simulation.add(30, 1)
    for step in range(1, 5):
        simulation.step()
        assert first.seqs[0].num_output_tokens == step + 1
        assert long.seqs[0].num_computed == 7 * step
    simulation.run()
