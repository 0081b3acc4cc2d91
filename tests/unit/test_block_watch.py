"""What is reported of the blocks, replayed, is the state of the block manager."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from cupaged.engine.config import ADMISSION_POLICIES, SCHEDULING_POLICIES
from cupaged.engine.memory.block_tables import NO_BLOCK
from cupaged.engine.scheduling.block_watch import BlockWatch
from cupaged.engine.scheduling.request import Status
from tests.unit.simulation import SALTS, Simulation


class Replay:
    """The state as somebody knows it who has read the reports only."""

    def __init__(self) -> None:
        self.number = None
        self.happened: Counter[str] = Counter()

    def read(self, report: dict) -> None:
        report = json.loads(json.dumps(report))
        if report["type"] == "snapshot":
            self.pools, self.requests, self.hashes = {"gpu": {}, "cpu": {}}, {}, {"GPU": set(), "CPU": set()}
        else:
            assert report["number"] == self.number + 1
            self.happened.update(event["type"] for event in report["happened"])
        self.number = report["number"]
        for name, pool in self.pools.items():
            for block, references, content in report[name]:
                pool[block] = (references, content)
                if not references and content is None:
                    del pool[block]
        for request in report["requests"]:
            before = self.requests.get(request["id"], (None, {}))[1]
            sequences = {}
            for seq in request["sequences"]:
                table = before.get(seq["sequence"], (0, 0, "", []))[3][: seq["start"]] + seq["blocks"]
                sequences[seq["sequence"]] = (seq["tokens"], seq["computed"], seq["medium"], table)
            self.requests[request["id"]] = (request["status"], sequences)
        for name in report.get("ended", ()):
            del self.requests[name]
        for event in report["events"]:
            self.read_event(**event)
        self.totals = {name: report[name] for name in ("prefix_cache_hits", "num_preemptions")}

    def read_event(self, type, block_hashes=(), medium="", block_size=None) -> None:
        """As a router does, which reads nothing else."""
        if type == "AllBlocksCleared":
            self.hashes = {"GPU": set(), "CPU": set()}
        elif type == "BlockStored":
            assert not self.hashes[medium] & set(block_hashes)
            self.hashes[medium] |= set(block_hashes)
        else:
            assert type == "BlockRemoved"
            assert self.hashes[medium] >= set(block_hashes)
            self.hashes[medium] -= set(block_hashes)


def check(replay: Replay, simulation: Simulation) -> None:
    blocks, scheduler = simulation.blocks, simulation.scheduler
    for name, pool in (("gpu", blocks.gpu), ("cpu", blocks.cpu)):
        keys = {b: pool.key_of(b) for b in range(pool.num_blocks)}
        truth = {
            b: (pool.ref_counts[b], None if key is None else key[:8].hex())
            for b, key in keys.items()
            if pool.ref_counts[b] or key is not None
        }
        assert replay.pools[name] == truth
        assert replay.hashes[name.upper()] == {key[:8].hex() for key in keys.values() if key is not None}
    groups = [g for g in simulation.groups if g.status is not Status.FINISHED]
    named = {g.request_id: g for g in groups}
    named |= {f"prefix {name}": g for name, g in scheduler.pinned.groups.items()}
    assert set(replay.requests) == set(named)
    held: dict[str, Counter[int]] = {"GPU": Counter(), "CPU": Counter()}
    for name, group in named.items():
        status, sequences = replay.requests[name]
        assert status == group.status.value
        assert list(sequences) == [seq.seq_id for seq in group.live]
        for seq in group.live:
            tokens, computed, medium, table = sequences[seq.seq_id]
            assert (tokens, computed) == (len(seq.token_ids), seq.num_computed)
            place, truth = blocks.place(seq.seq_id)
            assert (medium.lower(), table) == (place, [None if b == NO_BLOCK else b for b in truth])
            held[medium].update(block for block in table if block is not None)
    for name, pool in replay.pools.items():  # the tables explain every reference
        assert {b: references for b, (references, _) in pool.items() if references} == held[name.upper()]
    assert replay.totals == {
        "prefix_cache_hits": scheduler.num_prefix_hits,
        "num_preemptions": scheduler.num_preemptions,
    }


def load(rng: random.Random, simulation: Simulation, caching: bool) -> None:
    """Add, abort, pin, fail."""
    base = [7] * 30
    choice = rng.random()
    if choice < 0.45:
        n = rng.choice([1, 1, 2, 3])
        prompt = base[: rng.choice([0, 8, 17, 24])] + simulation.prompt(rng.randrange(1, 8))
        group = {"beams": rng.random() < 0.3, "cache_salt": rng.choice([None, *SALTS])}
        if len(prompt) < simulation.max_model_len - 1 and n <= simulation.max_num_seqs:
            try:
                simulation.add(prompt, rng.randrange(1, 16), n, **group)
            except ValueError:
                return  # does not fit beside a pinned prefix, or alone
    elif choice < 0.5 and simulation.unfinished():
        simulation.scheduler.abort(rng.choice(simulation.unfinished()))
    elif choice < 0.53 and caching and simulation.scheduler._memory.preempts:
        if simulation.scheduler.pinned.groups:
            simulation.scheduler.remove_prefix(next(iter(simulation.scheduler.pinned.groups)))
        else:
            try:
                simulation.add_prefix(base[:16])
            except ValueError:
                return
    elif choice < 0.56 and simulation.scheduler.has_unfinished():
        rng.choice([simulation.fail, simulation.fail_in_parts])()


def draw(rng: random.Random, caching: bool) -> Simulation:
    return Simulation(
        num_blocks=rng.randrange(10, 24),
        num_cpu_blocks=rng.choice([0, 8, 24]),
        block_size=rng.choice([2, 4]),
        mode=rng.choice(["swap", "recompute", "swap"]),
        caching=caching,
        scheduling_policy=rng.choice(["fcfs", *SCHEDULING_POLICIES]),
        admission_policy=rng.choice(list(ADMISSION_POLICIES)),
        seed=rng.getrandbits(32),
        eos_chance=0.02,
        window=rng.choice([None, None, 5]),
        memory_policy=rng.choice(["paged"] * 5 + ["orca-oracle"]),
    )


def test_reports_replayed_are_the_state(seed):
    """From a snapshot at any time, after any number of steps, and after a gap that a snapshot fills."""
    rng = random.Random(seed)
    for _ in range(6):
        caching = rng.random() < 0.8
        simulation = draw(rng, caching)
        watch, replay = None, Replay()
        for _ in range(120):
            load(rng, simulation, caching)
            if simulation.scheduler.has_unfinished():
                simulation.step()
            if watch is None:
                if rng.random() < 0.1:
                    watch = BlockWatch(simulation.blocks, simulation.scheduler)
                    replay.read(watch.snapshot())
                    check(replay, simulation)
                continue
            if rng.random() < 0.6:
                report = watch.changes()
                if report is not None:
                    if rng.random() < 0.1:
                        report = watch.snapshot()  # the report was lost
                    replay.read(report)
                assert watch.changes() is None, "nothing has happened"
                check(replay, simulation)
            if rng.random() < 0.02:
                watch.close()
                watch = None


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_what_happens_is_told(mode, seed):
    """Forks, copies on write, evictions, hits and preemptions: as many as there were."""
    simulation = Simulation(num_blocks=16, num_cpu_blocks=16, mode=mode, seed=seed, max_num_seqs=8)
    watch, replay = BlockWatch(simulation.blocks, simulation.scheduler), Replay()
    replay.read(watch.snapshot())
    shared = simulation.prompt(13)
    for _ in range(6):
        simulation.add(shared + simulation.prompt(1), 14, 3)
    forks = sum(group.width - 1 for group in simulation.groups)
    swaps = []
    while simulation.scheduler.has_unfinished():
        before = simulation.num_copies
        plan = simulation.step()
        report = watch.changes()
        replay.read(report)
        copied = [e["blocks"][0] for e in report["happened"] if e["type"] == "copy_on_write"]
        assert copied == list(plan.copies)
        assert len(copied) == simulation.num_copies - before
        swaps += [pair for e in report["happened"] if e["type"] == "swap_out" for pair in e["blocks"]]
        back = [pair for e in report["happened"] if e["type"] == "swap_in" for pair in e["blocks"]]
        assert back == list(plan.swap_in)
    assert replay.happened["fork"] >= forks
    assert replay.happened["copy_on_write"] == simulation.num_copies > 0
    assert replay.happened["eviction"] > 0
    assert replay.happened["prefix_hit"] > 0
    assert (
        replay.happened["swap_out"] + replay.happened["recompute"] == simulation.scheduler.num_preemptions > 0
    )
    assert len(swaps) == simulation.num_swaps
    assert bool(swaps) == (mode == "swap")


def test_nothing_is_noted_when_nobody_watches(seed):
    simulation = Simulation(num_blocks=16, num_cpu_blocks=16, mode="swap", seed=seed)
    pools = (simulation.blocks, simulation.blocks.gpu, simulation.blocks.cpu)
    watch = BlockWatch(simulation.blocks, simulation.scheduler)
    assert [pool.journal for pool in pools] == [[], [], []]
    watch.close()
    for _ in range(5):
        simulation.add(13, 14, 3)
    simulation.run()
    assert [pool.journal for pool in pools] == [None, None, None]
