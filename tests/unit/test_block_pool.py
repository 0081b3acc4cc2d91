"""The pool by itself: it pages whatever has blocks. Here, pages of LoRA adapters between a disk, a device and
host memory, against a plain model of who uses what and when."""

from __future__ import annotations

import doctest
from collections import Counter

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cupaged.engine.memory import block_pool
from cupaged.engine.memory.block_pool import BlockPool, move, num_to_move


def page_content(adapter: int, page: int) -> str:
    return f"adapter {adapter}, page {page}"


class Adapters(RuleBasedStateMachine):
    """Requests load adapters, whole or not at all, and let go of them; some wait in host memory meanwhile."""

    @initialize(num_device=st.integers(1, 8), num_host=st.integers(0, 8))
    def start(self, num_device, num_host):
        self.device, self.host = BlockPool(num_device), BlockPool(num_host)
        self.memory = {self.device: [None] * num_device, self.host: [None] * num_host}
        self.running: list[tuple[list[int], list]] = []  # blocks and keys
        self.waiting: list[tuple[list[int], list]] = []
        self.unused: list = []  # keys of the device's cached blocks, the longest unused first

    def hold(self, keys):
        self.unused = [key for key in self.unused if key not in keys]

    def drop(self, keys):
        """A request let go of these, in this order."""
        held = {key for _, others in self.running for key in others}
        self.unused += [key for key in keys if key not in held and key not in self.unused]

    def allocate(self):
        full = self.device.num_free == self.device.num_cached
        block = self.device.allocate()
        if full:  # the model says which one had to go
            assert self.memory[self.device][block] == page_content(*self.unused.pop(0))
        return block

    @rule(adapter=st.integers(0, 4), num_pages=st.integers(1, 4))
    def load(self, adapter, num_pages):
        keys = [(adapter, page) for page in range(num_pages)]
        hits = [block for block in map(self.device.find, keys) if block is not None]
        unused = [block for block in hits if self.device.ref_counts[block] == 0]
        if num_pages - len(hits) + len(unused) > self.device.num_free:
            return
        for block in hits:
            self.device.share(block)
        self.hold(keys)
        blocks = []
        for key in keys:
            block = self.device.find(key)
            if block is None:
                block = self.allocate()
                self.device.promise(block, key)
                self.memory[self.device][block] = page_content(*key)
            blocks.append(block)
        self.device.confirm()
        self.running.append((blocks, keys))

    @rule(data=st.data())
    def end(self, data):
        if self.running:
            blocks, keys = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            for block in blocks:
                self.device.release(block)
            self.drop(keys)

    @rule(data=st.data())
    def preempt(self, data):
        """As many as drawn go to the host at once; what they share is copied once."""
        count = data.draw(st.integers(0, len(self.running)))
        first = len(self.running) - count
        chosen = self.running[first:]
        needed, free = num_to_move(chosen, self.host), self.host.num_free
        if needed > free:
            return
        moved, copies = move(chosen, self.device, self.host)
        assert free - self.host.num_free == needed
        assert len(copies) == len({target for _, target in copies})
        for source, target in copies:
            self.memory[self.host][target] = self.memory[self.device][source]
        self.host.confirm()
        self.waiting += [(blocks, keys) for blocks, (_, keys) in zip(moved, chosen)]
        for _, keys in chosen:
            del self.running[first]  # the next ones still hold what they share with it
            self.drop(list(reversed(keys)))

    @rule()
    def resume(self):
        needed, free = num_to_move(self.waiting[:1], self.device), self.device.num_free
        if not self.waiting or needed > free:
            return
        blocks, keys = self.waiting.pop(0)
        self.hold(keys)
        (moved,), copies = move([(blocks, keys)], self.host, self.device)
        assert free - self.device.num_free == needed
        for source, target in copies:
            old = self.memory[self.device][target]
            self.unused = [key for key in self.unused if page_content(*key) != old]
            self.memory[self.device][target] = self.memory[self.host][source]
        self.device.confirm()
        self.running.append((moved, keys))

    @rule(data=st.data())
    def a_page_changes(self, data):
        """One that a single request uses, say by training: nobody may find it under its old name."""
        alone = [
            (blocks, keys, i)
            for blocks, keys in self.running
            for i, block in enumerate(blocks)
            if self.device.ref_counts[block] == 1 and isinstance(keys[i], tuple)
        ]
        if alone:
            blocks, keys, i = data.draw(st.sampled_from(alone))
            self.device.forget(blocks[i])
            assert self.device.find(keys[i]) is None
            for block in blocks:
                self.device.release(block)
            self.running.remove((blocks, keys))
            self.drop([key for j, key in enumerate(keys) if j != i])

    @rule(adapter=st.integers(0, 4))
    def a_read_fails(self, adapter):
        """Nothing is found of what a failed load promised."""
        key = (adapter, 9)
        if self.device.num_free == 0:
            return
        block = self.allocate()
        self.device.promise(block, key)
        assert self.device.find(key) == block
        self.device.release(block)
        self.device.revoke()
        assert self.device.find(key) is None
        self.memory[self.device][block] = None

    @invariant()
    def everybody_has_the_pages_of_his_adapter(self):
        if not hasattr(self, "device"):
            return
        for pool, users in ((self.device, self.running), (self.host, self.waiting)):
            pool.check_integrity(Counter(block for blocks, _ in users for block in blocks))
            for blocks, keys in users:
                assert [self.memory[pool][block] for block in blocks] == [page_content(*key) for key in keys]
            for adapter in range(5):
                for page in range(4):
                    block = pool.find((adapter, page))
                    assert block is None or self.memory[pool][block] == page_content(adapter, page)
        assert self.device.num_cached == len(self.unused)


