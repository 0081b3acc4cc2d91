"""What the runner says of a batch."""

from __future__ import annotations

import numpy as np
import pytest

from cupaged.engine.model.model_runner import LONG_PREFIX, shares_prefix


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_long_prefix_that_neighbours_share_is_seen(block_size):
    blocks = LONG_PREFIX // block_size
    tables = np.arange(4 * (blocks + 2), dtype=np.int32).reshape(4, -1)
    assert not shares_prefix(tables, block_size)
    assert not shares_prefix(tables[:1], block_size)
    tables[3, :blocks] = tables[1, :blocks]  # no neighbours
    assert not shares_prefix(tables, block_size)
    tables[2, : blocks - 1] = tables[1, : blocks - 1]  # not long enough
    assert not shares_prefix(tables, block_size)
    tables[2, :blocks] = tables[1, :blocks]
    assert shares_prefix(tables, block_size)
    assert not shares_prefix(tables[:, :blocks], block_size)  # nothing of their own
