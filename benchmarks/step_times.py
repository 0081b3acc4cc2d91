"""Measure how long steps of different composition take, for `cost_model.py` to fit.

    python benchmarks/step_times.py [--model M] [--device cuda] [--out DIR]

A step is what the model runner and the sampler do with it: a prompt or none, of some tokens after some
others, and sequences that decode, each with a context. The contexts are not computed before: the KV cache
holds random numbers, which take as long to read. Scheduler, tokenizer and server are not in the times; the
first costs about 1 us a sequence, and the simulation runs it. The median of the rounds counts, which take
turns. An engine decodes the same sequences many times in a row: of a step that only decodes the last of some
runs in a row counts, and what the first one takes, after another kind of step, stands beside it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks.cost_model import Fit, fit
from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.llm_engine import LLMEngine
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import Plan, ScheduledSequence

GREEDY = SamplingParams(temperature=0.0)
MOVED_BLOCKS = 64
WARM_UP = 2  # rounds that are not counted
IN_A_ROW = 3  # runs of a step that only decodes


@dataclass(frozen=True)
class Step:
    """The composition of a step.

    Args:
        prefill_tokens: number of tokens of a prompt.
        prefill_context: number of tokens of that prompt that were computed before.
        decode_seqs: number of sequences that decode.
        context: number of tokens that each of them attends to, its own included.
    """

    prefill_tokens: int = 0
    prefill_context: int = 0
    decode_seqs: int = 0
    context: int = 0

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the first position and the number of tokens of each sequence."""
        if self.prefill_tokens:
            yield self.prefill_context, self.prefill_tokens
        yield from ((self.context - 1, 1) for _ in range(self.decode_seqs))


