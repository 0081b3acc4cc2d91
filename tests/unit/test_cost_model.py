"""The cost model: what is fitted is what was measured, and a replay's clock is its prediction."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.cost_model import FITTED, Costs, Work, fit, pairs, read
from benchmarks.simulation import Request, SimulatedEngine, Spans
from benchmarks.step_times import IN_A_ROW, Step, measure


def steps(rng: random.Random, costs: Costs, count: int = 40, noise: float = 0.0) -> list[dict[str, float]]:
    rows = []
    for _ in range(count):
        row = {
            "prefill_tokens": rng.choice([0, rng.randrange(2, 2000)]),
            "prefill_context": rng.choice([0, rng.randrange(2000)]),
            "decode_seqs": rng.randrange(1, 64),
            "context": rng.randrange(1, 4000),
        }
        work = Work(
            int(row["prefill_tokens"]),
            pairs(row["prefill_tokens"], row["prefill_context"]),
            row["decode_seqs"],
            row["decode_seqs"] * row["context"],
        )
        rows.append({**row, "ms": 1e3 * costs.seconds(work) * (1 + rng.uniform(-noise, noise))})
    return rows


def test_a_fit_finds_the_coefficients_that_made_the_times(seed):
    rng = random.Random(seed)
    costs = Costs(*(10 ** rng.uniform(-k - 1, -k) for k in (2, 4, 7, 4, 7)), moved_block=0.0)
    found = fit(steps(rng, costs))
    assert found.largest_error < 1e-6
    for name in FITTED:
        assert getattr(found.costs, name) == pytest.approx(getattr(costs, name), rel=1e-3), name


def test_a_fit_finds_how_many_tokens_are_free(seed):
    """Draw as many as a measured step has; those of decoding sequences come first."""
    rng = random.Random(seed)
    rows = steps(rng, Costs())
    free = int(
        rng.choice([row["prefill_tokens"] + row["decode_seqs"] for row in rows if not row["prefill_tokens"]])
    )
    coefficients = (10 ** rng.uniform(-k - 1, -k) for k in (2, 4, 7, 4, 7))
    costs = Costs(*coefficients, moved_block=0.0, free_tokens=free)
    assert costs.seconds(Work(decoded_tokens=free)) == costs.step
    assert costs.seconds(Work(free + 3)) == pytest.approx(costs.step + 3 * costs.prompt_token)
    both = Work(prompt_tokens=free, decoded_tokens=free + 2)
    paid = free * costs.prompt_token + 2 * costs.decoded_token
    assert costs.seconds(both) == pytest.approx(costs.step + paid)
    for row in rows:
        work = Work(
            row["prefill_tokens"],
            pairs(row["prefill_tokens"], row["prefill_context"]),
            row["decode_seqs"],
            row["decode_seqs"] * row["context"],
        )
        row["ms"] = 1e3 * costs.seconds(work)
    found = fit(rows)
    assert found.largest_error < 1e-6
    assert found.costs.free_tokens == free


def test_steps_that_decode_are_timed_in_a_row():
    """Time them in a row: after another kind of step they take longer, as the runner of this test has it."""

    class Runner:
        before: Step | None = None

        def seconds(self, step: Step) -> list[float]:
            times = []
            for _ in range(1 if step.prefill_tokens else IN_A_ROW):
                times.append(
                    (step.decode_seqs + step.prefill_tokens) * (1 if step == self.before else 2) / 1e3
                )
                self.before = step
            return times

    rows = measure(Runner(), [Step(16), Step(decode_seqs=2, context=8), Step(decode_seqs=4, context=8)], 3)
    assert [row["ms"] for row in rows] == [32, 2, 4]
    assert [row["first_ms"] for row in rows] == [32, 4, 8]


def test_a_fit_of_noisy_times_is_never_negative(seed):
    rng = random.Random(seed)
    costs = Costs(step=1e-3, prompt_token=1e-5, decoded_token=0.0, context_token=0.0)
    found = fit(steps(rng, costs, noise=0.3))
    assert min(getattr(found.costs, name) for name in FITTED) >= 0
    assert found.median_error < 0.3


def test_a_file_of_step_times_is_read_and_another_is_refused_by_name(tmp_path):
    rows = steps(random.Random(0), Costs())
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"results": {"steps": rows, "moved_block_ms": 2.0}}))
    assert read(path).costs.moved_block == 2e-3
    alone = read(path)
    path.write_text(json.dumps({"results": {"step_times": {"steps": rows, "moved_block_ms": 2.0}}}))
    assert read(path) == alone, "as benchmarks/allocators.py writes them"
    for text in ("{}", "[]", "x", '{"results": {"moved_block_ms": 1}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"steps.json has no step times"):
            read(path)
    with pytest.raises(ValueError, match="a fit needs 5 steps"):
        fit(rows[:4])


def test_the_clock_of_a_request_alone(seed):
    """Its prompt in chunks of the budget, then a step for each token after the first."""
    rng = random.Random(seed)
    prompt, output, budget = rng.randrange(2, 300), rng.randrange(1, 50), rng.choice([64, 100, 512])
    costs = Costs(*(rng.random() for _ in range(5)))
    engine = SimulatedEngine(64, budget=budget, costs=costs)
    (served,) = engine.replay([Request(3.0, Spans((7, prompt)), output)]).served
    seconds, start = 0.0, 0
    while start < prompt:
        count = min(budget, prompt - start)
        chunk = range(start, start + count)
        if count > 1:
            work = Work(prompt_tokens=count, prompt_pairs=sum(position + 1 for position in chunk))
        else:
            work = Work(decoded_tokens=1, decode_context=start + 1)
        seconds += costs.seconds(work)
        start += count
    assert served.time_to_first_token == pytest.approx(seconds)
    for length in range(prompt + 1, prompt + output):
        seconds += costs.seconds(Work(decoded_tokens=1, decode_context=length))
    assert served.latency == pytest.approx(seconds)
    assert served.normalized_latency == pytest.approx(seconds / output)


@pytest.mark.parametrize("caching", [True, False])
def test_a_turn_of_a_session_arrives_after_the_answer_to_the_one_before(caching, seed):
    """And finds what the turn before it computed, its output included but for the last token."""
    rng = random.Random(seed)
    turns: list[Request] = []
    tokens: tuple[tuple[int, int], ...] = ()
    for turn in range(rng.randrange(2, 5)):
        tokens = (*tokens, (turn, rng.randrange(1, 60)))
        think, output = rng.uniform(0, 5), rng.randrange(1, 60)
        turns.append(
            Request(
                think, Spans(*tokens), output, follows=turns[-1] if turns else None, output_token=1000 + turn
            )
        )
        tokens = (*tokens, (1000 + turn, output))
    engine = SimulatedEngine(100, enable_prefix_caching=caching)
    record = engine.replay(rng.sample(turns, len(turns)))
    assert [served.request for served in record.served] == turns
    for before, after in zip(record.served, record.served[1:]):
        assert after.arrived == pytest.approx(before.ended + after.request.time)
    # All of a turn but its last output token was computed, and is found in full blocks.
    known = [len(turn.prompt) + turn.num_tokens - 1 for turn in turns[:-1]]
    hits = [
        min(count // 16 * 16, len(after.prompt) - 1) for count, after in zip(known, turns[1:], strict=True)
    ]
    assert engine.scheduler.num_prefix_hits == caching * sum(hits)
