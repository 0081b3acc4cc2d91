"""Steps that are launched before the tokens of the step before are known: the scheduler alone."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from dataclasses import dataclass

import pytest

from cupaged.engine.config import ADMISSION_POLICIES, SCHEDULING_POLICIES
from cupaged.engine.scheduling.failed_step import FailedStep
from cupaged.engine.scheduling.overlap import Overlap
from cupaged.engine.scheduling.request import Candidates, SequenceGroup, Status
from cupaged.engine.scheduling.step_plan import Plan, ScheduledSequence
from tests.unit.simulation import EOS, SALTS, Simulation

STOP = 98  # a token that ends an output as a stop string does, found after the step


def next_token(tokens: tuple[int, ...], index: int) -> int:
    """The model: a token that follows from all before, and after the prompt from the output's index."""
    drawn = hash((tokens, index)) % 1000
    return EOS if drawn < 20 else STOP if drawn < 40 else drawn % STOP


def output_of(group: SequenceGroup, index: int) -> tuple[list[int], str]:
    """The output that a request has to get, and why it ends."""
    tokens = list(group.prompt_token_ids)
    for _ in range(group.max_tokens):
        first = len(tokens) == group.prompt_len
        tokens.append(next_token(tuple(tokens), index if first else 0))
        if tokens[-1] in (EOS, STOP):
            return tokens[group.prompt_len :], "stop"
    return tokens[group.prompt_len :], "length"


@dataclass
class Launched:
    """A step on the device, which alone knows the tokens, or one that failed."""

    plan: Plan
    tokens: list[list[int]] | None = None
    candidates: dict[int, Candidates] | None = None


class LateSimulation(Simulation):
    """Runs the loop of an engine over a device that delivers the tokens of a step after the next launch."""

    ends = (EOS, STOP)

    def __init__(self, overlap: bool = True, failures: float = 0.0, **settings) -> None:
        super().__init__(**settings)
        self.overlap = Overlap(overlap)
        self.failures = failures
        self.launched: deque[Launched] = deque()
        self.failed_step = FailedStep()
        self.num_ahead = self.num_wasted = self.num_failed = 0

    def has_unfinished(self) -> bool:
        return bool(self.launched) or self.scheduler.has_unfinished()

    def step(self) -> None:
        while self.may_launch():
            part = self.failed_step.next()
            plan = Plan(part) if part else self.scheduler.schedule()
            if not plan.scheduled:
                assert not self.scheduler.has_unfinished(), "nobody runs"
                break
            if not part:
                self.check_plan(plan)
            self.num_ahead += len(self.launched)
            self.launched.append(self.launch(plan))
        if self.launched:
            self.deliver(self.launched.popleft())
        self.check_blocks()

    def may_launch(self) -> bool:
        if not self.launched:
            return True
        last = self.launched[-1]
        if len(self.launched) == 2 or last.tokens is None or self.failed_step:
            return False
        return self.overlap.reason_to_wait(last.plan) is None

    def launch(self, plan: Plan) -> Launched:
        inputs = [self.on_device(item) for item in plan.scheduled]
        if plan.swap_out or plan.swap_in or plan.copies:
            if self.random.random() < self.failures:
                self.num_failed += 1
                self.memory.poison_moved(plan.swap_out, plan.swap_in, plan.copies)
                self.scheduler.moves_failed()
                return Launched(plan)
            self.move(plan)
        if self.random.random() < self.failures:
            self.num_failed += 1
            self.poison(plan.scheduled)
            self.failed_step.add(self.scheduler.hold(plan.scheduled))
            return Launched(plan)
        self.write(list(zip(plan.scheduled, inputs)))
        samples: list[list[int]] = []
        candidates = {}
        for position, (item, tokens) in enumerate(zip(plan.scheduled, inputs)):
            beams = item.group.beams is not None
            count = 0 if beams else item.num_samples
            first = len(tokens) == item.group.prompt_len
            indices = range(count) if count > 1 else [item.seq.index if first else 0] * count
            samples.append([next_token(tuple(tokens), index) for index in indices])
            if beams and item.num_samples:
                candidates[position] = self.draw_candidates(item.group)
        self.scheduler.advance(plan)
        return Launched(plan, samples, candidates)

    def on_device(self, item: ScheduledSequence) -> list[int]:
        """The tokens up to the last one that a sequence computes, with those that only the device knows."""
        tokens = item.seq.token_ids[: item.start + item.num_tokens]
        if tokens[-1] < 0:
            assert len(self.launched) == 1
            of_rows = [token for of_seq in self.launched[0].tokens or () for token in of_seq]
            tokens[-1] = of_rows[-1 - tokens[-1]]
        assert min(tokens) >= 0, "the step reads a token that no launch has sampled"
        return tokens

    def deliver(self, step: Launched) -> None:
        if step.tokens is None:
            return  # the engine raises its error here
        plan = step.plan
        wasted = self.scheduler.resolve(plan, step.tokens, step.candidates)
        self.num_wasted += len(wasted)
        for item in plan.scheduled:
            if item.num_samples and item not in wasted and item.group.beams is None:
                for seq in item.receivers:
                    ended = seq.token_ids[seq.num_known - 1] == STOP and seq.num_output_tokens
                    if ended and seq.finish_reason == "length":
                        seq.finish_reason = "stop"
                    elif ended and not seq.finished:
                        self.scheduler.finish(item.group, seq, "stop")
        for group in self.groups:
            for seq in group.seqs:
                assert seq.num_known >= len(seq.token_ids) - len(self.launched)
                if seq.finished:
                    assert seq.num_known == len(seq.token_ids), "a token after the end"

    def check_end(self) -> None:
        super().check_end()
        for group in self.groups:
            for seq in group.seqs:
                if group.beams is not None:
                    continue
                tokens, reason = output_of(group, seq.index)
                if seq.finish_reason == "abort":
                    assert seq.output_token_ids == tokens[: seq.num_output_tokens]
                else:
                    assert (seq.output_token_ids, seq.finish_reason) == (tokens, reason)

    def run(self, limit: int = 10000) -> None:
        while self.has_unfinished():
            limit -= 1
            assert limit, "requests do not finish"
            self.step()
        self.check_end()


