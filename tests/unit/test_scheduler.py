"""The scheduler's promises in drawn loads, with a simulated model behind it."""

from __future__ import annotations

import contextlib

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.config import ADMISSION_POLICIES, SCHEDULING_POLICIES
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.model.kv_cache import in_turn
from cupaged.engine.scheduling.preemption import Preemption
from cupaged.engine.scheduling.request import SequenceGroup, Status
from cupaged.engine.scheduling.scheduler import Scheduler
from tests.unit.drawn_layer_groups import LAYER_GROUPS
from tests.unit.simulation import EOS, SALTS, Simulation


def test_three_requests_over_two_steps():
    """The scheduler in plain values: 6 blocks of 4 tokens, 8 tokens and 3 sequences in a step."""
    blocks = BlockManager(num_gpu_blocks=6, num_cpu_blocks=0, block_size=4)
    scheduler = Scheduler(
        EngineConfig(max_num_seqs=3, max_num_batched_tokens=8),
        blocks=blocks,
        preemption=Preemption("recompute"),
        max_model_len=24,
        eos_token_ids=frozenset([EOS]),
    )
    prompts = {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3, 4, 6, 7], "c": [8, 9]}
    for arrival, (name, prompt) in enumerate(prompts.items()):
        params = SamplingParams(max_tokens=2)
        scheduler.add(SequenceGroup(name, None, prompt, params, max_tokens=2, arrival=arrival), seed=0)

    # All of "a" is computed; "b" begins with the same block, which is computed once; "c" gets what is left.
    step = scheduler.schedule()
    assert [(item.group.request_id, item.start, item.num_tokens) for item in step.scheduled] == [
        ("a", 0, 5),
        ("b", 4, 2),
        ("c", 0, 1),
    ]
    assert [item.num_samples for item in step.scheduled] == [1, 1, 0]  # "c" has a token of its prompt to come
    assert [list(blocks.table(item.seq.seq_id)) for item in step.scheduled] == [[0, 1], [0, 2], [3]]
    update(scheduler, step, [[10], [EOS], []])  # the model ends "b"
    assert [group.request_id for group in scheduler.running] == ["a", "c"]

    # "a" decodes its token, and the prompt of "c" is completed.
    step = scheduler.schedule()
    assert [(item.group.request_id, item.start, item.num_tokens) for item in step.scheduled] == [
        ("a", 5, 1),
        ("c", 1, 1),
    ]
    update(scheduler, step, [[11], [12]])  # the second token of "a" is its last
    assert [group.request_id for group in scheduler.running] == ["c"]
    assert blocks.gpu.num_free == 5


def update(scheduler, step, samples):
    scheduler.advance(step)
    scheduler.resolve(step, samples)


REQUEST = st.fixed_dictionaries(
    {
        "base": st.integers(0, 1),
        "shared": st.sampled_from([16, 24, 8, 32, 1, 0]),  # tokens of the base that it begins with
        "own": st.sampled_from([0, 1, 3, 9]),
        "max_tokens": st.sampled_from([20, 12, 5, 1]),
        "n": st.sampled_from([1, 2, 1, 4]),
        "beams": st.sampled_from([False, True, False]),
        "priority": st.integers(-1, 1),
        "cache_salt": st.sampled_from([None, None, *SALTS]),
        "skip_reading_prefix_cache": st.sampled_from([False, False, False, True]),
    }
)


