"""The paper's comparison of request rates: the search finds the rate, and the systems are in order."""

from __future__ import annotations

import random

import pytest

from benchmarks.evaluation import rates
from benchmarks.evaluation.rates import CASES, LATENCY, STEPS, latency, sustained
from benchmarks.evaluation.systems import SYSTEMS


def test_the_search_finds_where_the_latency_rises(monkeypatch, seed):
    rng = random.Random(seed)
    limit, throughput = 10 ** rng.uniform(-1, 2), 0.0

    def rising(case, system, count, rate):
        return LATENCY * (1.001 if rate is None else rate / limit), throughput

    monkeypatch.setattr(rates, "latency", rising)
    system, factor = rng.choice([("paged", 4), ("FasterTransformer", 30)])
    throughput = limit * rng.uniform(0.6, 0.9 * factor)
    found, points = sustained(CASES["Alpaca"], system, 10)
    # The bracket's ends differ by this factor and 2; after the steps its middle is found.
    assert found == pytest.approx(limit, rel=(2 * factor) ** (0.5 / 2**STEPS) - 1 + 1e-9)
    assert len(points) == STEPS
    assert points == sorted(points)


def test_too_few_requests_are_refused():
    with pytest.raises(RuntimeError, match="2 requests are too few for paged to have a queue"):
        sustained(CASES["Alpaca"], "paged", 2)


def test_the_systems_are_in_the_papers_order():
    """With all requests waiting from the beginning: more memory in use, more requests a second."""
    ended = [latency(CASES["ShareGPT"], system, 60, None)[1] for system in SYSTEMS]
    assert ended == sorted(ended, reverse=True)
    assert ended[0] > 2 * ended[3]


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_drawn_for_every_system_it_compares(name):
    case = CASES[name]
    assert set(case.published) <= set(case.others) < set(SYSTEMS)
    for system in ("paged", *case.others):
        mean, per_second = latency(case, system, 4, 0.01)
        assert 0.028 < mean < 0.2, "a request alone takes a step a token, and its prompt"
        assert per_second > 0