def drawn(rng: random.Random) -> dict:
    return {
        "num_blocks": rng.randint(8, 24),
        "num_cpu_blocks": rng.choice([24, 6, 0]),
        "block_size": rng.choice([1, 2, 3, 4, 8]),
        "max_num_seqs": rng.choice([8, 4, 3, 1]),
        "budget": rng.choice([8, 11, 16, 32]),
        "mode": rng.choice(["swap", "recompute", "auto"]),
        "caching": rng.random() < 0.7,
        "scheduling_policy": rng.choice(["fcfs", *SCHEDULING_POLICIES]),
        "admission_policy": rng.choice(list(ADMISSION_POLICIES)),
        "window": rng.choice([None, None, 1, 5, 13]),
        "memory_policy": rng.choice(["paged", "paged", "paged", "orca-oracle"]),
        "static": rng.random() < 0.15,
        "eos_chance": 0.05,
        "seed": rng.getrandbits(32),
    }


def steps_of_a_load(rng: random.Random, num_steps: int) -> LateSimulation:
    """Run a drawn load; requests come, are aborted and end by stop tokens and strings all the time."""
    settings = drawn(rng)
    simulation = LateSimulation(failures=rng.choice([0.0, 0.05, 0.2]), **settings)
    bases = [simulation.prompt(40) for _ in range(2)]
    paged, caching = settings["memory_policy"] == "paged", settings["caching"]
    prefixes: list[SequenceGroup] = []
    for _ in range(num_steps):
        if len(simulation.unfinished()) < 8 and rng.random() < 0.5:
            prompt = rng.choice(bases)[: rng.choice([0, 1, 8, 16, 24])] + simulation.prompt(rng.randint(1, 9))
            group = {"n": rng.choice([1, 1, 1, 2, 4]), "beams": paged and rng.random() < 0.15}
            if rng.random() < 0.2:
                group["cache_salt"] = rng.choice(SALTS)
            with contextlib.suppress(ValueError):  # it does not fit
                simulation.add(prompt, rng.choice([1, 2, 5, 12, 20]), priority=rng.randint(-1, 1), **group)
        if rng.random() < 0.03 and simulation.unfinished():
            simulation.scheduler.abort(rng.choice(simulation.unfinished()))
            simulation.check_blocks()
        if paged and caching and rng.random() < 0.02:
            if prefixes:
                simulation.scheduler.remove_prefix(prefixes.pop().request_id)
            else:
                with contextlib.suppress(ValueError):
                    prefixes.append(simulation.add_prefix(bases[0][:16]))
        simulation.step()
    for prefix in prefixes:
        simulation.scheduler.remove_prefix(prefix.request_id)
    simulation.run()
    return simulation


