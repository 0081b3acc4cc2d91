"""Who ends after steps that fail, and in how many steps that is found out."""

from __future__ import annotations

import math
import random

from cupaged.engine import SamplingParams
from cupaged.engine.scheduling.failed_step import FailedStep
from cupaged.engine.scheduling.request import Sequence, SequenceGroup, Status
from cupaged.engine.scheduling.step_plan import ScheduledSequence
from cupaged.engine.server.failure_policy import MAX_FAILURES, Action, FailurePolicy


def scheduled(count: int) -> list[ScheduledSequence]:
    found = []
    for i in range(count):
        seq = Sequence(i, 0, [1], 1, 0)
        group = SequenceGroup(str(i), None, [1], SamplingParams(), 1, i, [seq], Status.RUNNING)
        found.append(ScheduledSequence(group, seq, 0, 1, 1))
    return found


def find(items, fails) -> tuple[list[str], int, int]:
    """Run a step as the engine and its thread do. Return who ended, and how many parts failed and ran."""
    step, policy = FailedStep(), FailurePolicy()
    part, ended, done, failed = tuple(items), [], [], 0
    while part:
        names = [item.group.request_id for item in part]
        if fails(names):
            failed += 1
            step.add(part)
            if policy.failed(names) is Action.END:
                assert len(names) == 1
                ended += names
                part[0].group.status = Status.FINISHED
        else:
            policy.succeeded()
            done += names
        part = step.next()
    assert sorted(ended + done) == sorted(item.group.request_id for item in items), (
        "one is lost, or runs twice"
    )
    return ended, failed, len(done)


def test_exactly_the_culprits_are_found_in_a_logarithm_of_steps(seed):
    draw = random.Random(seed)
    for _ in range(200):
        items = scheduled(draw.randint(1, 64))
        culprits = {str(i) for i in draw.sample(range(len(items)), draw.randint(0, min(8, len(items))))}
        ended, failed, _ = find(items, lambda names, bad=culprits: not bad.isdisjoint(names))
        assert set(ended) == culprits
        # Alone after so many halves, tried again, and once more where the engine was probed in between.
        assert failed <= len(culprits) * (math.ceil(math.log2(len(items))) + 3)


def test_nobody_ends_who_fails_with_another_only():
    for pair in ({"0", "1"}, {"3", "40"}, {"46", "47"}):
        ended, failed, _ = find(scheduled(48), lambda names, pair=pair: pair <= set(names))
        assert not ended
        assert failed <= 6
    ended, _, _ = find(scheduled(48), lambda names: len(names) > 5)  # a batch that is too large
    assert not ended


def test_failures_that_pass_end_nobody(seed):
    """Whatever fails now runs when it is tried again."""
    draw, failed = random.Random(seed), set()

    def fails(names) -> bool:
        if failed.isdisjoint(names) and draw.random() < 0.5:
            failed.update(names)
            return True
        return False

    assert not find(scheduled(48), fails)[0]


def test_the_engine_is_probed_when_nothing_runs_any_more():
    policy = FailurePolicy()
    actions = [policy.failed([name]) for name in "aabbcc"]
    assert actions == [Action.TRY_AGAIN, Action.END] * 2 + [Action.TRY_AGAIN, Action.PROBE]
    assert len(actions) == MAX_FAILURES
    assert policy.failed(["c"]) is Action.END, "the probe ran: it was the request"
    assert policy.failing
    policy.succeeded()
    assert not policy.failing
    assert policy.failed(["c"]) is Action.TRY_AGAIN


def test_who_is_aborted_meanwhile_is_not_run():
    items, step = scheduled(4), FailedStep()
    step.add(items)
    items[0].group.status = items[1].group.status = items[3].group.status = Status.FINISHED
    assert step.next() == (items[2],)
    assert step.next() == ()
