"""The steps on which graphs are checked, and what counts as equal."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from cupaged.engine.model.graph_buckets import LONG_PREFIX, Buckets
from cupaged.engine.model.graph_check import difference, draw_step, fill_with_numbers
from cupaged.engine.model.kv_cache import KVCache, KVShape
from cupaged.engine.model.model_runner import shares_prefix

CPU = torch.device("cpu")


def test_a_drawn_step_is_one_that_a_model_can_run(seed):
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    block_size, length = rng.choice([8, 16, 64]), rng.randint(20, 5000)
    cache = KVCache(KVShape(1, 1, block_size, 8, torch.float32), rng.choice([3, 50, 2000]), 0, CPU)
    buckets = Buckets(rng.choice([1, 5, 70]), length, block_size, with_prefixes=True)
    for bucket in buckets.all():
        step = draw_step(numbers, bucket, cache, 99, length)
        count, width = step.block_tables.shape
        assert count == min(bucket.num_seqs, len(cache.blocks))
        assert width == bucket.width
        assert step.seq_lens.min() >= 1
        assert step.seq_lens.max() == min(bucket.width * block_size, length)
        assert (step.positions == step.seq_lens - 1).all()
        assert step.block_tables.min() >= 0
        assert step.block_tables.max() < len(cache.blocks)
        written = step.block_tables[np.arange(count), step.positions // block_size]
        assert len(set(written.tolist())) == count  # no two write to one block
        assert (step.slots == written * block_size + step.positions % block_size).all()
        assert step.token_ids.max() < 99
        assert step.token_ids.min() >= -count
        if bucket.shared_prefix:
            assert shares_prefix(step.block_tables, block_size) or count == 1
            assert step.seq_lens.min() > LONG_PREFIX


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
)
def test_a_cache_is_filled_with_finite_numbers(dtype):
    cache = KVCache(KVShape(2, 1, 8, 16, dtype), 3, 0, CPU)
    cache.blocks.view(torch.uint8).fill_(0xFF)
    fill_with_numbers(cache)
    assert cache.blocks.float().isfinite().all()
    assert cache.blocks.float().unique().numel() > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_difference_and_a_wrong_row_is_one(dtype, seed):
    expected = torch.randn(4, 100, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert difference(expected.clone(), expected) is None
    rounded = (expected.double() * (1 + torch.finfo(dtype).eps / 2)).to(dtype)
    assert difference(rounded, expected) is None
    wrong = expected.clone()
    wrong[2] = wrong[2].roll(1)
    assert "differ from those of the step" in difference(wrong, expected)
    wrong[2] = torch.nan
    assert "differ from those of the step by inf" in difference(wrong, expected)
    assert difference(expected, wrong) == "the model's logits are not finite"
