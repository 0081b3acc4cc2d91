"""The two prefill kernels: which one is chosen, tiles that end anywhere, keys that nobody sees."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from benchmarks.cases import Problem, check, draw
from cupaged.backends.cuda import kernel_choice

from .test_attention import FEATURES, run


@pytest.mark.parametrize(
    ("dtype", "cache", "head_size", "arch", "name"),
    [
        (
            "bf16",
            "bf16",
            128,
            "90a",
            "paged_prefill_wgmma[dtype=bf16, head_size=128, tile_keys=128, stages=3]",
        ),
        (
            "bf16",
            "fp8_e4m3",
            128,
            "90a",
            "paged_prefill_mma[dtype=bf16, cache_dtype=fp8_e4m3, head_size=128, tile_keys=32, stages=3]",
        ),
        ("fp16", "fp16", 256, "86", "paged_prefill_mma[dtype=fp16, head_size=256, tile_keys=16, stages=3]"),
        (
            "bf16",
            "int8",
            64,
            "80",
            "paged_prefill_mma[dtype=bf16, cache_dtype=int8, head_size=64, tile_keys=32, stages=3]",
        ),
        ("bf16", "bf16", 128, "75", "paged_prefill[dtype=bf16, head_size=128]"),
        ("fp32", "fp32", 128, "90a", "paged_prefill[dtype=fp32, head_size=128]"),
    ],
)
def test_the_choice(dtype, cache, head_size, arch, name):
    assert str(kernel_choice.prefill_kernel(dtype, cache, head_size, 4, arch).spec) == name


def draw_chunks(seed: int, *, group: int, **options) -> Problem:
    """Chunks of any length over prefixes of any length, with a decode and padding between.

    Large groups have shorter ones: the time is that of the query rows.
    """
    rng = random.Random(seed)
    longest = 150 if group <= 8 else 40
    query_lens = [rng.randrange(longest - 30, longest), 0, 1, 16]
    query_lens += [rng.randrange(1, min(longest, 60)), rng.randrange(9, 40)]
    prefixes = [rng.randrange(200), 0, rng.randrange(300), rng.randrange(100, 300), 0, rng.randrange(9)]
    return draw(
        seed,
        block_size=rng.choice([1, 4, 8, 16, 64]),
        seq_lens=[q + p for q, p in zip(query_lens, prefixes)],
        query_lens=query_lens,
        padding_rows=rng.choice([0, 5, 130]),
        block_stride_factor=rng.choice([1, 3]),
        group=group,
        **options,
    )


@pytest.mark.parametrize("group", [1, 3, 8, 71, 130])
@pytest.mark.parametrize("features", [(), ("window", "cap", "alibi", "sinks")], ids=["plain", "all"])
def test_on_every_generation(emulated_arch, seed, group, features):
    rng = random.Random(seed)
    problem = draw_chunks(
        seed,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        head_size=rng.choice([32, 64]) if group > 8 else rng.choice([64, 120, 256]),
        num_kv_heads=1,
        group=group,
        features=features,
    )
    out, lse = run(problem, "cpu")
    check(out, problem, lse)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_quantised_caches_on_every_generation(emulated_arch, seed, cache_dtype, head_size):
    rng = random.Random(seed)
    problem = draw_chunks(
        seed,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        cache_dtype=cache_dtype,
        head_size=head_size,
        num_kv_heads=2,
        group=rng.choice([1, 2, 4]),
        features=rng.choice(FEATURES),
    )
    out, lse = run(problem, "cpu")
    check(out, problem, lse)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_that_moves_under_the_rows(backend, seed, dtype):
    """Whole tiles of keys lie before the window of some rows, and one key too many would be a large part of
    all that a row sees."""
    rng = random.Random(seed)
    problem = draw(
        seed,
        dtype=dtype,
        head_size=32,
        block_size=8,
        num_kv_heads=1,
        group=1,
        seq_lens=[rng.randrange(300, 400), 129, 128],
        query_lens=[rng.randrange(200, 290), 129, 128],
    )
    problem.query.mul_(0.1)  # the weights are nearly equal
    problem.options["sliding_window"] = rng.randrange(1, 40)
    out, lse = run(problem, backend[1])
    check(out, problem, lse)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_among_prefills_has_the_bits_of_a_decode(backend, seed, dtype, group):
    """Compute sequences of one KV split and of several; the others and the padding are not touched."""
    rng = random.Random(seed)
    query_lens = [1, rng.randrange(30, 60), 1, 0, 1, 2]
    problem = draw(
        seed,
        dtype=dtype,
        head_size=64,
        block_size=16,
        num_kv_heads=2,
        group=group,
        seq_lens=[1, 700, rng.randrange(600, 1200), 0, rng.randrange(100, 512), 530],
        query_lens=query_lens,
        padding_rows=rng.choice([0, 1, 3]),
        features=rng.choice([(), ("sinks", "window")]),
    )
    problem.options["batch_invariant"] = rng.choice([True, False])
    problem.options["shared_prefix"] = rng.choice([True, False])
    out, lse = run(problem, backend[1])
    check(out, problem, lse)
    p = problem.to(backend[1])
    starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
    singles = [s for s, n in enumerate(query_lens) if n == 1]
    rows = [starts[s] for s in singles]
    p.options |= {"batch_invariant": True, "shared_prefix": False}
    alone, alone_lse = cupaged.paged_attention(
        p.query[rows], p.kv_cache, p.block_tables[singles], p.seq_lens[singles], **p.options, return_lse=True
    )
    assert torch.equal(out[rows], alone)
    assert torch.equal(lse[rows], alone_lse)
