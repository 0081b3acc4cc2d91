"""What "auto" decides, from rates that were measured."""

from __future__ import annotations

import pytest

from cupaged.engine.scheduling.preemption import Preemption, Rates

from .simulation import Simulation


def test_rates_are_medians_of_what_was_measured():
    rates = Rates(block_bytes=100)
    assert rates.link_bytes_per_s is rates.prefill_tokens_per_s is None
    assert rates.swapping_is_faster(10**6, 1), "nothing is known"
    for seconds in (1.0, 2.0, 1000.0, 2.5, 1e-9):
        rates.moved(4, seconds)
        rates.computed(30, seconds)
    assert (rates.link_bytes_per_s, rates.prefill_tokens_per_s) == (200.0, 15.0)
    rates.moved(0, 1.0)  # nothing was moved, or no time passed
    rates.computed(30, 0.0)
    assert (rates.link_bytes_per_s, rates.prefill_tokens_per_s) == (200.0, 15.0)
    # Two blocks out and in: 400 bytes, 2 seconds. 30 tokens: 2 seconds.
    assert not rates.swapping_is_faster(2, 30)
    assert rates.swapping_is_faster(2, 31)


def test_auto_counts_what_a_group_shares_once():
    """Three samples over a prompt of 8 blocks, a block each of their own: 11 blocks, 32 + 3 tokens."""
    simulation = Simulation(num_blocks=20, num_cpu_blocks=20, mode="auto", budget=64)
    group = simulation.add(32, 9, n=3)
    for _ in range(2):
        simulation.step()
    asked = []
    simulation.rates.swapping_is_faster = lambda blocks, tokens: asked.append((blocks, tokens))
    Preemption("auto", simulation.rates).swaps(group, simulation.blocks)
    assert asked == [(11, 35)]


def test_auto_without_rates_is_an_error():
    with pytest.raises(ValueError, match="'auto' compares rates"):
        Preemption("auto")