def test_adapters_share_pages_and_come_back(seed):
    limits = settings(max_examples=150, stateful_step_count=30)
    run_state_machine_as_test(hypothesis.seed(seed)(Adapters), settings=limits)


def test_the_example_in_the_docstring():
    assert doctest.testmod(block_pool).failed == 0


def test_the_longest_unused_goes_first_and_a_hit_makes_it_recent():
    pool = BlockPool(3)
    for key in "abc":
        pool.register(pool.allocate(), key)
    for key in "abc":
        pool.release(pool.find(key))
    pool.share(pool.find("a"))
    pool.release(pool.find("a"))
    evicted = []
    for _ in range(3):
        before = {key for key in "abc" if pool.find(key) is not None}
        pool.allocate()
        evicted += before - {key for key in "abc" if pool.find(key) is not None}
    assert evicted == ["b", "c", "a"]


def test_a_promise_is_revoked_once_and_alone():
    """Not with what was there before, nor with what came after."""
    pool = BlockPool(4)
    old, twin, promised, later = (pool.allocate() for _ in range(4))
    pool.register(old, "old")
    for block, key in ((twin, "old"), (old, "another"), (promised, "new")):
        pool.promise(block, key)
    assert pool.find("new") == promised
    pool.revoke()
    assert [pool.find(key) for key in ("old", "another", "new")] == [old, None, None]
    pool.register(promised, "new")
    pool.promise(later, "later")
    pool.confirm()
    pool.revoke()
    assert [pool.find(key) for key in ("old", "new", "later")] == [old, promised, later]


def lose(pool: BlockPool) -> None:
    pool._empty.pop()


def free_twice(pool: BlockPool) -> None:
    pool._empty.append(pool._empty[-1])


def free_in_use(pool: BlockPool) -> None:
    pool._empty.append(0)


def free_a_stranger(pool: BlockPool) -> None:
    pool._empty.append(pool.num_blocks)


def miscount(pool: BlockPool) -> None:
    pool.share(0)


def cache_in_use(pool: BlockPool) -> None:
    pool._cached.add(0, None, 1)


def cache_nothing(pool: BlockPool) -> None:
    pool._cached.add(pool._empty.pop(), None, 1)


def find_wrong(pool: BlockPool) -> None:
    pool._block_of["x"] = 2


@pytest.mark.parametrize(
    "damage",
    [lose, free_twice, free_in_use, free_a_stranger, miscount, cache_in_use, cache_nothing, find_wrong],
)
def test_check_integrity_sees_damage(damage):
    pool = BlockPool(4)
    assert pool.allocate() == 0
    pool.check_integrity(Counter([0]))
    damage(pool)
    with pytest.raises(RuntimeError):
        pool.check_integrity(Counter([0]))
