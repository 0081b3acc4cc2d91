"""A cache whose offsets do not fit in 32 bits: block ids times the block stride exceed 2^31 elements."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch

import cupaged
from benchmarks.cases import Problem, check, close, draw

from . import mla_cases
from .test_attention import run

BLOCK_STRIDE = 1 << 30  # elements
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python names it from 3.12 on


def spread(compact: torch.Tensor, device: str) -> torch.Tensor:
    """The same blocks, 2^30 elements apart, in memory of which only those pages exist (on a GPU all do)."""
    num_blocks, *block = compact.shape
    elements = (num_blocks - 1) * BLOCK_STRIDE + compact[0].numel()
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < elements * compact.element_size() + (1 << 30):
            pytest.skip("too little GPU memory for a cache of 2^32 elements")
        flat = torch.empty(elements, dtype=compact.dtype, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        pages = mmap.mmap(-1, elements * compact.element_size(), flags=flags)
        flat = torch.frombuffer(pages, dtype=compact.dtype)
    large = flat.as_strided((num_blocks, *block), (BLOCK_STRIDE, *compact[0].stride()))
    large.copy_(compact)
    return large


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_attention(backend, seed, mode):
    problem = draw(
        seed,
        dtype=torch.bfloat16,
        head_size=64,
        block_size=16,
        num_kv_heads=2,
        group=2,
        seq_lens=[40, 13],
        query_lens=None if mode == "decode" else [9, 13],
    )
    # The blocks in use are the last ones, beyond 2^31 and 2^32 elements.
    used = problem.kv_cache[problem.block_tables[problem.block_tables < 1000].long()]
    compact = torch.full((7, *used.shape[1:]), float("nan"), dtype=used.dtype)
    compact[3:] = used
    tables = problem.block_tables.clone()
    tables[tables < 1000] = torch.arange(3, 7, dtype=torch.int32)
    problem = replace(problem, kv_cache=compact, block_tables=tables)
    device = backend[1]
    large = Problem(
        problem.query.to(device),
        spread(compact, device),
        *(None if t is None else t.to(device) for t in (tables, problem.seq_lens, problem.query_start_loc)),
    )
    out, lse = run(large, device)
    check(out, problem, lse)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_latents(backend, seed, mode):
    """Write them one by one into the last blocks, and attend over them."""
    device = backend[1]
    problem = mla_cases.draw(
        seed,
        dtype=torch.bfloat16,
        num_heads=4,
        sizes=(24, 16),
        block_size=16,
        seq_lens=[40, 13],
        query_lens=None if mode == "decode" else [9, 13],
    )
    exact, _ = problem.expected(torch.float64)
    plain, _ = problem.expected(torch.bfloat16)
    used = problem.kv_cache[problem.block_tables[problem.block_tables < 1000].long()]
    large = spread(torch.full((7, *used.shape[1:]), float("nan"), dtype=used.dtype), device)
    slots = torch.arange(3 * 16, 7 * 16, device=device)
    rows = used.flatten(0, 1).to(device)
    cupaged.concat_and_cache_mla(rows[:, :16], rows[:, 16:], large, slots)
    problem.kv_cache = large
    problem.block_tables[problem.block_tables < 1000] = torch.arange(3, 7, dtype=torch.int32)
    out, _ = mla_cases.run(problem, device)
    close(out, plain, exact)


def test_cache_writes_and_copies(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    device = backend[1]
    compact = torch.randn(5, 2, 2, 8, 32, generator=generator).bfloat16()
    large = spread(compact, device)
    key, value = torch.randn(2, 4, 2, 32, generator=generator).bfloat16()
    slots = torch.tensor([4 * 8 + 7, 3 * 8, -1, 1])
    cupaged.reshape_and_cache(key.to(device), value.to(device), large, slots.to(device))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            compact[slot // 8, 0, :, slot % 8] = key[token]
            compact[slot // 8, 1, :, slot % 8] = value[token]
    assert same(large, compact)

    cupaged.copy_blocks(large, torch.tensor([[4, 0], [3, 2]], device=device))
    compact[0], compact[2] = compact[4], compact[3]
    assert same(large, compact)

    pool = torch.zeros(2, *compact.shape[1:], dtype=compact.dtype)
    cupaged.swap_blocks(large, pool, torch.tensor([[3, 0], [4, 1]]))
    if device == "cuda":
        torch.cuda.synchronize()
    assert same(pool, compact[3:])
