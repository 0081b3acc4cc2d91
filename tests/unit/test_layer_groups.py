"""One pool for all layer groups holds at least as many tokens as memory that is divided otherwise."""

from __future__ import annotations

import pytest

from benchmarks.layer_groups import LOADS, fixed_split, layer_groups, one_table


@pytest.mark.parametrize("name", LOADS)
def test_one_pool_holds_the_most_tokens(name):
    """Allow 5 % for what admission sets aside."""
    load = LOADS[name]
    pooled = layer_groups(load, 300)
    assert pooled > 0.95 * fixed_split(load, 300)
    assert pooled > 1.2 * one_table(load, 300)
