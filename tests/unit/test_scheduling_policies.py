"""Scheduling, admission and preemption policies: nobody starves, and each does what it is for."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from benchmarks.simulation import Request, SimulatedEngine, Spans
from cupaged.engine import EngineConfig
from cupaged.engine.scheduling.admission import ADMISSION_POLICIES, Conservative, Greedy, Watermark
from cupaged.engine.scheduling.order import SCHEDULING_POLICIES, SchedulingPolicy
from cupaged.engine.scheduling.preemption import PREEMPTION_MODES, PreemptionPolicy

from .simulation import Simulation

NUM_BLOCKS = 60  # of 16 tokens
LONGEST = 320  # tokens of a prompt


def crowd(rng: random.Random, count: int = 150) -> list[Request]:
    """Send more than can be served: prompts of all lengths, most with one of a few prefixes."""
    requests = []
    for i in range(count):
        prefix = rng.randrange(8)
        spans = ((prefix, 16 * rng.randrange(1 + 2 * prefix)), (1000 + i, rng.randrange(1, 90)))
        n = rng.choice([1, 1, 1, 2])
        requests.append(Request(i / 100, Spans(*spans), rng.randrange(1, 90), n, priority=rng.randrange(3)))
    assert max(len(request.prompt) for request in requests) <= LONGEST
    return requests


@pytest.mark.parametrize("admission", ADMISSION_POLICIES)
@pytest.mark.parametrize("order", SCHEDULING_POLICIES)
def test_a_load_is_served_with_every_policy(order, admission, seed):
    """The pool is short of memory all the time, and its state is checked after every step."""
    rng = random.Random(seed)
    requests, mode = crowd(rng, 60), rng.choice(list(PREEMPTION_MODES))
    settings = {"scheduling_policy": order, "admission_policy": admission}
    engine = SimulatedEngine(NUM_BLOCKS, mode, num_cpu_blocks=20, **settings)
    record = engine.replay(requests, observe=lambda *_: engine.blocks.check_integrity())
    assert record.num_ended == len(requests)
    if order != "priority":  # which preempts for the urgent
        assert (engine.scheduler.num_preemptions == 0) == (admission == "conservative")


@pytest.mark.parametrize("name", ["shortest-prompt", "longest-prefix"])
def test_nobody_is_passed_by_many(name, seed):
    """Let the later of two requests go first only if it is better by so much for each place between."""
    rng, make = random.Random(seed), SCHEDULING_POLICIES[name]
    tokens_per_place = rng.choice([1, 8, 50])
    engine = SimulatedEngine(NUM_BLOCKS, scheduling_policy=lambda: make(tokens_per_place))
    served = engine.replay(crowd(rng)).served
    for position, late in enumerate(served):
        for early in served[position + 1 :]:
            if early.arrival < late.arrival:
                places = late.arrival - early.arrival
                if name == "shortest-prompt":
                    better_by = len(early.request.prompt) - len(late.request.prompt)
                else:
                    better_by = len(late.request.prompt)  # at most, as what was cached then is not known
                assert better_by > tokens_per_place * places


def test_short_prompts_pass_long_ones():
    """Send long and short prompts in turn, faster than they can be served."""
    requests = [Request(i / 100, Spans((i, 15 if i % 2 else 300)), 10) for i in range(200)]
    waited, longest = {}, {}
    for name in ("fcfs", "shortest-prompt"):
        served = SimulatedEngine(NUM_BLOCKS, scheduling_policy=name).replay(requests).served
        waited[name] = fmean(each.time_to_first_token for each in served)
        longest[name] = max(each.time_to_first_token for each in served)
    assert waited["shortest-prompt"] < 0.9 * waited["fcfs"]
    assert longest["shortest-prompt"] < 1.5 * longest["fcfs"]


def test_prompts_pass_others_while_what_they_begin_with_is_cached(seed):
    """Prompts come with four prefixes in turn, and the cache holds two of them beside those that run."""
    rng = random.Random(seed)
    requests = [
        Request(i / 100, Spans((i % 4, 320), (1000 + i, rng.randrange(1, 40))), 30) for i in range(120)
    ]
    hits = {}
    for name in ("fcfs", "longest-prefix"):
        engine = SimulatedEngine(60, scheduling_policy=name, max_num_seqs=2)
        engine.replay(requests)
        hits[name] = engine.scheduler.num_prefix_hits / engine.scheduler.num_prefix_queries
    assert hits["fcfs"] < 0.2
    assert hits["longest-prefix"] > 0.5


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_conservative_admission_preempts_nobody(mode, seed):
    """Ask for anything: outputs and beams over one prompt, windows, ends before ``max_tokens``."""
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=rng.randrange(20, 50),
        num_cpu_blocks=20,
        block_size=rng.choice([1, 2, 4, 8]),
        mode=mode,
        caching=rng.random() < 0.7,
        admission_policy="conservative",
        scheduling_policy=rng.choice(["fcfs", "shortest-prompt", "longest-prefix"]),
        window=rng.choice([None, None, 5]),
        eos_chance=rng.choice([0, 0.05]),
        seed=seed,
    )
    prompt = simulation.prompt(30)
    for _ in range(40):
        whole = prompt[: rng.randrange(20)] + simulation.prompt(rng.randrange(1, 9))
        n = rng.choice([1, 1, 2, 4])
        try:
            simulation.add(whole, rng.randrange(1, 20), n, beams=n > 1 and rng.random() < 0.5)
        except ValueError:
            assert len(whole) >= simulation.max_model_len or n > 1
        for _ in range(rng.randrange(3)):
            if simulation.scheduler.has_unfinished():
                simulation.step()
    simulation.run()
    assert simulation.scheduler.num_preemptions == 0


def test_what_admission_keeps_free():
    """Requests of a block that grow by two, in a pool of 300 blocks and all at once."""
    requests = [Request(0, Spans((i, 4)), 40) for i in range(300)]
    running = {}
    for name, policy in {
        "greedy": "greedy",
        "watermark": "watermark",
        "a tenth": lambda: Watermark(0.1),
        "half": lambda: Conservative(0.5),
        "conservative": "conservative",
    }.items():
        engine = SimulatedEngine(300, max_num_seqs=512, budget=2000, admission_policy=policy)
        sizes = []
        engine.replay(requests, observe=lambda *_, e=engine, s=sizes: s.append(len(e.scheduler.running)))
        running[name] = sizes[0]
    # With growth: n blocks are taken, and of the n + 1 with the next one a share of 2 blocks each is kept.
    assert running == {"greedy": 300, "watermark": 297, "a tenth": 270, "half": 150, "conservative": 100}


class LastComeFirstServed(SchedulingPolicy):
    def rank(self, group, num_cached):
        return -group.arrival


class SwapTheLong(PreemptionPolicy):
    def swaps(self, num_blocks, num_tokens, rates):
        return num_tokens > 100


def test_policies_of_ones_own(seed):
    """Make them for each engine, and ask them."""
    requests = crowd(random.Random(seed), 60)
    settings = {"scheduling_policy": LastComeFirstServed, "admission_policy": lambda: Greedy()}
    engine = SimulatedEngine(NUM_BLOCKS, SwapTheLong, **settings)
    moved = engine.replay(requests).num_moved
    assert isinstance(engine.scheduler._policy, LastComeFirstServed)
    assert engine.scheduler.num_preemptions
    assert moved
    simulation = Simulation(num_blocks=4, max_num_seqs=1, scheduling_policy=LastComeFirstServed)
    groups = [simulation.add(3, 2) for _ in range(3)]
    simulation.run()
    assert [group.first_scheduled for group in groups] == sorted(
        (group.first_scheduled for group in groups), reverse=True
    )


@pytest.mark.parametrize("setting", ["scheduling_policy", "admission_policy", "preemption_mode"])
def test_what_makes_no_policy_is_refused_by_name(setting):
    for make in (dict, lambda: None, lambda: "fcfs"):
        config = EngineConfig(**{setting: make})
        with pytest.raises(ValueError, match=f"{setting} must make a.* and made "):
            Simulation(
                num_blocks=4,
                mode=config.preemption_mode,
                scheduling_policy=config.scheduling_policy,
                admission_policy=config.admission_policy,
            )


@pytest.mark.parametrize("rank", [float("nan"), None, "first"])
def test_a_rank_that_is_none_is_refused_with_its_request(rank):
    class Odd(SchedulingPolicy):
        def rank(self, group, num_cached):
            return rank if group.prompt_len == 3 else 1

    simulation = Simulation(num_blocks=8, scheduling_policy=Odd)
    simulation.add(2, 5)
    with pytest.raises(ValueError, match=r"scheduling_policy gave request r1 the rank .* Odd must return"):
        simulation.add(3, 5)
    simulation.run()
