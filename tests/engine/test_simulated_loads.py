"""Thousands of requests, and hostile ones: everybody is served, in order, without going round in circles."""

from __future__ import annotations

import random

import pytest

from benchmarks.cost_model import Costs
from benchmarks.simulation import EOS, Request, SimulatedEngine
from cupaged.engine.scheduling.preemption import Preemption


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(EOS) for _ in range(count)]


def chats(
    rng: random.Random,
    count: int,
    rate: float,
    shared: int = 0,
    means: tuple[int, int] = (81, 169),
    beams: float = 0.0,
) -> list[Request]:
    """Arrivals at random; by default half the lengths of real conversations, in and out. ``beams`` is the
    share of beam searches."""
    found, time = [], 0.0
    prefix = tokens(rng, shared)
    for _ in range(count):
        time += rng.expovariate(rate)
        lengths = [max(1, min(600, 8 * mean, int(rng.expovariate(1 / mean)))) for mean in means]
        n = 4 if rng.random() < 0.05 else 1
        beam_width = rng.randrange(1, 7) if rng.random() < beams else None
        found.append(Request(time, prefix + tokens(rng, lengths[0]), lengths[1], n, beam_width=beam_width))
    return found


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_a_long_load_is_served_in_order(mode, caching, seed):
    """Twice what fits: the queue grows, the memory is always short."""
    requests = chats(random.Random(seed), 500, rate=40)
    record = SimulatedEngine(1200, mode, enable_prefix_caching=caching).replay(requests, seed)
    arrivals = [served.arrival for served in record.served]
    assert arrivals == sorted(arrivals), "the first token comes in the order of arrival"
    needed = sum(len(r.prompt) + r.n * r.num_tokens for r in requests)
    assert record.num_computed < 1.25 * needed, "most of the work is done twice"
    assert record.most_preempted <= 10


@pytest.mark.parametrize(
    "mode", [*(pytest.param(m, marks=pytest.mark.matrix) for m in ("swap", "recompute")), "auto"]
)
def test_thousands_with_beams_among_them_are_served_in_order(mode, seed):
    requests = chats(random.Random(seed), 2000, rate=200, means=(20, 30), beams=0.2)
    engine = SimulatedEngine(150, mode)
    record = engine.replay(requests, seed)
    assert engine.scheduler.num_preemptions > 20
    arrivals = [served.arrival for served in record.served]
    assert arrivals == sorted(arrivals)
    needed = sum(len(r.prompt) + r.width * r.num_tokens for r in requests)
    assert record.num_computed < 1.25 * needed
    assert record.most_preempted <= 10


def test_thousands_with_a_common_beginning_compute_it_once(seed):
    requests = chats(random.Random(seed), 3000, rate=1000, shared=160, means=(20, 40))
    engine = SimulatedEngine(100_000, max_num_seqs=256)
    record = engine.replay(requests, seed)
    assert engine.scheduler.num_prefix_hits >= 160 * (len(requests) - 1)
    needed = sum(len(r.prompt) - 160 + r.n * r.num_tokens for r in requests) + 160
    assert record.num_computed <= needed


def hostile(rng: random.Random) -> dict[str, list[Request]]:
    """For 64 blocks of 16 tokens: 1024 tokens."""
    return {
        "two that need everything": [Request(0, tokens(rng, 8), 1000) for _ in range(2)],
        "all grow at once": [Request(0, tokens(rng, 1), 500) for _ in range(30)],
        "giants and dwarfs": [Request(0, tokens(rng, (900, 3)[i % 2]), (100, 5)[i % 2]) for i in range(40)],
        "groups that just fit": [Request(0, tokens(rng, 15), 240, n=4) for _ in range(6)],
        "a giant and a flood": [
            Request(0, tokens(rng, 500), 500),
            *(Request(i / 100, tokens(rng, 40), 30) for i in range(300)),
        ],
        "beams that just fit": [Request(0, tokens(rng, 15), 240, beam_width=4) for _ in range(4)],
        "the same prompt": [Request(0, [7] * 320, 400) for _ in range(12)],
    }