class Machine(RuleBasedStateMachine):
    """Whatever comes in whatever order; `Simulation` checks after every step."""

    @initialize(
        num_blocks=st.integers(8, 16),
        num_cpu_blocks=st.sampled_from([24, 6, 0]),
        block_size=st.sampled_from([4, 3, 2, 8]),
        max_num_seqs=st.sampled_from([8, 4, 3, 1]),
        more_budget=st.sampled_from([3, 7, 24, 1, 0]),
        mode=st.sampled_from(["swap", "recompute", "auto"]),
        caching=st.sampled_from([True, True, False]),
        scheduling_policy=st.sampled_from(list(SCHEDULING_POLICIES)),
        admission_policy=st.sampled_from(list(ADMISSION_POLICIES)),
        seed=st.integers(0, 2**32),
        eos_chance=st.sampled_from([0.0, 0.05]),
        layer_groups=LAYER_GROUPS,
    )
    def start(self, max_num_seqs, more_budget, **drawn):
        self.simulation = Simulation(max_num_seqs=max_num_seqs, budget=max_num_seqs + more_budget, **drawn)
        self.caching = drawn["caching"]
        base = self.simulation.prompt(40)
        self.bases = [base, base[8:24] + base[:24]]  # blocks of the same tokens after others
        self.prefixes: list[SequenceGroup] = []

    @rule(requests=st.lists(REQUEST, min_size=1, max_size=5), steps=st.sampled_from([3, 1, 8]))
    def add(self, requests, steps):
        simulation = self.simulation
        for request in requests:
            settings = dict(request)
            prompt = self.bases[settings.pop("base")][: settings.pop("shared")]
            prompt = prompt + simulation.prompt(settings.pop("own"))
            try:
                simulation.add(prompt or [1], **settings)
            except ValueError:
                fits = len(prompt) < simulation.max_model_len and len(simulation.blocks.layers) == 1
                assert not fits or request["n"] > 1 or self.prefixes, "a single output that fits is refused"
        self.step(steps)

    @rule(count=st.sampled_from([2, 1, 5, 12]))
    def step(self, count):
        for _ in range(count):
            if self.simulation.scheduler.has_unfinished():
                self.simulation.step()

    @rule(
        kind=st.sampled_from(["abort", "replace", "end_one", "replace", "fail", "fail_in_parts"]),
        data=st.data(),
    )
    def disturb(self, kind, data):
        if self.simulation.unfinished():
            getattr(self, kind)(data)
            self.simulation.check_blocks()

    def fail(self, data):
        self.simulation.fail()

    def fail_in_parts(self, data):
        self.simulation.fail_in_parts()
        gone = self.simulation.scheduler.pinned.groups
        self.prefixes = [prefix for prefix in self.prefixes if prefix.request_id in gone]

    def abort(self, data):
        self.simulation.scheduler.abort(data.draw(st.sampled_from(self.simulation.unfinished())))

    def end_one(self, data):
        """As a stop string does, between steps."""
        group = data.draw(st.sampled_from(self.simulation.unfinished()))
        if group.forked and not group.beams and group.status is Status.RUNNING:
            self.simulation.scheduler.finish(group, data.draw(st.sampled_from(group.live)), "abort")

    def replace(self, data):
        """One sequence goes on twice, another not at all."""
        scheduler = self.simulation.scheduler
        sequences = scheduler._sequences
        groups = [g for g in scheduler.running if not (g.prefilling or g.beams) and len(g.live) > 1]
        if groups:
            group = data.draw(st.sampled_from(groups))
            parent, dropped = data.draw(st.permutations(group.live))[:2]
            child = sequences.fork(group, parent, dropped.index)
            child.token_ids[-1] = self.simulation.random.randrange(EOS)
            sequences.drop(group, dropped)
            assert dropped not in group.seqs

    @rule(
        base=st.integers(0, 1),
        length=st.sampled_from([8, 16, 24]),
        salt=st.sampled_from(SALTS),
        remove=st.booleans(),
    )
    def pin(self, base, length, salt, remove):
        if remove and self.prefixes:
            self.simulation.scheduler.remove_prefix(self.prefixes.pop(0).request_id)
            self.simulation.check_blocks()
        elif self.caching and len(self.prefixes) < 2 and length >= self.simulation.blocks.prefix_size:
            with contextlib.suppress(ValueError):  # it does not fit
                prefix = self.simulation.add_prefix(self.bases[base][:length], cache_salt=salt)
                self.prefixes.append(prefix)

    @rule(link=st.floats(0.1, 10), prefill=st.floats(0.1, 10))
    def measure(self, link, prefill):
        self.simulation.rates.moved(1, link)
        self.simulation.rates.computed(1, prefill)

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.run()


