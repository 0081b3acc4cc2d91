"""Check that decode divides a sequence into KV splits that depend on nothing but the sequence."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from benchmarks.cases import check, draw
from cupaged.backends.cuda import plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_sequence_gets_the_same_bits_in_any_batch(backend, seed, mode, dtype):
    """Alone, among others, and with a block table as wide as a long context needs."""
    _, device = backend
    rng = random.Random(seed)
    seq_lens = [rng.randrange(1, 60), rng.randrange(600, 900), rng.randrange(200, 300)]
    query_lens = None if mode == "decode" else [1, 3, rng.randrange(65, 200)]
    batch = draw(
        seed,
        dtype=dtype,
        head_size=64,
        block_size=16,
        num_kv_heads=1,
        group=2,
        seq_lens=seq_lens,
        query_lens=query_lens,
        features=rng.choice([(), ("window",)]),
    ).to(device)
    together = cupaged.paged_attention(
        batch.query,
        batch.kv_cache,
        batch.block_tables,
        batch.seq_lens,
        batch.query_start_loc,
        **batch.options,
    )
    starts = [0, *torch.tensor(query_lens or [1, 1, 1]).cumsum(0).tolist()]
    for s in range(3):
        rows = slice(starts[s], starts[s + 1])
        count = starts[s + 1] - starts[s]
        wide = torch.full((1, 5000), 2147480000, dtype=torch.int32, device=device)
        wide[:, : batch.block_tables.shape[1]] = batch.block_tables[s : s + 1]
        alone = cupaged.paged_attention(
            batch.query[rows],
            batch.kv_cache,
            wide,
            batch.seq_lens[s : s + 1],
            None if mode == "decode" else torch.tensor([0, count], dtype=torch.int32, device=device),
            **batch.options,
        )
        assert torch.equal(alone, together[rows])


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 5001])
def test_a_split_may_have_more_blocks_than_shared_memory_has_ids_for(
    backend, seed, monkeypatch, dtype, window
):
    """Sequences beyond 64 KV splits have longer ones; with one KV split a short sequence does as well.
    Under a window the first block is a part of one."""
    monkeypatch.setattr(plans, "MAX_SPLITS", 1)
    problem = draw(
        seed,
        dtype=dtype,
        head_size=32,
        block_size=8,
        num_kv_heads=1,
        group=2,
        seq_lens=[8150, 8150, 6100, 4089, 4088, 2041, 17],
    )
    problem.options["sliding_window"] = window
    p = problem.to(backend[1])
    out, lse = cupaged.paged_attention(
        p.query, p.kv_cache, p.block_tables, p.seq_lens, **p.options, return_lse=True
    )
    check(out, problem, lse)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("windowed", [False, True])
def test_splits_grow_beyond_the_most_there_may_be(backend, seed, monkeypatch, windowed):
    monkeypatch.setattr(plans, "MAX_SPLITS", 3)
    monkeypatch.setattr(plans, "DECODE_BLOCKS_PER_SM", 1)  # fewer blocks than KV splits: they go round
    problem = draw(
        seed,
        dtype=torch.float32,
        head_size=32,
        block_size=16,
        num_kv_heads=2,
        group=1,
        seq_lens=[3000, 1537, 1536, 300],
        features=("sinks",),
    )
    if windowed:
        problem.options["sliding_window"] = 2000
    p = problem.to(backend[1])
    out, lse = cupaged.paged_attention(
        p.query, p.kv_cache, p.block_tables, p.seq_lens, **p.options, return_lse=True
    )
    check(out, problem, lse)