@pytest.mark.thinned
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("name", hostile(random.Random(0)))
def test_a_hostile_load_is_served(name, mode, seed):
    requests = hostile(random.Random(seed))[name]
    for caching in (True, False):
        record = SimulatedEngine(64, mode, enable_prefix_caching=caching).replay(requests, seed)
        arrivals = [served.arrival for served in record.served]
        assert arrivals == sorted(arrivals)
        needed = sum(len(r.prompt) + r.width * r.num_tokens for r in requests)
        assert record.num_computed < 3 * needed  # where the swap space is full, swapping computes again, too


def test_the_urgent_pass_and_the_others_are_served_too(seed):
    """One in ten is urgent, in a load of which half fits."""
    rng = random.Random(seed)
    requests = [
        Request(r.time, r.prompt, r.num_tokens, priority=int(i % 10 > 0))
        for i, r in enumerate(chats(rng, 400, rate=40))
    ]
    waited = {}
    for policy in ("fcfs", "priority"):
        record = SimulatedEngine(1200, scheduling_policy=policy).replay(requests, seed)
        urgent = [s.time_to_first_token for s in record.served if s.request.priority == 0]
        waited[policy] = sum(urgent) / len(urgent)
    assert waited["priority"] < 0.2 * waited["fcfs"]


@pytest.mark.parametrize(("moved_block", "faster"), [(1e-5, "swap"), (1e-1, "recompute")])
def test_auto_is_the_mode_that_is_faster_for_every_group(moved_block, faster, seed):
    """A token is computed in 0.1 ms. A block of one token or more is moved out and in again in 0.02 ms, or in
    0.2 s, where at most 6 beams compute its 16 tokens again in 9.6 ms."""
    requests = chats(random.Random(seed), 150, rate=40, beams=0.1)
    records = {}
    for mode in (faster, "auto"):
        engine = SimulatedEngine(300, mode, costs=Costs(moved_block=moved_block), enable_prefix_caching=False)
        record = engine.replay(requests, seed)
        assert engine.scheduler.num_preemptions > 5
        records[mode] = record.seconds, record.num_steps, record.num_moved, record.num_computed
    assert records["auto"] == records[faster]
    assert (records["auto"][2] > 0) == (faster == "swap")


@pytest.mark.parametrize("moved_block", [1e-4, 4e-4, 8e-4, 2e-3])
def test_auto_pays_for_each_group_the_less_of_the_two(moved_block, seed, monkeypatch):
    """Of the groups that it preempts. Which are preempted, and when, is another matter: runs of the modes as
    a whole are too different to compare."""
    costs = Costs(step=5e-3, prompt_token=1e-4, decoded_token=1e-4, moved_block=moved_block)
    requests = chats(random.Random(seed), 150, rate=40, beams=0.1)
    engine = SimulatedEngine(300, "auto", costs=costs, enable_prefix_caching=False)
    swapping, recomputing, swap_fits = [], [], []
    swaps = Preemption.swaps

    def watching(preemption, group, blocks):
        held = {block for seq in group.live if blocks.holds(seq.seq_id) for block in blocks.table(seq.seq_id)}
        own = [range(group.prompt_len, seq.num_computed) for seq in group.live]
        in_prompt = min(group.prompt_len, group.live[0].num_computed)
        swapping.append(2 * len(held) * moved_block)
        recomputing.append((in_prompt + sum(map(len, own))) * costs.prompt_token)
        swap_fits.append(blocks.cpu.num_free >= len(held))
        return swaps(preemption, group, blocks)

    monkeypatch.setattr(Preemption, "swaps", watching)
    steps = []
    record = engine.replay(requests, seed, observe=lambda record, seconds: steps.append(seconds))
    # Without preemption every token but an output's last is computed once, a prompt once for all outputs.
    once = sum(len(r.prompt) + r.width * (r.num_tokens - 1) for r in requests)
    paid = sum(steps) - record.num_steps * costs.step - once * costs.prompt_token
    assert len(swapping) == engine.scheduler.num_preemptions > 5
    assert paid == pytest.approx(
        sum(
            min(swap, again) if fits else again
            for swap, again, fits in zip(swapping, recomputing, swap_fits, strict=True)
        )
    )