def test_any_sequence_of_calls_keeps_the_promises(seed):
    limits = settings(max_examples=150, stateful_step_count=20)
    run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=limits)


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 25), st.sampled_from([1, 1, 2, 4]), st.integers(0, 4)),
        min_size=6,
        max_size=14,
    ),
    num_blocks=st.integers(6, 30),
    block_size=st.sampled_from([1, 2, 4, 8]),
    mode=st.sampled_from(["swap", "recompute"]),
    caching=st.booleans(),
    window=st.sampled_from([None, 3, 9]),
)
@settings(max_examples=60)
def test_any_load_is_served_in_order(requests, num_blocks, block_size, mode, caching, window):
    simulation = Simulation(
        num_blocks=num_blocks,
        num_cpu_blocks=20,
        block_size=block_size,
        mode=mode,
        caching=caching,
        window=window,
    )
    for prompt_len, max_tokens, n, wait in requests:
        try:
            simulation.add(prompt_len, max_tokens, n)
        except ValueError:
            assert prompt_len >= simulation.max_model_len or n > 1, "a single output that fits is refused"
        for _ in range(wait):
            if simulation.scheduler.has_unfinished():
                simulation.step()
    simulation.run()


@pytest.mark.parametrize("window", [1, 4, 6, 9])
@pytest.mark.parametrize("caching", [False, True])
def test_what_a_window_leaves_behind_is_free(window, caching):
    """At its longest a sequence holds the blocks that its window touches, and the one it writes."""
    simulation = Simulation(num_blocks=12, budget=8, caching=caching, window=window)
    group = simulation.add(20, 28)
    seq = group.live[0]
    while not group.finished:
        plan = simulation.step()
        if not group.finished:
            first = max(0, plan.scheduled[0].start - window + 1) // 4
            held = simulation.blocks.num_distinct([seq.seq_id])
            written = -(-seq.num_computed // 4)
            # Blocks are given back when the next one is needed: one more may be held until then.
            assert written - first <= held <= written - first + 1
            assert simulation.blocks.gpu.num_free == 12 - held
    simulation.check_end()


def test_more_requests_run_at_once_where_windows_leave_blocks_behind():
    """Three sequences of 10 blocks in a pool of 12; with a window each holds three at most."""
    running = {}
    for window in (None, 6):
        simulation = Simulation(num_blocks=12, budget=32, window=window, max_model_len=40)
        groups = [simulation.add(4, 36) for _ in range(3)]
        for _ in range(30):
            simulation.step()
        running[window] = len(simulation.scheduler.running)
        simulation.run()
        assert all(group.finished for group in groups)
        if window:
            assert simulation.scheduler.num_preemptions == 0
    assert running == {None: 1, 6: 3}


@pytest.mark.parametrize("window", [2, 5])
def test_prefixes_are_found_behind_a_window_and_pinned_ones_stay(window):
    simulation = Simulation(num_blocks=24, budget=32, window=window)
    prompt = simulation.prompt(32)
    simulation.add_prefix(prompt[:16])
    simulation.step()
    assert simulation.scheduler.num_pinned_blocks() == 4
    simulation.add(prompt, 9)
    simulation.run()
    assert simulation.scheduler.num_prefix_hits == 16
    simulation.add(prompt, 2)
    simulation.run()
    assert simulation.scheduler.num_prefix_hits == 16 + 31, "what was given back is found again"
    assert simulation.scheduler.num_pinned_blocks() == 4


@pytest.mark.parametrize("window", [2, 3, 9])
def test_what_was_generated_is_found_behind_a_window(window):
    simulation = Simulation(num_blocks=24, budget=32, window=window)
    group = simulation.add(6, 27)
    simulation.run()
    simulation.add(group.seqs[0].token_ids, 1)
    simulation.run()
    assert simulation.scheduler.num_prefix_hits == 32, "of 33 tokens the last was never computed"


def test_what_the_first_output_gave_back_is_found_for_the_second():
    """The prompt's blocks are evicted and those behind them are not. The first output computes the prompt
    again in chunks, giving back what its window leaves behind, before the second one looks for its blocks."""
    simulation = Simulation(num_blocks=14, budget=48, window=5, scheduling_policy="priority")
    group = simulation.add(16, 14, n=2)
    while group.live[0].num_computed < 24:
        simulation.step()
    other = simulation.add(40, 1, priority=-1)
    first, second = group.live
    simulation.fail()  # so that the blocks which the other request takes hold nothing
    assert group.status is Status.PREEMPTED
    simulation.scheduler.abort(other)
    simulation.scheduler._max_num_batched_tokens = 8
    while first.num_computed < 16:
        assert second.num_computed == 0
        simulation.step()
    assert first.num_computed == 16
    assert second.num_computed > 20
    simulation.run()


def test_a_request_that_needs_exactly_the_pool_runs_and_one_block_more_is_refused():
    """Prompt of 1.5 blocks, 3 outputs to the end of the 2nd: one block shared, three of their own."""
    simulation = Simulation(num_blocks=4)
    simulation.add(6, 3, n=3)
    with pytest.raises(ValueError, match="may need 7 blocks"):
        simulation.add(6, 4, n=3)
    simulation.run()


def test_refusals_name_the_limit():
    simulation = Simulation(num_blocks=4, max_num_seqs=3)
    with pytest.raises(ValueError, match="max_model_len"):
        simulation.add(16, 1)
    with pytest.raises(ValueError, match="max_num_seqs"):
        simulation.add(2, 1, n=4)
    assert not simulation.scheduler.has_unfinished()


def test_the_latest_is_preempted_first_and_comes_back_before_anything_new():
    """Two requests of two blocks that grow in a pool of five; a third waits."""
    simulation = Simulation(num_blocks=5, budget=32)
    first, second = simulation.add(8, 9), simulation.add(8, 4)
    simulation.step()
    third = simulation.add(1, 1)
    statuses = []
    while not first.finished:
        simulation.step()
        statuses.append((second.status, third.status))
    assert (Status.PREEMPTED, Status.WAITING) in statuses
    assert (Status.PREEMPTED, Status.RUNNING) not in statuses
    assert simulation.scheduler.num_preemptions == 1
    simulation.run()


@pytest.mark.parametrize(("num_cpu_blocks", "status"), [(5, Status.SWAPPED), (1, Status.PREEMPTED)])
def test_a_group_is_swapped_as_a_whole_or_dropped_as_a_whole(num_cpu_blocks, status):
    """Of the second request's outputs none stays; where the swap space is too small all are dropped."""
    simulation = Simulation(num_blocks=6, num_cpu_blocks=num_cpu_blocks, mode="swap", budget=32)
    first, second = simulation.add(8, 12), simulation.add(6, 6, n=2)
    while second.status not in (Status.PREEMPTED, Status.SWAPPED):
        simulation.step()
    assert second.status is status
    assert len(second.live) == 2
    assert first.status is Status.RUNNING
    while second.status is not Status.RUNNING or not all(seq.num_computed for seq in second.seqs):
        simulation.step()
    tables = [simulation.blocks.table(seq.seq_id) for seq in second.seqs]
    assert tables[0][0] == tables[1][0], "the prompt's full block is shared again"
    assert bool(simulation.num_swaps) == (status is Status.SWAPPED)
    simulation.run()


@pytest.mark.parametrize(
    ("copies", "parts"),
    [
        ([], []),
        ([(1, 2), (1, 3), (4, 5)], [3]),
        ([(1, 2), (3, 1)], [1, 1]),  # 1 is free after it was copied, and taken at once
        ([(1, 2), (2, 3)], [1, 1]),
        ([(1, 2), (3, 2), (4, 5)], [1, 2]),
    ],
)
def test_copies_that_hang_together_are_made_in_turn(copies, parts):
    found = list(in_turn(tuple(copies)))
    assert [len(part) for part in found] == parts
    assert [copy for part in found for copy in part] == copies


def test_a_group_that_is_computed_again_holds_its_prompt_once():
    """Though the old copy of the prompt is in the cache, where the second output's tokens are found; the pool
    has what the group needs at its largest."""
    simulation = Simulation(num_blocks=10, block_size=2, budget=32, scheduling_policy="priority")
    simulation.add(4, 8, n=2, skip_reading_prefix_cache=True)
    for _ in range(5):
        simulation.step()
    simulation.add(4, 1, priority=-1)
    simulation.run()
    assert simulation.scheduler.num_preemptions == 1


def test_no_more_make_way_than_have_to():
    """Three hold 3 of 12 blocks each. An urgent prompt of 4 blocks, and one that stays free, take those of
    the last one."""
    simulation = Simulation(num_blocks=12, budget=32, scheduling_policy="priority")
    groups = [simulation.add(8, 4) for _ in range(3)]
    for _ in range(2):
        simulation.step()
    assert simulation.blocks.gpu.num_free == 3
    urgent = simulation.add(16, 1, priority=-1)
    plan = simulation.step()
    assert [group.status for group in groups] == [Status.RUNNING, Status.RUNNING, Status.PREEMPTED]
    assert {item.group for item in plan.scheduled} == {urgent, *groups[:2]}
    simulation.run()


def test_who_reads_no_cache_is_no_query_of_it():
    simulation = Simulation(num_blocks=12)
    prompt = simulation.prompt(9)
    simulation.add(prompt, 1)
    simulation.run()
    assert (simulation.scheduler.num_prefix_queries, simulation.scheduler.num_prefix_hits) == (9, 0)
    simulation.add(prompt, 1, skip_reading_prefix_cache=True)
    simulation.run()
    assert (simulation.scheduler.num_prefix_queries, simulation.scheduler.num_prefix_hits) == (9, 0)
    simulation.add(prompt, 1)
    simulation.run()
    assert (simulation.scheduler.num_prefix_queries, simulation.scheduler.num_prefix_hits) == (18, 8)


def test_a_prefix_is_where_requests_find_it():
    """An urgent request makes the prefix that it begins with wait, half computed in the swap space, and
    computes it itself. Two copies and the request's own blocks would not fit into the pool."""
    simulation = Simulation(
        num_blocks=5, num_cpu_blocks=5, mode="swap", budget=5, scheduling_policy="priority"
    )
    prompt = simulation.prompt(16)
    prefix = simulation.add_prefix(prompt[:12])
    simulation.step()
    simulation.add(prompt, 4, priority=-1)
    simulation.step()
    assert prefix.status is Status.SWAPPED
    simulation.run()
    simulation.add(prompt, 4)
    simulation.run()
    assert simulation.scheduler.num_prefix_hits >= 12


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes():
    """Every running sequence decodes in every step, whatever the prompt takes."""
    simulation = Simulation(num_blocks=64, budget=8)
    first = simulation.add(3, 20)
    simulation.step()
    long = simulation.add(30, 1)
    for step in range(1, 5):
        simulation.step()
        assert first.seqs[0].num_output_tokens == step + 1
        assert long.seqs[0].num_computed == 7 * step
    simulation.run()


def test_nobody_reads_what_one_that_failed_never_wrote():
    """The second is admitted on blocks that the first is to write in the same step."""
    simulation = Simulation(num_blocks=16, budget=64)
    prompt = simulation.prompt(12)
    first, second = (simulation.add(prompt + more, 4) for more in ([], [1, 2]))
    plan = simulation.scheduler.schedule()
    assert [item.start for item in plan.scheduled] == [0, 12], "they do not share"
    assert [item.group for item in simulation.scheduler.hold(plan.scheduled)] == [first]
    assert second.status is Status.PREEMPTED
    simulation.scheduler.abort(first)
    simulation.run()
    assert second.seqs[0].finish_reason == "length"


def test_a_request_comes_back_beside_a_prefix_that_was_pinned_while_it_was_swapped_out():
    """It has computed half a block of what the prefix holds: with that copy of its own it does not fit."""
    simulation = Simulation(
        num_blocks=12, num_cpu_blocks=24, block_size=2, budget=11, mode="swap", scheduling_policy="priority"
    )
    prompt = simulation.prompt(19)
    group = simulation.add(prompt, 2, priority=1)
    simulation.step()
    simulation.add_prefix(prompt[:16])
    simulation.step()
    assert group.status is Status.SWAPPED
    simulation.run()
    assert group.finished
