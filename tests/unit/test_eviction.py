"""Eviction policies, each against a plain model of what it has to choose, and in a pool and an engine."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from benchmarks.clairvoyant import Clairvoyant
from benchmarks.simulation import Request, SimulatedEngine, Spans
from cupaged.engine import EngineConfig
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.block_pool import BlockPool
from cupaged.engine.memory.eviction import EVICTION_POLICIES, LFU, LRU, CostAware, EvictionPolicy


@dataclass
class Model:
    """What is cached, in the order of its last use, and what a policy has been told."""

    cached: dict[int, tuple[object, int]] = field(default_factory=dict)  # block -> key, num_lost
    uses: Counter = field(default_factory=Counter)  # of contents that were not evicted
    age_of: dict[int, float] = field(default_factory=dict)  # the age when a block was added
    age: float = 0.0

    def add(self, block: int, key: object, num_lost: int) -> None:
        self.uses[block, key] += 1
        self.cached[block] = key, num_lost
        self.age_of[block] = self.age

    def rank(self, name: str, block: int) -> float:
        key, num_lost = self.cached[block]
        if name == "lru":
            return 0
        if name == "lfu":
            return self.uses[block, key]
        return self.age_of[block] + self.uses[block, key] * num_lost

    def evict(self, name: str) -> int:
        ranks = {block: self.rank(name, block) for block in self.cached}
        block = min(self.cached, key=ranks.__getitem__)  # the first of equals
        self.age = ranks[block]
        key, _ = self.cached.pop(block)
        del self.uses[block, key]
        return block


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_a_policy_chooses_what_its_model_does(name, seed):
    rng = random.Random(seed)
    policy, model = EVICTION_POLICIES[name](), Model()
    num_blocks = rng.choice([1, 3, 20])
    keys = {block: (0, block) for block in range(num_blocks)}
    for _ in range(rng.choice([50, 2000])):
        used = [block for block in range(num_blocks) if block not in model.cached]
        action = rng.random()
        if used and action < 0.5:
            block = rng.choice(used)
            num_lost = rng.randrange(1, 6)
            policy.add(block, keys[block], num_lost)
            model.add(block, keys[block], num_lost)
        elif model.cached and action < 0.8:
            block = rng.choice(list(model.cached))
            policy.remove(block)
            del model.cached[block]
            if rng.random() < 0.3:  # its content is forgotten, and it gets another
                del model.uses[block, keys[block]]
                keys[block] = (keys[block][0] + 1, block)
        elif model.cached:
            block = policy.evict()
            assert block == model.evict(name)
            keys[block] = (keys[block][0] + 1, block)
        assert len(policy) == len(model.cached)
        assert [block in policy for block in range(num_blocks)] == [
            block in model.cached for block in range(num_blocks)
        ]
    while model.cached:
        assert policy.evict() == model.evict(name)
    with pytest.raises(KeyError):
        policy.evict()


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_what_is_used_for_ever_takes_no_more_memory(name):
    """Blocks that come and go without an eviction leave nothing behind."""
    policy = EVICTION_POLICIES[name]()
    for i in range(20_000):
        policy.add(i % 7, "same", 1)
        policy.remove(i % 7)
    assert len(policy) == 0
    assert len(getattr(policy, "_heap", ())) <= 100


def outcome(policy: type[EvictionPolicy], contents: str, then: str) -> list[str]:
    """Use contents one after the other in a pool of three blocks, then ask which are there."""
    pool = BlockPool(3, policy())
    for key in contents:
        block = pool.find(key)
        if block is None:
            block = pool.allocate()
            pool.register(block, key)
        else:
            pool.share(block)
        pool.release(block)
        pool.check_integrity(Counter())
    return [key for key in then if pool.find(key) is not None]


def test_what_was_used_often_stays_with_lfu_and_goes_with_lru():
    assert outcome(LRU, "aaabcd", "abcd") == ["b", "c", "d"]
    assert outcome(LFU, "aaabcd", "abcd") == ["a", "c", "d"]
    assert outcome(CostAware, "aaabcd", "abcd") == ["a", "c", "d"]


def test_what_was_used_often_long_ago_stays_with_lfu_and_goes_with_cost():
    contents = "aaa" + "".join(map(chr, range(200, 240)))
    assert outcome(LFU, contents, "a") == ["a"]
    assert outcome(CostAware, contents, "a") == []


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_of_a_sequence_the_end_goes_first(name, seed):
    rng = random.Random(seed)
    count = rng.randrange(2, 12)
    blocks = BlockManager(count, 0, 4, name)
    keys = [bytes([i]) for i in range(count)]
    blocks.append(0, 0, 4 * count, keys)
    blocks.confirm()
    blocks.free(0, 4 * count, keys)
    for left in reversed(range(count)):
        blocks.append(1, 0, 4 * (count - left))
        assert blocks.find_prefix(keys).num_tokens == 4 * left
        blocks.check_integrity()
        blocks.free(1)
        blocks.append(1, 0, 4 * (count - left))  # what is empty is taken before what is cached
        assert blocks.find_prefix(keys).num_tokens == 4 * left
        blocks.free(1)


def chats(rng: random.Random, count: int) -> list[Request]:
    """Prompts of which most begin with one of a few prefixes."""
    requests = []
    for i in range(count):
        k = rng.randrange(12)
        spans = ((k, 16 * (1 + k % 5)), (1000 + i, rng.randrange(1, 60)))
        requests.append(Request(i / 50, Spans(*spans), rng.randrange(1, 40)))
    return requests


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_a_load_is_served_with_every_policy(name, mode, seed, monkeypatch):
    """The pool is short of memory all the time, and its state is checked after every step."""
    requests = chats(random.Random(seed), 150)
    engine = SimulatedEngine(40, mode, num_cpu_blocks=10, eviction_policy=name)
    record = engine.replay(requests, observe=lambda *_: engine.blocks.check_integrity())
    assert record.num_ended == len(requests)
    assert engine.scheduler.num_prefix_hits > 0


def test_an_object_of_ones_own(seed):
    """The most recently used block goes first: no good, but what was asked for."""

    class MRU(LRU):
        def evict(self) -> int:
            return self._blocks.popitem(last=True)[0]

    assert outcome(MRU, "abcd", "abcd") == ["a", "b", "d"]
    requests = chats(random.Random(seed), 40)
    for make in (MRU, lambda: MRU()):
        engine = SimulatedEngine(40, eviction_policy=make)
        assert engine.replay(requests).num_ended == len(requests)
        assert isinstance(engine.blocks.gpu._cached, MRU)
        assert isinstance(engine.blocks.cpu._cached, MRU)


def test_what_makes_no_policies_is_refused_by_name():
    shared, filled = LRU(), LRU()
    filled.add(0, "a", 1)
    for make in (dict, lambda: None, lambda: filled):
        EngineConfig(eviction_policy=make)
        with pytest.raises(ValueError, match="eviction_policy must make an EvictionPolicy without blocks"):
            BlockManager(4, 4, 4, make)
    with pytest.raises(ValueError, match=r"eviction_policy made .* twice"):
        BlockManager(4, 4, 4, lambda: shared)


def test_the_clairvoyant_evicts_what_is_used_last(seed):
    """Against a model that looks at all uses to come; one that came to nothing is no reason to stay."""
    rng = random.Random(seed)
    uses = {key: sorted(rng.sample(range(60), rng.randrange(8))) for key in range(12)}
    now = 0
    policy = Clairvoyant({key: deque(times) for key, times in uses.items()}, lambda: now)
    cached: dict[int, int] = {}  # block -> key, in the order of addition
    for _ in range(200):
        now = min(60, now + (rng.random() < 0.3))
        if rng.random() < 0.6 and len(cached) < 12:
            block = rng.choice([block for block in range(12) if block not in cached])
            cached[block] = rng.choice([key for key in uses if key not in cached.values()])
            policy.add(block, cached[block], 1)
        elif cached and rng.random() < 0.3:
            block = rng.choice(list(cached))
            policy.remove(block)
            del cached[block]
        elif cached:
            next_use = {b: min((t for t in uses[k] if t >= now), default=math.inf) for b, k in cached.items()}
            expected = max(cached, key=next_use.__getitem__)
            assert policy.evict() == expected
            del cached[expected]
