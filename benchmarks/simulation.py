"""Replay a trace of requests on the scheduler and block manager that serve, with a cost model for a model.

Nothing is computed, and the clock is simulated: a step takes the time that the cost model predicts.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, repeat
from math import nan
from typing import Any

import numpy as np

from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.layer_groups import ONE_GROUP, LayerGroup
from cupaged.engine.scheduling.beam_search import num_candidates
from cupaged.engine.scheduling.preemption import Preemption, Rates
from cupaged.engine.scheduling.request import Candidates, SequenceGroup, Status
from cupaged.engine.scheduling.scheduler import Scheduler
from cupaged.engine.scheduling.step_plan import Plan, ScheduledSequence

from .cost_model import Costs, Work, pairs

EOS = 1000
CHECKED_STEPS = 1000  # the block manager's integrity is checked once in as many steps


class Spans:
    """Tokens as runs of equal ones, which take no memory until they are read.

    Only which prompts begin alike matters to a scheduler, so a prompt of a trace is a few such runs.

    Args:
        spans: token and number of times it is repeated, of each run.
    """

    __slots__ = ("_count", "spans")

    def __init__(self, *spans: tuple[int, int]) -> None:
        self.spans = spans
        self._count = sum(count for _, count in spans)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(repeat(token, count) for token, count in self.spans)

    def __contains__(self, token: object) -> bool:
        return any(token == other and count for other, count in self.spans)


@dataclass(frozen=True, eq=False)
class Request:
    """A request of a trace.

    Args:
        time: seconds of its arrival, since the trace began, or since the request ``follows`` ended.
        prompt: token IDs.
        num_tokens: length of each output.
        n: number of outputs.
        beam_width: number of beams, instead of ``n``.
        follows: the session's request before this one.
        output_token: token that the first output consists of; the other outputs have the ones after it. None:
            tokens that no other request has.
    """

    time: float
    prompt: Collection[int]
    num_tokens: int
    n: int = 1
    priority: int = 0
    beam_width: int | None = None
    follows: Request | None = None
    output_token: int | None = None

    @property
    def width(self) -> int:
        """Return the number of sequences that the request has at once."""
        return self.beam_width or self.n


@dataclass(slots=True, eq=False)
class Served:
    """Hold what became of a request; times in seconds since the trace began."""

    request: Request
    arrival: int  # order of arrival
    arrived: float
    first_token: float = nan
    ended: float = nan
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float:
        return self.first_token - self.arrived

    @property
    def latency(self) -> float:
        return self.ended - self.arrived

    @property
    def normalized_latency(self) -> float:
        """Return the latency divided by the length of an output, which the paper compares (section 6.1)."""
        return self.latency / self.request.num_tokens

    @property
    def time_per_output_token(self) -> float:
        return (self.ended - self.first_token) / max(1, self.request.num_tokens - 1)


@dataclass
class Record:
    """The record of a replay.

    Args:
        served: the requests, in the order of their first token.
        num_tokens: number of tokens of the prompts and outputs of the requests that have ended.
        num_computed: number of tokens computed, some of them again.
        num_moved: number of blocks swapped out or in.
        seconds: simulated time.
    """

    served: list[Served] = field(default_factory=list)
    num_ended: int = 0
    num_tokens: int = 0
    num_computed: int = 0
    num_moved: int = 0
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def most_preempted(self) -> int:
        """Return the maximum number of preemptions of a request."""
        return max((each.num_preemptions for each in self.served), default=0)


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
        """Return samples and candidates as `Scheduler.resolve` takes them, without EOS."""
        samples: list[list[int]] = []
        beams = []
        for position, item in enumerate(plan.scheduled):
            is_beam = item.group.params.beam_width is not None
            samples.append([self._random.randrange(EOS) for _ in range(0 if is_beam else item.num_samples)])
            if is_beam and item.num_samples:
                beams.append(position)
        return samples, self.candidates(plan, beams)

    def candidates(self, plan: Plan, beams: list[int]) -> dict[int, Candidates]:
        """Return the candidates of the beams at these positions of a plan."""
        width = max((num_candidates(plan.scheduled[position].group) for position in beams), default=0)
        logits = -np.cumsum(self._numpy.exponential(size=(len(beams), width)), axis=1)
        logits[self._numpy.random(len(beams)) >= self._hesitation, 1:] -= 10
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        tokens = (self._numpy.integers(EOS, size=(len(beams), 1)) + np.arange(width)) % EOS
        rows = zip(beams, tokens.tolist(), logprobs.tolist())
        return {position: Candidates(*row) for position, *row in rows}


class SimulatedEngine:
    """A scheduler and a block manager without a model.

    Args:
        num_blocks: number of blocks.
        num_cpu_blocks: number of blocks of the swap space; None: ``num_blocks``.
        block_size: number of tokens of a block.
        budget: maximum number of tokens in a step.
        max_model_len: maximum number of tokens in a sequence; None for as many as the blocks hold.
        layer_groups: the layers by their memory.
        eos: argument of `Scheduler`.
        hesitation: argument of `SimulatedModel`.
        settings: further ones of `EngineConfig`, which the scheduler reads.
    """

    def __init__(
        self,
        num_blocks: int,
        mode: str = "recompute",
        *,
        num_cpu_blocks: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 64,
        budget: int = 512,
        costs: Costs | None = None,
        max_model_len: int | None = None,
        layer_groups: Sequence[LayerGroup] = ONE_GROUP,
        eos: int = EOS,
        hesitation: float = 0.5,
        **settings: Any,
    ) -> None:
        self.costs = costs or Costs()
        self.hesitation = hesitation
        config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **settings)
        self.blocks = BlockManager(
            num_blocks,
            num_blocks if num_cpu_blocks is None else num_cpu_blocks,
            block_size,
            config.eviction_policy,
            layer_groups,
            max_step_tokens=budget,
        )
        self.max_model_len = max_model_len or num_blocks * block_size
        self.rates = Rates(block_bytes=1)
        self.rates.moved(1, self.costs.moved_block)  # an engine measures this at its start
        self.scheduler = Scheduler(
            config,
            blocks=self.blocks,
            preemption=Preemption(mode, self.rates),
            max_model_len=self.max_model_len,
            eos_token_ids=frozenset([eos]),
        )
        # Without a prefix cache nobody looks at tokens, so that all can be the same.
        self._tokens_matter = config.enable_prefix_caching and config.memory_policy == "paged"

    def replay(
        self,
        requests: Iterable[Request],
        seed: int = 0,
        observe: Callable[[Record, float], None] | None = None,
    ) -> Record:
        """Run a trace until all its requests have ended.

        Args:
            seed: of the candidates of beams.
            observe: called after every step with the record so far and the duration of the step in seconds.

        Raises:
            AssertionError: a step does nothing, or the scheduler makes no progress.
            ValueError: a request does not fit even alone.
        """
        replay = _Replay(self, requests, SimulatedModel(seed, self.hesitation))
        enabled = gc.isenabled()
        gc.disable()  # a replay makes no cycles, and collecting takes a quarter of its time
        try:
            while replay.step():
                if observe is not None:
                    observe(replay.record, replay.step_seconds)
                if replay.record.num_steps % CHECKED_STEPS == 0:
                    self.blocks.check_integrity()
        finally:
            if enabled:
                gc.enable()
        self.blocks.check_integrity()
        assert self.blocks.gpu.num_free == self.blocks.gpu.num_blocks
        assert self.blocks.cpu.num_free == self.blocks.cpu.num_blocks
        return replay.record


class _Replay:
    """A trace while it is replayed."""

    def __init__(self, engine: SimulatedEngine, requests: Iterable[Request], model: SimulatedModel) -> None:
        self._scheduler, self._costs, self._rates = engine.scheduler, engine.costs, engine.rates
        self._tokens_matter = engine._tokens_matter
        self._model = model
        self.record = Record()
        self.step_seconds = 0.0
        requests = list(requests)
        self._coming = [(r.time, i, r) for i, r in enumerate(requests) if r.follows is None]
        heapify(self._coming)
        self._followers: dict[Request, list[tuple[int, Request]]] = {}
        for i, request in enumerate(requests):
            if request.follows is not None:
                self._followers.setdefault(request.follows, []).append((i, request))
        self._served: dict[SequenceGroup, Served] = {}  # of the requests that have not ended
        self._outputs: dict[SequenceGroup, list[int]] = {}
        self._next_output_token = 2**62  # prompts have no tokens as large
        self._num_added = 0
        self._most_steps = 1000 + 2 * sum(r.width * r.num_tokens + len(r.prompt) for r in requests)

    def step(self) -> bool:
        """Run a step; return False where no request is left."""
        scheduler, record = self._scheduler, self.record
        if not scheduler.has_unfinished():
            if not self._coming:
                assert not self._followers, "a request follows one that is not in the trace"
                return False
            record.seconds = max(record.seconds, self._coming[0][0])
        while self._coming and self._coming[0][0] <= record.seconds:
            self._add(heappop(self._coming)[2])
        preemptions, before = scheduler.num_preemptions, list(scheduler.running)
        plan = scheduler.schedule()
        assert plan.scheduled, "requests wait and nobody runs"
        if scheduler.num_preemptions > preemptions:
            for group in set(before).difference(scheduler.running):
                self._served[group].num_preemptions += 1
        record.num_steps += 1
        assert record.num_steps <= self._most_steps, "the scheduler goes round in circles"
        self._compute(plan)
        return True

    def _add(self, request: Request) -> None:
        record, arrival = self.record, self._num_added
        self._num_added += 1
        group = SequenceGroup(
            str(arrival),
            None,
            list(request.prompt),
            _params(request.n if request.beam_width is None else request.width, request.beam_width),
            request.num_tokens,
            arrival,
            priority=request.priority,
        )
        self._scheduler.add(group, 0)
        self._served[group] = Served(request, arrival, max(0.0, record.seconds))
        # A request arrives while a step runs, and is noticed after it.
        if request.follows is None:
            self._served[group].arrived = request.time
        token = request.output_token
        if token is None:
            token = self._next_output_token
            self._next_output_token += request.width
        self._outputs[group] = list(range(token, token + request.width))

    def _compute(self, plan: Plan) -> None:
        """Advance the clock by a step, and update the scheduler."""
        scheduler, record, scheduled = self._scheduler, self.record, plan.scheduled
        other: list[int] = []  # positions of prompts, and of beams
        context = 0
        for position, item in enumerate(scheduled):
            group = item.group
            if group.prefilling or group.beams is not None:
                other.append(position)
            else:
                context += item.start
        num_decoding = len(scheduled) - len(other)
        work = self._work(plan, num_decoding, context + num_decoding, other)
        seconds = self.step_seconds = self._costs.seconds(work)
        record.seconds += seconds
        record.num_computed += work.prompt_tokens + work.decoded_tokens
        record.num_moved += work.moved_blocks
        self._rates.moved(work.moved_blocks, work.moved_blocks * self._costs.moved_block)
        self._rates.computed(work.prompt_tokens, work.prompt_tokens * self._costs.prompt_token)

        if self._tokens_matter:
            samples = [[self._outputs[item.group][item.seq.index]] for item in scheduled]
        else:
            samples = [_ONE_TOKEN] * len(scheduled)
        beams = []
        for position in other:
            item = scheduled[position]
            group, is_beam = item.group, item.group.beams is not None
            # The first step after a prompt samples for all outputs, the others for their own.
            if is_beam or item.num_samples != 1:
                samples[position] = [] if is_beam else self._outputs[group][: item.num_samples]
            if is_beam and item.num_samples:
                beams.append(position)
            if item.num_samples and not group.forked:
                served = self._served[group]
                served.first_token = record.seconds
                record.served.append(served)
        candidates = self._model.candidates(plan, beams) if beams else {}
        unfinished = len(scheduler.running)
        scheduler.advance(plan)
        scheduler.resolve(plan, samples, candidates)
        if len(scheduler.running) < unfinished:
            for group in dict.fromkeys(item.group for item in scheduled):
                if group.status is Status.FINISHED:
                    self._end(group)

    def _work(self, plan: Plan, num_decoding: int, context: int, other: list[int]) -> Work:
        prompt_tokens, prompt_pairs = 0, 0.0
        for position in other:
            item: ScheduledSequence = plan.scheduled[position]
            if item.num_tokens > 1:
                prompt_tokens += item.num_tokens
                prompt_pairs += pairs(item.num_tokens, item.start)
            else:
                num_decoding += 1
                context += item.start + 1
        moved = len(plan.swap_out) + len(plan.swap_in)
        return Work(prompt_tokens, prompt_pairs, num_decoding, context, moved)

    def _end(self, group: SequenceGroup) -> None:
        served = self._served.pop(group)
        del self._outputs[group]
        request, record = served.request, self.record
        assert len(group.seqs) <= group.width, "dropped beams are kept"
        if group.beams:  # the outputs are hypotheses, one token longer than the last beams
            lengths = [len(hypothesis.token_ids) for hypothesis in group.beams.hypotheses]
        else:
            lengths = [seq.num_output_tokens for seq in group.seqs]
        assert lengths == [request.num_tokens] * request.width
        served.ended = record.seconds
        record.num_ended += 1
        record.num_tokens += len(request.prompt) + request.width * request.num_tokens
        for index, follower in self._followers.pop(request, ()):
            heappush(self._coming, (record.seconds + follower.time, index, follower))


_ONE_TOKEN = [0]


@lru_cache(maxsize=64)
def _params(n: int, beam_width: int | None) -> SamplingParams:
    """Return what a request asks for; its `SequenceGroup` has the length."""
    return SamplingParams(n=n, beam_width=beam_width, ignore_eos=True)
