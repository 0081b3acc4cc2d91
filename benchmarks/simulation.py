"""Simulate long loads with the real scheduler in seconds, with a cost model in place of a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.scheduling.beam_search import num_candidates
from cupaged.engine.scheduling.preemption import Preemption, Rates
from cupaged.engine.scheduling.request import Candidates, SequenceGroup
from cupaged.engine.scheduling.scheduler import Scheduler
from cupaged.engine.scheduling.step_plan import Plan

EOS = 1000


@dataclass(frozen=True)
class Request:
    time: float  # of arrival, in seconds
    prompt: list[int]
    num_tokens: int  # length of each output
    n: int = 1
    priority: int = 0
    beam_width: int | None = None  # instead of n

    @property
    def width(self) -> int:
        """Return the number of sequences that the request has at once."""
        return self.beam_width or self.n


@dataclass(frozen=True)
class Costs:
    """The cost model, in seconds."""

    step: float = 5e-3
    prompt_token: float = 1e-4
    decoded_token: float = 2e-4
    moved_block: float = 5e-4


@dataclass
class Trace:
    """The record of a simulated load."""

    admitted: list[SequenceGroup] = field(default_factory=list)  # in the order of their first token
    waited: dict[SequenceGroup, float] = field(default_factory=dict)  # seconds from arrival to first token
    num_computed: int = 0
    num_moved: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    most_preempted: int = 0  # maximum number of preemptions of a request


class SimulatedModel:
    """Draws random tokens, and for beams the candidates for their next tokens.

    The candidates of beams are independent. Usually the model is certain: one token has nearly all of the
    probability, and the beam continues and keeps its rank. Otherwise it hesitates between many tokens, whose
    logits decrease in exponential steps of mean 1; there beams fork, and the worst of the group are dropped.
    So the beams of a group have a common ancestor some tokens back, the closer the more often it hesitates.

    Args:
        hesitation: probability of hesitating at a token. With 0.5 the common ancestor of two beams is on
            average 6 tokens back, that of six beams 30; with 1, half as far. With SmolLM2-135M, in a short
            trial, it was 6 and 17.
    """

    def __init__(self, seed: int, hesitation: float) -> None:
        self._random, self._numpy = random.Random(seed), np.random.default_rng(seed)
        self._hesitation = hesitation

    def sample(self, plan: Plan) -> tuple[list[list[int]], dict[int, Candidates]]:
        """Return samples and candidates as `Scheduler.update` takes them, without EOS."""
        samples: list[list[int]] = []
        beams = []
        for position, item in enumerate(plan.scheduled):
            is_beam = item.group.params.beam_width is not None
            samples.append([self._random.randrange(EOS) for _ in range(0 if is_beam else item.num_samples)])
            if is_beam and item.num_samples:
                beams.append(position)
        width = max((num_candidates(plan.scheduled[position].group) for position in beams), default=0)
        logits = -np.cumsum(self._numpy.exponential(size=(len(beams), width)), axis=1)
        logits[self._numpy.random(len(beams)) >= self._hesitation, 1:] -= 10
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        tokens = (self._numpy.integers(EOS, size=(len(beams), 1)) + np.arange(width)) % EOS
        rows = zip(beams, tokens.tolist(), logprobs.tolist())
        return samples, {position: Candidates(*row) for position, *row in rows}


class SimulatedEngine:
    """A scheduler with a simulated clock.

    Args:
        num_blocks: number of blocks, of 16 tokens each; the swap space has as many.
        budget: maximum number of tokens in a step.
        max_model_len: maximum number of tokens in a sequence; None for as many as the blocks hold.
        hesitation: argument of `SimulatedModel`.
        settings: further ones of `EngineConfig`, which the scheduler reads.
    """

    def __init__(
        self,
        num_blocks: int,
        mode: str = "recompute",
        max_num_seqs: int = 64,
        budget: int = 512,
        costs: Costs | None = None,
        max_model_len: int | None = None,
        hesitation: float = 0.5,
        **settings: Any,
    ) -> None:
        self.costs = costs or Costs()
        self.hesitation = hesitation
        self.blocks = BlockManager(num_blocks, num_blocks, 16)
        self.rates = Rates(block_bytes=1)
        self.rates.moved(1, self.costs.moved_block)  # an engine measures this at its start
        self.scheduler = Scheduler(
            EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **settings),
            blocks=self.blocks,
            preemption=Preemption(mode, self.rates),
            max_model_len=max_model_len or num_blocks * 16,
            eos_token_ids=frozenset([EOS]),
        )

    def run(
        self,
        requests: Iterable[Request],
        seed: int = 0,
        observe: Callable[[Trace, float], None] | None = None,
    ) -> Trace:
        """Run a load until all requests have finished.

        Args:
            observe: called after every step with the trace so far and the duration of the step in seconds.

        Raises:
            AssertionError: a step does nothing, or the scheduler makes no progress.
        """
        model, trace, scheduler = SimulatedModel(seed, self.hesitation), Trace(), self.scheduler
        coming = sorted(requests, key=lambda r: r.time)
        total = sum(r.width * r.num_tokens + len(r.prompt) for r in coming)
        arrived: dict[SequenceGroup, Request] = {}
        preempted: dict[SequenceGroup, int] = {}
        coming.reverse()
        while coming or scheduler.has_unfinished():
            if not scheduler.has_unfinished():
                trace.seconds = max(trace.seconds, coming[-1].time)
            while coming and coming[-1].time <= trace.seconds:
                request = coming.pop()
                params = SamplingParams(
                    n=request.width, max_tokens=request.num_tokens, beam_width=request.beam_width
                )
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
            scheduler.update(plan, *model.sample(plan))
            if observe is not None:
                observe(trace, seconds)
            if trace.num_steps % 500 == 0:
                self.blocks.check_integrity()
        self.blocks.check_integrity()
        assert self.blocks.gpu.num_free == self.blocks.cpu.num_free == self.blocks.gpu.num_blocks
        for group in arrived:
            assert len(group.seqs) <= group.width, "dropped beams are kept"
            if group.beams:  # the outputs are hypotheses, one token longer than the last beams
                lengths = [len(hypothesis.token_ids) for hypothesis in group.beams.hypotheses]
            else:
                lengths = [seq.num_output_tokens for seq in group.seqs]
            assert lengths == [group.max_tokens] * group.width
        trace.most_preempted = max(preempted.values(), default=0)
        return trace

    def _cost(self, plan: Plan) -> float:
        costs = self.costs
        decoded = sum(item.num_tokens == 1 for item in plan.scheduled)
        prompts = sum(item.num_tokens for item in plan.scheduled if item.num_tokens > 1)
        moved = len(plan.swap_out) + len(plan.swap_in)
        self.rates.moved(moved, moved * costs.moved_block)
        self.rates.computed(prompts, prompts * costs.prompt_token)
        work = prompts * costs.prompt_token + decoded * costs.decoded_token + moved * costs.moved_block
        return costs.step + work
