"""A scheduler with a simulated model and memory behind it, which checks every promise after every step."""

from __future__ import annotations

import random
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC

from benchmarks.simulation import SimulatedEngine
from cupaged.engine import SamplingParams
from cupaged.engine.memory.layer_groups import ONE_GROUP, LayerGroup, ReadWindow
from cupaged.engine.model.kv_cache import in_turn
from cupaged.engine.scheduling.beam_search import num_candidates
from cupaged.engine.scheduling.failed_step import FailedStep
from cupaged.engine.scheduling.request import Candidates, Sequence, SequenceGroup, Status
from cupaged.engine.scheduling.step_plan import Plan, ScheduledSequence
from tests.unit.paged_memory import PagedMemory

EOS = 99
SALTS = (None, "salt")


class Simulation(SimulatedEngine):
    """Steps the simulated engine and computes in a simulated memory."""

    ends = (EOS,)  # tokens that end an output

    def __init__(
        self,
        *,
        num_blocks: int,
        num_cpu_blocks: int = 0,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        mode: str = "recompute",
        caching: bool = True,
        scheduling_policy: str = "fcfs",
        admission_policy: str = "watermark",
        seed: int = 0,
        eos_chance: float = 0.0,
        max_model_len: int | None = None,
        memory_policy: str = "paged",
        static: bool = False,
        window: int | None = None,
        layer_groups: SequenceABC[LayerGroup] | None = None,
    ) -> None:
        """``layer_groups`` are those of paged memory; ``window`` stands for one group."""
        max_num_seqs = min(max_num_seqs, budget)  # as an engine's settings have to be
        if layer_groups is None or memory_policy != "paged":
            layer_groups = ONE_GROUP
            if window is not None and memory_policy == "paged":
                layer_groups = [LayerGroup("window", ReadWindow(window))]
        super().__init__(
            num_blocks,
            mode,
            num_cpu_blocks=num_cpu_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            budget=budget,
            max_model_len=max_model_len,
            layer_groups=layer_groups,
            eos=EOS,
            enable_prefix_caching=caching,
            scheduling_policy=scheduling_policy,
            admission_policy=admission_policy,
            memory_policy=memory_policy,
            batching="static" if static else "continuous",
        )
        self.memory = PagedMemory(self.blocks, SALTS)
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.in_order = scheduling_policy == "fcfs"
        self.random = random.Random(seed)
        self.eos_chance = eos_chance
        self.groups: list[SequenceGroup] = []
        self.arrivals = 0
        self.num_swaps = self.num_copies = self.num_computed = 0

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(EOS) for _ in range(length)]

    def group(
        self, prompt: list[int], max_tokens: int, n: int = 1, beams: bool = False, **settings
    ) -> SequenceGroup:
        max_tokens = min(max_tokens, self.max_model_len - len(prompt))
        params = SamplingParams(n=n, max_tokens=max(1, max_tokens), beam_width=n if beams else None)
        name = f"r{self.arrivals}"
        self.arrivals += 1
        return SequenceGroup(name, None, prompt, params, max_tokens, self.arrivals, **settings)

    def add(self, prompt: int | list[int], max_tokens: int, n: int = 1, **settings) -> SequenceGroup:
        if isinstance(prompt, int):
            prompt = self.prompt(prompt)
        group = self.group(prompt, max_tokens, n, **settings)
        self.scheduler.add(group, self.random.getrandbits(64))
        self.groups.append(group)
        return group

    def add_prefix(self, prompt: list[int], **settings) -> SequenceGroup:
        group = self.group(prompt[: len(prompt) // self.blocks.prefix_size * self.blocks.prefix_size], 1)
        group.cache_salt = settings.get("cache_salt")
        self.scheduler.add_prefix(group)
        return group

    def unfinished(self) -> list[SequenceGroup]:
        return [group for group in self.groups if not group.finished]

    def step(self) -> Plan:
        scheduler = self.scheduler
        waiting, running = list(scheduler.waiting), list(scheduler.running)
        plan = scheduler.schedule()
        self.check_queues(waiting)
        for item in plan.scheduled:
            if item.group.skip_reading_prefix_cache and item.group in waiting:
                assert item.start == 0, "a prompt that is to be computed was found"
            if item.group in running:
                assert not item.num_stored
        self.check_plan(plan)
        self.move(plan)
        self.compute(plan)
        self.update(plan)
        self.check_blocks()
        return plan

    def update(self, plan: Plan) -> None:
        samples, candidates = [], {}
        for position, item in enumerate(plan.scheduled):
            is_beam = item.group.params.beam_width is not None
            samples.append([] if is_beam else [self.draw() for _ in range(item.num_samples)])
            if is_beam and item.num_samples:
                candidates[position] = self.draw_candidates(item.group)
        self.scheduler.advance(plan)
        self.scheduler.resolve(plan, samples, candidates)

    def fail(self) -> None:
        """A step that ends in an error; what it was to write and to move is poison."""
        plan = self.scheduler.schedule()
        self.memory.poison_moved(plan.swap_out, plan.swap_in, plan.copies)
        self.poison(plan.scheduled)
        self.scheduler.moves_failed()
        self.check_blocks()

    def fail_in_parts(self) -> None:
        """A step whose blocks are moved and whose tokens cannot be computed together. Of the parts that are
        tried then, some fail again; a request that fails alone ends, or disappears meanwhile."""
        scheduler, parts = self.scheduler, FailedStep()
        plan = scheduler.schedule()
        self.move(plan)
        failed = plan.scheduled
        while failed:
            self.poison(failed)
            parts.add(scheduler.hold(failed))
            self.check_blocks()
            failed = ()
            while not failed and (part := parts.next()):
                if self.random.random() < 0.6:
                    self.compute(Plan(part))
                    self.update(Plan(part))
                elif len({item.group for item in part}) == 1 and self.random.random() < 0.5:
                    self.end(part[0].group)
                else:
                    failed = part
                if self.random.random() < 0.1 and self.unfinished():
                    scheduler.abort(self.random.choice(self.unfinished()))
                    failed = tuple(item for item in failed if not item.group.finished)
                self.check_blocks()

    def poison(self, scheduled: Iterable[ScheduledSequence]) -> None:
        for item in scheduled:
            start, end = item.start + item.num_stored, item.start + item.num_tokens
            self.memory.poison(item.seq.seq_id, start, end)

    def end(self, group: SequenceGroup) -> None:
        if group.is_prefix:
            self.scheduler.remove_prefix(group.request_id)
        else:
            self.scheduler.abort(group)

    def check_plan(self, plan: Plan) -> None:
        assert plan.scheduled, "nobody runs"
        scheduler = self.scheduler
        oldest = min((*scheduler.running, *scheduler.preempted, *scheduler.waiting), key=lambda g: g.rank)
        if self.in_order:
            assert oldest in [item.group for item in plan.scheduled], "the oldest request starves"
        assert scheduler.running[0] in [item.group for item in plan.scheduled], "the first one starves"
        assert sum(item.num_tokens for item in plan.scheduled) <= self.budget
        assert len({item.seq.seq_id for item in plan.scheduled}) == len(plan.scheduled)
        for item in plan.scheduled:
            assert item.group.status is Status.RUNNING
            assert item.start == item.seq.num_computed
            assert item.num_tokens >= 1
            complete = item.start + item.num_tokens == len(item.seq.token_ids)
            prefix = item.group not in self.groups
            wanted = 0 if prefix or not complete else 1 if item.group.forked else item.group.width
            assert item.num_samples == wanted
        for group in scheduler.running:  # a group decodes as one
            planned = [item.seq for item in plan.scheduled if item.group is group]
            decoding = [seq for seq in group.live if seq.num_pending == 1]
            if planned or group is oldest:
                assert not [seq for seq in decoding if seq not in planned and self.blocks.holds(seq.seq_id)]

    def move(self, plan: Plan) -> None:
        self.num_swaps += len(plan.swap_out)
        self.num_copies += len(plan.copies)
        self.memory.move(plan.swap_out, plan.swap_in)
        for copies in in_turn(plan.copies):
            assert not {source for source, _ in copies} & {target for _, target in copies}
            self.memory.move(copies=copies)

    def compute(self, plan: Plan) -> None:
        self.num_computed += sum(item.num_tokens for item in plan.scheduled)
        self.write([(item, item.seq.token_ids[: item.start + item.num_tokens]) for item in plan.scheduled])

    def write(self, computed: Iterable[tuple[ScheduledSequence, list[int]]]) -> None:
        """Compute the last tokens of sequences. Writes first, as in every layer: what a step shares
        wrongly is read wrongly. States are read before."""
        for item, tokens in computed:
            if item.num_stored < item.num_tokens:
                self.memory.check_states(item.seq.seq_id, item.start, tokens)
        for item, tokens in computed:
            self.memory.write(item.seq.seq_id, item.start + item.num_stored, tokens)
        for item, tokens in computed:
            self.memory.check(item.seq.seq_id, tokens, item.start)

    def draw(self) -> int:
        return EOS if self.random.random() < self.eos_chance else self.random.randrange(EOS)

    def draw_candidates(self, group: SequenceGroup) -> Candidates:
        count = num_candidates(group)
        tokens = self.random.sample(range(EOS), count)
        if self.random.random() < self.eos_chance:
            tokens[self.random.randrange(count)] = EOS
        return Candidates(tokens, sorted((-self.random.expovariate(1) for _ in tokens), reverse=True))

    def check_queues(self, waiting_before: list[SequenceGroup]) -> None:
        scheduler = self.scheduler
        for queue in (scheduler.running, scheduler.preempted, scheduler.waiting):
            ranks = [group.rank for group in queue]
            assert ranks == sorted(ranks)
        admitted = [group for group in waiting_before if group not in scheduler.waiting]
        for group in admitted:
            passed = [g for g in (*scheduler.preempted, *scheduler.waiting) if g.rank < group.rank]
            assert not passed, "something was admitted before what ranks above it"
        if self.in_order:  # the latest lost its blocks first
            order = [*scheduler.running, *scheduler.preempted, *scheduler.waiting]
            assert order == sorted(order, key=lambda g: g.arrival)
        assert sum(group.num_seats for group in scheduler.running) <= self.max_num_seqs
        for group in scheduler.running:
            assert group.num_seats == (len(group.live) if group.forked else group.width)
        for group in scheduler.preempted:
            assert group.status in (Status.PREEMPTED, Status.SWAPPED)
            holders = [seq for seq in group.live if self.blocks.holds(seq.seq_id)]
            assert bool(holders) == (group.status is Status.SWAPPED), "a group loses all its blocks or none"
        for group in scheduler.waiting:
            assert not any(self.blocks.holds(seq.seq_id) for seq in group.seqs)

    def check_blocks(self) -> None:
        self.blocks.check_integrity()
        self.memory.poison_empty()
        self.memory.check_found()
        running: list[Sequence] = [seq for group in self.scheduler.running for seq in group.live]
        # A prefix of which all is found computes its last token, and has the states after it before.
        prefixes = [group.live[0] for group in self.scheduler.running if group.is_prefix]
        found_whole = prefixes if self.blocks.has_states else []
        pinned = [g.live[0] for g in self.scheduler.pinned.groups.values() if g.status is Status.PINNED]
        for seq in [*running, *pinned]:
            if self.blocks.holds(seq.seq_id) and seq not in found_whole:
                position = seq.num_computed if seq in running else 0
                self.memory.check(seq.seq_id, seq.token_ids[: seq.num_computed], position)

    def run(self, limit: int = 10000) -> None:
        while self.scheduler.has_unfinished():
            limit -= 1
            assert limit, "requests do not finish"
            self.step()
        self.check_end()

    def check_end(self) -> None:
        """Nothing is left, and every output ended as it should."""
        assert not self.unfinished()
        used = self.blocks.gpu.num_blocks - self.blocks.gpu.num_free
        assert used == self.scheduler.num_pinned_blocks() == self.scheduler.pinned.num_blocks
        assert self.blocks.cpu.num_free == self.blocks.cpu.num_blocks
        for group in self.groups:
            for seq in group.seqs:
                if group.beams is not None and seq.finish_reason != "abort":
                    self.check_hypotheses(group)
                elif seq.finish_reason == "length":
                    assert seq.num_output_tokens == group.max_tokens
                elif seq.finish_reason == "stop":
                    assert seq.token_ids[-1] in self.ends
                assert seq.token_ids[: seq.prompt_len] == group.prompt_token_ids

    @staticmethod
    def check_hypotheses(group: SequenceGroup) -> None:
        assert group.beams is not None
        found = group.beams.hypotheses
        assert len(found) == group.width
        assert all(h.token_ids[-1] == EOS or len(h.token_ids) == group.max_tokens for h in found)
