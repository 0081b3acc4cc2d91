"""Measure the host's time for a decode step whose model is one launch: what Python does between two replays.

    python benchmarks/host_time.py [--seqs 256] [--tokens 2000] [--out DIR]

The graph is a stand-in that launches nothing, and the logits are those of a few tokens, so that what remains
is the batch of the step (`StepInputs`), its copy to where graphs read it, the choice of the graph, and the
sampler. On a GPU a launch of the graph and of the sampler come on top. Lengths are drawn around ``--tokens``;
half of the sequences sample, with top-p and a seed of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

if __package__:
    from . import common
else:
    import common

from cupaged.engine import SamplingParams
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.model.decode_graphs import DecodeGraphs
from cupaged.engine.model.graph_buckets import Buckets
from cupaged.engine.model.kv_cache import KVCache, KVShape
from cupaged.engine.model.model_runner import shares_prefix
from cupaged.engine.model.step_inputs import StepInputs
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import ScheduledSequence

BLOCK_SIZE = 16
VOCABULARY = 16
CPU = torch.device("cpu")


class NoGraphs:
    """Make graphs that launch nothing."""

    def __call__(self) -> NoGraphs:
        return self

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        yield

    warming_up = capture

    def replay(self) -> None:
        pass


def steps(num_seqs: int, tokens: int) -> tuple[list[ScheduledSequence], BlockManager]:
    """Return a decode step of sequences with drawn lengths, which `grow` makes the next one."""
    rng = random.Random(0)
    blocks = BlockManager(num_seqs * (2 * tokens // BLOCK_SIZE + 10), 0, BLOCK_SIZE)
    scheduled = []
    for i in range(num_seqs):
        length = rng.randint(tokens // 2, tokens)
        params = SamplingParams(temperature=0) if i % 2 else SamplingParams(top_p=0.9, seed=i)
        prompt_len = length // 2
        token_ids = [rng.randrange(VOCABULARY) for _ in range(length)]
        seq = Sequence(i, 0, token_ids, prompt_len, i)
        group = SequenceGroup(str(i), None, token_ids[:prompt_len], params, 10**6, i, [seq])
        blocks.append(i, 0, length)
        scheduled.append(ScheduledSequence(group, seq, length - 1, 1, 1))
    return scheduled, blocks


def grow(scheduled: list[ScheduledSequence], blocks: BlockManager) -> None:
    for item in scheduled:
        item.seq.token_ids.append(0)
        item.start += 1
        blocks.append(item.seq.seq_id, item.start, 1)


def measure(num_seqs: int, tokens: int, num_steps: int) -> dict[str, list[float]]:
    """Return the seconds of the parts of each step."""
    scheduled, blocks = steps(num_seqs, tokens)
    cache = KVCache(KVShape(1, 1, BLOCK_SIZE, 8, torch.float32), 4, 0, CPU)
    buckets = Buckets(num_seqs, 2 * tokens, BLOCK_SIZE, with_prefixes=True)

    def forward(token_ids: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.ones(len(token_ids), VOCABULARY)

    graphs = DecodeGraphs(forward, cache, (None,), buckets, VOCABULARY, NoGraphs())
    graphs.capture()
    sampler, seconds = Sampler(frozenset()), {name: [] for name in ("inputs", "replay", "sample", "step")}
    for _ in range(num_steps):
        grow(scheduled, blocks)
        times = [time.perf_counter()]
        inputs = StepInputs.of(scheduled, blocks)
        shared = shares_prefix(inputs.block_tables, BLOCK_SIZE)
        times.append(time.perf_counter())
        logits = graphs.run(inputs, shared) if graphs.takes(inputs, cache) else None
        if logits is None:
            raise RuntimeError("there was no graph for the step")
        times.append(time.perf_counter())
        sampler.sample(logits, scheduled)
        times.append(time.perf_counter())
        parts = [*(end - start for start, end in pairwise(times)), times[-1] - times[0]]
        for name, part in zip(seconds, parts):
            seconds[name].append(part)
    return seconds


def main() -> int:
    wrapped = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=wrapped)
    parser.add_argument("--seqs", type=int, default=256, help="number of sequences")
    parser.add_argument("--tokens", type=int, default=2000, help="maximum number of tokens at the start")
    parser.add_argument("--steps", type=int, default=200, help="number of steps")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(options.seqs, options.tokens, options.steps)
    results = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        quick = np.quantile(values, 0.1)
        print(f"{name:8} {results[name] * 1e6:7.0f} us (fastest tenth {quick * 1e6:.0f})")
    if options.out is not None:
        name = common.result_name("host-time", CPU)
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        common.write(options.out, name, common.environment(CPU), {**settings, **results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
