"""Where every slot of the memory is, against counts made by hand and one slot at a time."""

from __future__ import annotations

import random

import pytest

from benchmarks.memory_use import MemoryUse, memory_use
from cupaged.engine import SamplingParams
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.scheduling.request import Sequence, SequenceGroup

from .simulation import Simulation


def group_of(*lengths: int) -> SequenceGroup:
    """Running sequences of so many computed tokens, with ids from 0."""
    group = SequenceGroup("r", None, [1, 2, 3], SamplingParams(), 50, 0)
    group.live = [Sequence(i, i, [0] * length, 3, 0, num_computed=length) for i, length in enumerate(lengths)]
    return group


def test_every_kind_of_waste_is_counted():
    """Ten blocks of 4: one sequence of 6 tokens in 3 blocks that will have 9."""
    blocks = BlockManager(10, 0, 4)
    blocks.append(0, 0, 12)
    use = memory_use(blocks, [group_of(6)], lambda group, seq: 9)
    assert use == MemoryUse(stored=6, reserved=3, internal=3, external=0, free=28, unshared=12)
    assert (use.allocated, use.utilisation, use.saved_by_sharing) == (12, 0.5, 0)
    use = memory_use(blocks, [group_of(6)], lambda group, seq: 9, contiguous=True)
    assert (use.external, use.free, use.utilisation) == (28, 0, 6 / 40)


def test_what_is_shared_counts_once():
    """Two sequences share one full block of 4; each has a second one of its own, with 3 and 1 tokens."""
    blocks = BlockManager(10, 0, 4)
    blocks.append(0, 0, 4)
    blocks.fork(0, 1, 4)
    blocks.append(0, 4, 3)
    blocks.append(1, 4, 1)
    use = memory_use(blocks, [group_of(7, 5)], lambda group, seq: 8)
    assert use == MemoryUse(stored=8, reserved=4, internal=0, external=0, free=28, unshared=16)
    assert use.saved_by_sharing == 0.25


def test_a_shared_slot_is_reserved_if_one_of_its_holders_needs_it():
    blocks = BlockManager(10, 0, 4)
    blocks.append(0, 0, 1)
    blocks.fork(0, 1, 1)
    for ends in ((4, 2), (2, 4)):
        use = memory_use(blocks, [group_of(1, 1)], lambda group, seq, ends=ends: ends[seq.index])
        assert (use.stored, use.reserved, use.internal) == (1, 3, 0)


def test_nothing_in_use_wastes_nothing():
    use = memory_use(BlockManager(10, 0, 4), [], lambda group, seq: 8)
    assert (use.free, use.utilisation, use.saved_by_sharing) == (40, 1.0, 0.0)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_a_running_load_adds_up(mode, seed):
    """With forks, preemption and the prefix cache: what is stored is what the simulated memory holds for
    those who run."""
    rng = random.Random(seed)
    simulation = Simulation(num_blocks=24, num_cpu_blocks=24, mode=mode, seed=seed)
    common = simulation.prompt(8)
    for _ in range(20):
        prompt = common[: rng.randrange(9)] + simulation.prompt(rng.randrange(1, 12))
        simulation.add(prompt, rng.randrange(1, 12), rng.choice([1, 1, 2, 4]))
    blocks, size = simulation.blocks, 4
    shared = 0
    while simulation.scheduler.has_unfinished():
        simulation.step()
        running = simulation.scheduler.running
        use = memory_use(blocks, running, lambda group, seq: group.prompt_len + group.max_tokens - 1)
        slots, tables = set(), []
        for seq in (seq for group in running for seq in group.live if blocks.holds(seq.seq_id)):
            tables.append(list(blocks.table(seq.seq_id)))
            slots |= {(tables[-1][i // size], i % size) for i in range(seq.num_computed)}
        assert use.stored == len(slots)
        assert use.allocated == size * len({block for table in tables for block in table})
        assert use.unshared == size * sum(map(len, tables))
        assert use.free == size * blocks.gpu.num_free
        assert use.allocated + use.free == size * 24
        assert min(use.reserved, use.internal) >= 0
        assert use.internal < size * max(1, len(tables)), "less than a block of each"
        shared = max(shared, use.saved_by_sharing)
    assert shared > 0