def test_outputs_are_those_of_a_device_that_delivers_at_once(seed):
    rng = random.Random(seed)
    runs = [steps_of_a_load(rng, 60) for _ in range(10)]
    assert sum(run.num_ahead for run in runs) > 0


@pytest.mark.matrix
def test_a_hundred_thousand_steps(seed):
    rng = random.Random(seed)
    runs = [steps_of_a_load(rng, 500) for _ in range(200)]
    assert sum(run.num_wasted for run in runs) > 1000
    assert sum(run.num_failed for run in runs) > 1000
    assert sum(run.scheduler.num_preemptions for run in runs) > 1000


def add_ending(simulation: LateSimulation, count: int, max_tokens: int, reason: str) -> None:
    """Add requests whose outputs end for this reason."""
    while count:
        prompt = simulation.prompt(5)
        if output_of(simulation.group(prompt, max_tokens), 0)[1] == reason:
            simulation.add(prompt, max_tokens)
            count -= 1


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_an_output_that_ends_by_its_length_costs_no_token(num_tokens):
    """Its seat and its blocks are those of the next step, as if its tokens were known."""
    plans = {}
    for overlap in (False, True):
        simulation = LateSimulation(overlap, num_blocks=4, max_num_seqs=1, budget=8)
        add_ending(simulation, 3, num_tokens, "length")
        schedule, seen = simulation.scheduler.schedule, []

        def watched(schedule=schedule, seen=seen):
            plan = schedule()
            seen.append([(item.group.request_id, item.start, item.num_tokens) for item in plan.scheduled])
            return plan

        simulation.scheduler.schedule = watched
        simulation.run()
        plans[overlap] = [plan for plan in seen if plan]
        assert (simulation.num_ahead > 0) is overlap
        assert simulation.num_wasted == 0
    assert plans[True] == plans[False]


def test_a_stop_costs_one_token_at_most():
    simulation = LateSimulation(num_blocks=40, budget=32)
    add_ending(simulation, 6, 30, "stop")
    simulation.run()
    outputs = [seq.output_token_ids for group in simulation.groups for seq in group.seqs]
    assert 0 < simulation.num_wasted <= len(outputs)


def test_what_is_aborted_between_launch_and_tokens_is_gone():
    simulation = LateSimulation(num_blocks=8, budget=8)
    group = simulation.add(5, 20)
    simulation.step()
    assert [len(simulation.launched), group.seqs[0].num_known] == [1, 6]
    simulation.scheduler.abort(group)
    assert group.status is Status.FINISHED
    assert group.seqs[0].num_output_tokens == 1
    assert simulation.blocks.gpu.num_free == 8
    simulation.run()


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_the_prefix_cache_keeps_what_it_keeps_without_overlap(block_size, seed):
    """All that was computed up to the ends of outputs, and no token that ends one."""
    kept = []
    for overlap in (False, True):
        simulation = LateSimulation(
            overlap, num_blocks=1000, block_size=block_size, budget=32, max_num_seqs=8, seed=seed
        )
        add_ending(simulation, 4, 20, "stop")
        add_ending(simulation, 4, 7, "length")
        simulation.run()
        kept.append(set(simulation.blocks.gpu._block_of))
    assert kept[0] == kept[1]


def test_a_launch_that_fails_costs_nothing_of_the_step_before():
    """The blocks that it writes are found, though it is not resolved yet."""
    simulation = LateSimulation(num_blocks=20, budget=16)
    group = simulation.add(8, 5)
    launch = simulation.launch

    def failing(plan):
        simulation.failures = 1.0 if simulation.launched else 0.0
        return launch(plan)

    simulation.launch = failing
    simulation.step()
    assert [step.tokens is None for step in simulation.launched] == [True]
    assert simulation.num_failed == 1
    assert len(simulation.blocks.gpu._block_of) == 2
    assert group.seqs[0].num_known == 9
    simulation.failures, simulation.launch = 0.0, launch
    simulation.run()
