"""Long loads through the real scheduler in seconds: no weights, a cost for every token and block moved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cupaged.engine import SamplingParams
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.preemption import Preemption, Rates
from cupaged.engine.request import SequenceGroup
from cupaged.engine.scheduler import Scheduler

EOS = 1000


@dataclass(frozen=True)
class Request:
    time: float  # of its arrival, in seconds
    prompt: list[int]
    num_tokens: int  # of each output
    n: int = 1
    priority: int = 0


@dataclass(frozen=True)
class Costs:
    """In seconds."""

    step: float = 5e-3
    prompt_token: float = 1e-4
    decoded_token: float = 2e-4
    moved_block: float = 5e-4


@dataclass
class Trace:
    """What became of a load."""

    admitted: list[SequenceGroup] = field(default_factory=list)  # in the order of their first token
    waited: dict[SequenceGroup, float] = field(default_factory=dict)  # seconds from arrival to first token
    num_computed: int = 0
    num_moved: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    most_preempted: int = 0  # times that one request was


class SimulatedEngine:
    """One scheduler with a clock.

    Args:
        num_blocks: of 16 tokens; the swap space has as many.
        max_model_len: most tokens of a sequence; None: what the blocks hold.
        settings: of `Scheduler`.
    """

    def __init__(
        self,
        num_blocks: int,
        mode: str = "recompute",
        max_num_seqs: int = 64,
        budget: int = 512,
        costs: Costs | None = None,
        max_model_len: int | None = None,
        **settings: Any,
    ) -> None:
        self.costs = costs or Costs()
        self.blocks = BlockManager(num_blocks, num_blocks, 16)
        self.rates = Rates(block_bytes=1)
        self.rates.moved(1, self.costs.moved_block)  # an engine measures that at its start
        preemption = Preemption(mode, self.rates)
        length = max_model_len or num_blocks * 16
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs, budget, length, preemption, frozenset([EOS]), **settings
        )

    def run(
        self,
        requests: Iterable[Request],
        seed: int = 0,
        observe: Callable[[Trace, float], None] | None = None,
    ) -> Trace:
        """Serve a load to its end.

        Args:
            observe: called after every step with the trace so far and the seconds that the step took.

        Raises:
            AssertionError: a step does nothing, or the scheduler goes round in circles.
        """
        rng, trace, scheduler = random.Random(seed), Trace(), self.scheduler
        coming = sorted(requests, key=lambda r: r.time)
        total = sum(r.n * r.num_tokens + len(r.prompt) for r in coming)
        arrived: dict[SequenceGroup, Request] = {}
        preempted: dict[SequenceGroup, int] = {}
        coming.reverse()
        while coming or scheduler.has_unfinished():
            if not scheduler.has_unfinished():
                trace.seconds = max(trace.seconds, coming[-1].time)
            while coming and coming[-1].time <= trace.seconds:
                request = coming.pop()
                params = SamplingParams(n=request.n, max_tokens=request.num_tokens)
                group = SequenceGroup(
                    str(len(arrived)),
                    None,
                    request.prompt,
                    params,
                    request.num_tokens,
                    len(arrived),
                    priority=request.priority,
                )
                scheduler.add(group, 0)
                arrived[group] = request
            before = set(scheduler.running)
            plan = scheduler.schedule()
            assert plan.scheduled, "requests wait and nobody runs"
            for group in before.difference(scheduler.running):
                preempted[group] = preempted.get(group, 0) + 1
            trace.num_steps += 1
            assert trace.num_steps <= 2 * total + 1000, "the scheduler goes round in circles"
            seconds = self._cost(plan)
            trace.seconds += seconds
            trace.num_computed += sum(item.num_tokens for item in plan.scheduled)
            trace.num_moved += len(plan.swap_out) + len(plan.swap_in)
            for item in plan.scheduled:
                if item.num_samples and not item.group.forked:
                    trace.admitted.append(item.group)
                    trace.waited[item.group] = trace.seconds - arrived[item.group].time
            scheduler.update(
                plan, [[rng.randrange(EOS) for _ in range(item.num_samples)] for item in plan.scheduled]
            )
            if observe is not None:
                observe(trace, seconds)
            if trace.num_steps % 500 == 0:
                self.blocks.check_integrity()
        self.blocks.check_integrity()
        assert self.blocks.gpu.num_free == self.blocks.cpu.num_free == self.blocks.gpu.num_blocks
        for group in arrived:
            assert len(group.seqs) == group.params.n
            assert all(seq.num_output_tokens == group.max_tokens for seq in group.seqs)
        trace.most_preempted = max(preempted.values(), default=0)
        return trace

    def _cost(self, plan) -> float:
        costs = self.costs
        decoded = sum(item.num_tokens == 1 for item in plan.scheduled)
        prompts = sum(item.num_tokens for item in plan.scheduled if item.num_tokens > 1)
        moved = len(plan.swap_out) + len(plan.swap_in)
        self.rates.moved(moved, moved * costs.moved_block)
        self.rates.computed(prompts, prompts * costs.prompt_token)
        work = prompts * costs.prompt_token + decoded * costs.decoded_token + moved * costs.moved_block
        return costs.step + work