def grid(longest: int, seqs: tuple[int, ...], prompts: tuple[int, ...]) -> list[Step]:
    """Return the steps to measure: prompts alone, decodes alone, and both.

    Args:
        longest: maximum number of tokens of a sequence.
        seqs: numbers of sequences that decode.
        prompts: numbers of tokens of prompts, in ascending order.
    """
    contexts = sorted({min(32, longest), max(1, longest // 4), longest})
    steps = [Step(decode_seqs=s, context=c) for s, c in itertools.product(seqs, contexts)]
    for tokens in prompts:
        steps += [Step(tokens, c) for c in sorted({0, (longest - tokens) // 2, longest - tokens}) if c >= 0]
    for tokens, s in itertools.product(prompts[:2], seqs[1:4]):
        steps.append(Step(tokens, 0, s, contexts[1]))
    return steps


class Runner:
    """The engine's model runner and sampler, on steps that are made up."""

    def __init__(self, engine: LLMEngine) -> None:
        self._runner, self._cache, self.device = engine._runner, engine._cache, engine.device
        self._vocabulary = engine._vocabulary.num_samplable
        self._sampler = Sampler(frozenset())
        self.num_blocks = len(self._cache.blocks)
        self._cache.blocks.copy_(torch.randn(self._cache.blocks.shape[1:], device=self.device))

    def prepare(self, step: Step) -> tuple[tuple[ScheduledSequence, ...], BlockManager]:
        """Return the scheduled sequences of a step, and the block tables they have."""
        blocks = BlockManager(self.num_blocks, 0, self._cache.shape.block_size)
        scheduled = []
        for seq_id, (start, count) in enumerate(step.spans()):
            tokens = [(7 * seq_id + i) % self._vocabulary for i in range(start + count)]
            seq = Sequence(seq_id, 0, tokens, start + count, seed=0, num_computed=start)
            group = SequenceGroup(str(seq_id), None, tokens, GREEDY, 1, seq_id, [seq])
            blocks.append(seq_id, 0, start + count)
            scheduled.append(ScheduledSequence(group, seq, start, count, num_samples=1))
        return tuple(scheduled), blocks

    def seconds(self, step: Step) -> list[float]:
        """Return the times of a step, of a prompt once and else of runs in a row."""
        scheduled, blocks = self.prepare(step)
        times = []
        for _ in range(1 if step.prefill_tokens else IN_A_ROW):
            self._synchronize()
            started = time.perf_counter()
            logits = self._runner.run(scheduled, blocks, self._cache)
            self._sampler.sample(logits, scheduled)  # reads the tokens, so it waits for the device
            times.append(time.perf_counter() - started)
        return times

    def moved_block_seconds(self) -> float:
        """Return the time to move a block to the swap space, or back."""
        count = min(MOVED_BLOCKS, len(self._cache.swap_space))
        pairs = tuple((block, block) for block in range(count))
        times = []
        for _ in range(5):
            self._synchronize()
            started = time.perf_counter()
            self._cache.move_blocks(Plan(swap_out=pairs))
            self._cache.move_blocks(Plan(swap_in=pairs))
            self._synchronize()
            times.append((time.perf_counter() - started) / (2 * count))
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(runner: Runner, steps: list[Step], rounds: int) -> list[dict[str, Any]]:
    """Return a row of each step: its composition, the median of its times and their range, in ms.

    Also "first_ms", the median of the first runs in a row.
    """
    times: list[list[float]] = [[] for _ in steps]
    first: list[list[float]] = [[] for _ in steps]
    for turn in range(WARM_UP + rounds):
        for number, step in enumerate(steps):
            found = [1e3 * seconds for seconds in runner.seconds(step)]
            if turn >= WARM_UP:
                times[number].append(found[-1])
                first[number].append(found[0])
    return [
        {
            **asdict(step),
            "ms": statistics.median(found),
            "lowest_ms": min(found),
            "highest_ms": max(found),
            "first_ms": statistics.median(firsts),
        }
        for step, found, firsts in zip(steps, times, first)
    ]


def results(engine: LLMEngine, steps: list[Step], rounds: int) -> dict[str, Any]:
    """Measure steps, and moves of blocks, and return what the JSON has of them."""
    runner = Runner(engine)
    rows = measure(runner, steps, rounds)
    return {
        "model": engine.model_name,
        "block_size": engine.config.block_size,
        "rounds": rounds,
        "moved_block_ms": 1e3 * runner.moved_block_seconds(),
        "steps": rows,
    }


def blocks_needed(steps: list[Step], block_size: int) -> int:
    """Return the number of blocks of the largest step."""
    return max(sum(-(-(start + count) // block_size) for start, count in step.spans()) for step in steps)


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="directory or hub id (default: the demo model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block (default: 16)")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest sequence")
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="that decode")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512], help="lengths of prompts")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each step (default: 5)")
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    smallest = min(options.longest, options.rounds, *options.seqs, *options.prompts)
    if smallest < 1 or max(options.prompts) > options.longest:
        parser.error("all numbers must be at least 1, and no prompt longer than --longest")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = _parsed(arguments)
    torch.set_num_threads(options.threads)
    steps = grid(options.longest, tuple(sorted(options.seqs)), tuple(sorted(options.prompts)))
    engine = LLMEngine(
        options.model,
        EngineConfig(
            block_size=options.block_size,
            device=options.device,
            dtype=options.dtype,
            num_gpu_blocks_override=blocks_needed(steps, options.block_size),
            max_model_len=options.longest,
            max_num_seqs=max(options.seqs) + 1,
            preemption_mode="swap",
        ),
    )
    found = results(engine, steps, options.rounds)
    _show(found["steps"], fit(found["steps"], found["moved_block_ms"] / 1e3))
    if options.out:
        name = common.result_name("step-times", engine.device)
        common.write(options.out, name, common.environment(engine.device), found)
    return 0


def _show(rows: list[dict[str, Any]], fitted: Fit) -> None:
    print(f"{'prompt':>7} {'after':>6} {'decode':>7} {'context':>8} {'ms':>9}")
    for row in rows:
        print(
            f"{row['prefill_tokens']:>7} {row['prefill_context']:>6} {row['decode_seqs']:>7} "
            f"{row['context']:>8} {row['ms']:>9.2f}"
        )
    decoding = [row["first_ms"] / row["ms"] for row in rows if not row["prefill_tokens"]]
    print(f"decoding after another step takes {statistics.median(decoding):.2f} times as long as in a row")
    print("seconds:", ", ".join(f"{name} {value:.3g}" for name, value in asdict(fitted.costs).items()))
    print(f"error of the fit: median {fitted.median_error:.1%}, largest {fitted.largest_error:.1%}")


if __name__ == "__main__":
    sys.exit(main())
