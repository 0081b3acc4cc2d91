"""Contiguous runs from a buddy allocator, and what the policies without paging promise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupaged.engine.config import MEMORY_POLICIES
from cupaged.engine.scheduling.contiguous_memory import BuddyAllocator, longest
from cupaged.engine.scheduling.request import SequenceGroup, Status

from .simulation import Simulation

CONTIGUOUS = MEMORY_POLICIES[1:]


@settings(max_examples=60)
@given(st.integers(1, 70), st.lists(st.tuples(st.booleans(), st.integers(1, 70)), max_size=60))
def test_runs_never_meet_and_come_back_whole(num_blocks, actions):
    buddy = BuddyAllocator(num_blocks)
    largest = buddy.num_available(longest("orca-max", num_blocks))
    runs: dict[int, int] = {}
    for give_back, count in actions:
        if give_back and runs:
            start = sorted(runs)[count % len(runs)]
            buddy.free(start)
            del runs[start]
        elif buddy.num_available(count):
            before = buddy.num_available(count)
            start = buddy.allocate(count)
            size = 1 << (count - 1).bit_length()
            assert start % size == 0
            assert start + size <= num_blocks
            assert all(start + size <= other or other + length <= start for other, length in runs.items())
            assert buddy.num_available(count) == before - 1
            runs[start] = size
        buddy.check_integrity()
    for start in runs:
        buddy.free(start)
    buddy.check_integrity()
    assert buddy.num_available(longest("orca-max", num_blocks)) == largest >= 1
    assert buddy.num_available(1) == num_blocks


def test_what_can_be_taken_is_what_a_buddy_allocator_has():
    """13 blocks are 8, 4 and 1."""
    buddy = BuddyAllocator(13)
    assert [buddy.num_available(n) for n in (1, 2, 3, 4, 5, 8, 9, 16)] == [13, 6, 3, 3, 1, 1, 0, 0]
    first = buddy.allocate(3)  # the smallest run that holds it: the four
    assert first == 8
    assert [buddy.num_available(n) for n in (1, 4, 8)] == [9, 2, 1]
    assert buddy.allocate(1) == 12
    assert buddy.allocate(1) == 0  # half of a half of a half of the eight
    assert [buddy.num_available(n) for n in (1, 2, 4, 8)] == [7, 3, 1, 0]
    buddy.free(first)
    assert buddy.allocate(4) == 4, "the lowest of two"


def runs_of(simulation: Simulation, group: SequenceGroup) -> list[list[int]]:
    return [list(simulation.blocks.table(seq.seq_id)) for seq in group.live]


@pytest.mark.parametrize(
    ("policy", "tokens"), [("orca-max", 64), ("orca-pow2", 7 + 16), ("orca-oracle", 7 + 9 - 1)]
)
def test_an_output_has_its_run_from_its_first_step_to_its_end(policy, tokens):
    """Blocks of 4, a prompt of 7 tokens, 9 new ones, at most 64."""
    simulation = Simulation(num_blocks=64, max_model_len=64, memory_policy=policy)
    group = simulation.add(7, 9)
    simulation.step()
    tables = runs_of(simulation, group)
    start = tables[0][0]
    assert tables == [list(range(start, start - (-tokens // 4)))]
    while not group.finished:
        assert runs_of(simulation, group) == tables
        simulation.step()
    simulation.check_end()


@pytest.mark.parametrize("policy", MEMORY_POLICIES)
def test_as_many_start_at_once_as_their_runs_fit(policy, seed):
    """Prompts within a block of 8, of which there are 48, and up to 128 tokens. A run takes a power of two of
    blocks, and of empty memory the runs are taken without a gap. Where memory is paged everybody starts."""
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=48, block_size=8, max_model_len=128, max_num_seqs=36, budget=96, memory_policy=policy
    )
    groups = [
        simulation.add(rng.randrange(1, 9), rng.randrange(2, 100), rng.choice([1, 1, 1, 2, 3]))
        for _ in range(12)
    ]
    simulation.step()
    starting, left = [], 48
    for group in groups:
        tokens = {
            "paged": 1,
            "orca-max": 128,
            "orca-pow2": group.prompt_len + power_of_two(group.max_tokens),
            "orca-oracle": group.prompt_len + group.max_tokens - 1,
        }[policy]
        taken = group.width * power_of_two(-(-min(tokens, 128) // 8))
        if policy != "paged" and taken > left:
            break
        starting.append(group)
        left -= taken
    assert simulation.scheduler.running == starting
    simulation.run()


def power_of_two(number: int) -> int:
    """The first that is not less."""
    return next(2**i for i in range(10) if 2**i >= number)


@pytest.mark.parametrize("by_priority", [False, True])
@pytest.mark.parametrize("policy", CONTIGUOUS)
def test_a_load_runs_without_preemption_and_sharing(policy, by_priority, seed):
    """The simulation checks what is in every block that is read. Equal prompts, several outputs, ends that
    nobody foresaw, aborts and failed steps."""
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=rng.randrange(33, 60),
        max_model_len=64,
        memory_policy=policy,
        max_num_seqs=3 if by_priority else 8,  # the urgent would have to wait for seats, or make way
        scheduling_policy="priority" if by_priority else "fcfs",
        eos_chance=0.05,
        seed=seed,
    )
    prompt = simulation.prompt(16)
    for step in range(60):
        whole = prompt[: rng.randrange(17)] + simulation.prompt(rng.randrange(1, 8))
        n = 1 if policy == "orca-max" else rng.choice([1, 1, 2, 3])
        urgency = {"priority": rng.randrange(2)} if by_priority else {}
        simulation.add(whole, rng.randrange(1, 9), n, **urgency)
        if step % 20 == 7:
            simulation.scheduler.abort(rng.choice(simulation.unfinished()))
        if step == 31:
            simulation.fail()
        simulation.step()
        simulation.scheduler._memory._buddy.check_integrity()
        for group in simulation.scheduler.running:
            tables = runs_of(simulation, group)
            if group.forked:
                assert all(table == list(range(table[0], table[0] + len(table))) for table in tables)
            assert group.status is not Status.PREEMPTED
    simulation.run()
    assert simulation.scheduler.num_preemptions == simulation.num_copies == simulation.num_swaps == 0
    assert simulation.scheduler.num_prefix_hits == 0
    assert simulation.scheduler._memory._buddy.num_available(32) == 1


def test_what_can_never_get_its_run_is_refused():
    """24 blocks are runs of 16 and 8."""
    simulation = Simulation(num_blocks=24, max_model_len=64, memory_policy="orca-oracle")
    simulation.add(20, 13)  # eight blocks
    simulation.add(20, 13, n=3)
    with pytest.raises(ValueError, match=r"may need 32 blocks .* 4 outputs.* has 24"):
        simulation.add(20, 13, n=4)
    simulation.add(20, 14)  # nine, of sixteen
    with pytest.raises(ValueError, match="may need 32 blocks"):
        simulation.add(20, 14, n=2)
    simulation.run()


def test_a_static_batch_lets_nobody_join(seed):
    rng = random.Random(seed)
    simulation = Simulation(num_blocks=40, budget=24, static=True, seed=seed)
    for _ in range(20):
        simulation.add(rng.randrange(1, 12), rng.randrange(1, 12), rng.choice([1, 1, 2]))
    outputs, batches = sum(group.width for group in simulation.groups), 0
    while simulation.scheduler.has_unfinished():
        before = set(simulation.scheduler.running)
        simulation.step()
        now = set(simulation.scheduler.running)
        if before:
            assert now <= before
        else:
            batches += 1
    simulation.check_end()
    assert outputs / simulation.max_num_seqs <= batches < 20
