"""Count the tokens that fit into the same memory, by the way it is divided among layers of several kinds.

    python benchmarks/layer_groups.py [--steps 3000]

Requests wait all the time, and the scheduler admits as many as fit. "one table": each block of 16 tokens has
the bytes of all layers, for every token. "fixed split": each layer group has a part of the memory, in the
proportions of a sequence of the maximum length, and the one that holds fewest tokens counts. "layer groups":
one pool for all. What counts are the tokens of all running sequences, on average over the last two thirds of
the steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.layer_groups import ONE_GROUP, LayerGroup, ReadAll, ReadState, ReadWindow
from cupaged.engine.scheduling.preemption import Preemption
from cupaged.engine.scheduling.request import SequenceGroup
from cupaged.engine.scheduling.scheduler import Scheduler

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN, BUDGET = 16, 20_000, 16_384, 2048


@dataclass(frozen=True)
class Load:
    """A kind of model: its layer groups, whose blocks have the same bytes; and how long its sequences are."""

    layer_groups: tuple[LayerGroup, ...]
    mean_prompt: int


def windows(count: int) -> tuple[LayerGroup, ...]:
    """Return groups of layers with a window of 1024 tokens."""
    return tuple(LayerGroup(f"window {i}", ReadWindow(1024)) for i in range(count))


def states(count: int) -> tuple[LayerGroup, ...]:
    """Return groups whose state takes a block each, kept every 1024 tokens."""
    return tuple(LayerGroup(f"state {i}", ReadState(), scale=1024 // BLOCK_SIZE) for i in range(count))


FULL = (LayerGroup("full", ReadAll()),)
LOADS = {
    "5 windows : 1 full, short prompts": Load((*FULL, *windows(5)), 1000),
    "5 windows : 1 full": Load((*FULL, *windows(5)), 6000),
    "8 states : 1 full, short prompts": Load((*FULL, *states(8)), 250),
    "8 states : 1 full": Load((*FULL, *states(8)), 2000),
}


def held(load: Load, groups: tuple[LayerGroup, ...], num_blocks: int, num_steps: int) -> float:
    """Return the mean number of tokens of running sequences."""
    rng = random.Random(0)
    blocks = BlockManager(num_blocks, 0, BLOCK_SIZE, layer_groups=groups, max_step_tokens=BUDGET)
    scheduler = Scheduler(
        EngineConfig(max_num_seqs=BUDGET, max_num_batched_tokens=BUDGET, enable_prefix_caching=False),
        blocks=blocks,
        preemption=Preemption("recompute"),
        max_model_len=MAX_LEN,
        eos_token_ids=frozenset(),
    )
    tokens = []
    for arrival in range(10**9):
        while len(scheduler.waiting) < 4:
            prompt = [0] * min(MAX_LEN - 1000, 1 + int(rng.expovariate(1 / load.mean_prompt)))
            length = rng.randint(50, 500)
            params = SamplingParams(max_tokens=length, ignore_eos=True)
            name = f"{arrival}-{len(scheduler.waiting)}"
            scheduler.add(SequenceGroup(name, None, prompt, params, length, arrival), 0)
        plan = scheduler.schedule()
        scheduler.advance(plan)
        scheduler.resolve(plan, [[0] * item.num_samples for item in plan.scheduled])
        if arrival > num_steps // 3:
            tokens.append(sum(seq.num_computed for group in scheduler.running for seq in group.live))
        if arrival > num_steps:
            break
    blocks.check_integrity()
    return statistics.mean(tokens)


def one_table(load: Load, num_steps: int) -> float:
    """Return the tokens held where every token has memory in all layers."""
    return held(load, ONE_GROUP, NUM_BLOCKS // len(load.layer_groups), num_steps)


def fixed_split(load: Load, num_steps: int) -> float:
    """Return the tokens held where each layer group has a part of the memory."""
    blocks = BlockManager(1, 0, BLOCK_SIZE, layer_groups=load.layer_groups, max_step_tokens=BUDGET)
    longest = {tables.layer_group: tables.num_held(MAX_LEN, 0, 0, 1) for tables in blocks.layers}
    kinds = {count: group for group, count in longest.items()}  # groups alike hold as many tokens
    share = NUM_BLOCKS / sum(longest.values())
    return min(held(load, (group,), int(count * share), num_steps) for count, group in kinds.items())


def layer_groups(load: Load, num_steps: int) -> float:
    """Return the tokens held by layer groups that draw from one pool."""
    return held(load, load.layer_groups, NUM_BLOCKS, num_steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="steps of each load (default: 3000)")
    options = parser.parse_args()
    print("| model | one table | fixed split | layer groups |\n| --- | --- | --- | --- |")
    for name, load in LOADS.items():
        figures = [divide(load, options.steps) for divide in (one_table, fixed_split, layer_groups)]
        print(f"| {name} | " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
