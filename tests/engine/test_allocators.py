"""The comparison on the real engine: rates at a latency are found, and summed up seed by seed."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import asdict

import pytest

from benchmarks import allocators
from benchmarks.allocators import Load, Outcome, Point, rate_at, rates_to_run
from benchmarks.cost_model import Costs
from benchmarks.evaluation.systems import SYSTEMS
from benchmarks.evaluation.tables import allocators_table

from .harness import small_engine

COSTS = Costs(step=0.013, prompt_token=9e-4, decoded_token=7e-4)


def test_the_rate_of_a_latency_is_found_among_measured_points(seed):
    """Read a rate exactly where the latency is a power of it, and otherwise between the two next to it."""
    rng = random.Random(seed)
    rate, latency, exponent = rng.uniform(0.1, 50), rng.uniform(0.01, 1), rng.uniform(0.5, 20)

    def power(other: float) -> float:
        return latency * (other / rate) ** exponent

    points = [(found, power(found)) for found in (rate * rng.uniform(0.5, 2) for _ in range(3))]
    assert rate_at(points, latency) == pytest.approx(rate)
    points = [(rate * 0.9, latency * 0.7), (rate * 1.3, latency * 1.01), (rate * 0.7, latency * 0.5)]
    rng.shuffle(points)
    assert rate * 0.9 < rate_at(points, latency) < rate * 1.3
    assert rate_at([(2.0, 0.1), (4.5, 0.1)], 0.2) == pytest.approx(3.0), (
        "points that say nothing of the slope"
    )


@pytest.mark.parametrize("factor", [0.5, 0.75, 0.99, 1.01, 1.3, 2.0])
def test_rates_are_run_until_the_latency_is_between_two(factor):
    """Stand for a machine that sustains `factor` times what was predicted."""
    points: list[Point] = []
    for rate in rates_to_run(10.0, 0.1, points):
        points.append((rate, 0.1 * (rate / (10 * factor)) ** 3))
    assert points[0][0] == 10
    assert 2 <= len(points) <= allocators.MOST_RUNS
    sides = {latency >= 0.1 for _, latency in points}
    if 1 / allocators.FACTOR**2 < factor < allocators.FACTOR**2:
        assert len(sides) == 2
    assert all((rate < 10) == (factor < 1) for rate, _ in points[1:])


def test_predicted_rates_have_the_latency_and_the_papers_order(seed):
    load, rates = Load(), []
    for system in SYSTEMS:
        rates.append(allocators.sustained(load, system, COSTS, seed))
        row = {
            "system": system,
            "seed": seed,
            "runs": [{"rate": rates[-1] * factor} for factor in (0.7, 1.4)],
        }
        found = allocators.predict(load, row, COSTS)
        assert found["predicted_rate"] == rates[-1]
        low, high = (run["predicted"]["latency_s"] for run in found["runs"])
        assert low < load.latency < high
    assert rates == sorted(rates, reverse=True)
    with pytest.raises(ValueError, match=r"a latency of 0\.001 s a token is below that of a request alone"):
        allocators.predicted_rate(Load(latency=0.001), lambda rate: 0.02 + rate)


def test_the_summary_compares_within_a_seed():
    rates = {("paged", 0): 8.0, ("paged", 1): 2.0, ("Orca (Max)", 0): 4.0, ("Orca (Max)", 1): 0.5}
    run = {name: {"latency_s": 0.1, "tokens_per_s": 50.0} for name in ("measured", "predicted")}
    rows = [
        {
            "system": system,
            "seed": seed,
            "measured_rate": rate,
            "predicted_rate": 1.1 * rate,
            "runs": [run],
        }
        for (system, seed), rate in rates.items()
    ]
    paged, other = allocators.summary(rows)
    assert paged["measured"]["paged_over_it"] == 1
    assert other["measured"]["paged_over_it"] == pytest.approx(math.sqrt(2 * 4))
    assert (other["measured"]["lowest_ratio"], other["measured"]["highest_ratio"]) == (2, 4)
    assert other["measured"]["rate"] == statistics.fmean([4, 0.5])
    assert other["error"] == pytest.approx(0.1)
    assert other["throughput_errors"] == [0, 0]
    results = {
        "model": "m",
        "dtype": "bfloat16",
        "block_size": 16,
        "load": asdict(Load()),
        "seeds": 2,
        "step_times": {"steps": [1] * 9},
        "fit": {"median_error": 0.05},
        "drift": 0.98,
        "systems": [paged, other],
    }
    run = {"environment": {"device": "D", "threads": 2}, "results": results}
    lines = list(allocators_table(run, "[link](link)"))
    assert "changed by -2.0%" in lines[0]
    assert lines[-1] == (
        "| Orca (Max) | 2.25 (0.50 to 4.00) | 2.48 | +10.0% | 2.83x (2.00 to 4.00) | 2.83x |"
    )


def test_requests_are_served_at_their_times(llama_dir, seed):
    """On the real engine: every token is made, and no latency begins before the request has come."""
    rng = random.Random(seed)
    load = Load(max_model_len=64, prompt=5, output=3, requests=rng.randrange(2, 6))
    engine = small_engine(llama_dir, max_model_len=64, enable_prefix_caching=False)
    requests = load.draw(20.0, seed)
    prompts = [[rng.randrange(200) for _ in request.prompt] for request in requests]
    outcome = allocators.measured(engine, requests, prompts)
    assert isinstance(outcome, Outcome)
    tokens = sum(request.num_tokens for request in requests)
    assert engine.stats().generation_tokens == tokens
    seconds = tokens / outcome.tokens_per_s
    assert seconds >= requests[-1].time
    assert 0 < outcome.running <= len(requests)
    assert outcome.latency_s > 0
