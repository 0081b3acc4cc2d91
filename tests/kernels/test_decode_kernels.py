"""The two decode kernels: which one is chosen, a few query tokens a sequence, how the work is divided."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from benchmarks.cases import check, draw
from cupaged.backends.cuda import kernel_choice

from .test_attention import FEATURES, run


@pytest.mark.parametrize(
    ("dtype", "cache", "group", "arch", "name"),
    [
        ("bf16", "bf16", 4, "90a", "paged_decode_mma[dtype=bf16, head_size=128, stages=3]"),
        ("fp16", "fp16", 8, "86", "paged_decode_mma[dtype=fp16, head_size=128, stages=2]"),
        ("bf16", "bf16", 1, "80", "paged_decode_mma[dtype=bf16, head_size=128, stages=3]"),
        (
            "bf16",
            "int8",
            4,
            "86",
            "paged_decode_mma[dtype=bf16, cache_dtype=int8, head_size=128, stages=3]",
        ),
        ("bf16", "bf16", 1, "90a", "paged_decode_mma[dtype=bf16, head_size=128, stages=3]"),
        ("bf16", "bf16", 4, "75", "paged_decode[dtype=bf16, head_size=128, head_tile=4]"),
        ("fp32", "fp32", 12, "90a", "paged_decode[dtype=fp32, head_size=128, head_tile=8]"),
        (
            "bf16",
            "int8",
            9,
            "75",
            "paged_decode[dtype=bf16, cache_dtype=int8, head_size=128, head_tile=4]",
        ),
    ],
)
def test_the_choice(dtype, cache, group, arch, name):
    assert str(kernel_choice.decode_kernel(dtype, cache, 128, group, arch).spec) == name


def draw_few(seed: int, **options):
    """A batch with 0 to 8 query tokens a sequence, some of them its whole length."""
    rng = random.Random(seed)
    seq_lens = [0, 1, 7, rng.randrange(17, 23), *(rng.randrange(1, 1300) for _ in range(2))]
    query_lens = [min(n, rng.randrange(9)) for n in seq_lens]
    query_lens[2:4] = 7, 8  # of the 8, a tile of 16 keys ends between what the first and the last one see
    return draw(
        seed,
        block_size=rng.choice([1, 2, 8, 16, 64]),
        seq_lens=seq_lens,
        query_lens=query_lens,
        padding_rows=rng.choice([0, 5]),
        block_stride_factor=rng.choice([1, 3]),
        **options,
    )


@pytest.mark.parametrize("features", [*FEATURES, ("full",)], ids="+".join)
def test_a_few_query_tokens(backend, seed, features):
    rng = random.Random(seed)
    problem = draw_few(
        seed,
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        head_size=rng.choice([32, 80, 128]),
        num_kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 3, 4, 8, 16, 17]),
        features=features,
    )
    problem.options["max_query_len"] = 8
    out, lse = run(problem, backend[1])
    del problem.options["max_query_len"]
    check(out, problem, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_that_moves_under_the_rows(backend, seed, dtype):
    """Each row of a tile sees other keys, and one key too many would be a large part of all."""
    rng = random.Random(seed)
    problem = draw(
        seed,
        dtype=dtype,
        head_size=32,
        block_size=8,
        num_kv_heads=1,
        group=2,
        seq_lens=[rng.randrange(200, 300) for _ in range(4)],
        query_lens=[8, 8, 7, 5],
    )
    problem.query.mul_(0.1)  # the weights are nearly equal
    problem.options |= {"max_query_len": 8, "sliding_window": rng.randrange(24, 34)}
    out, lse = run(problem, backend[1])
    del problem.options["max_query_len"]
    check(out, problem, lse)


@pytest.mark.parametrize("group", [1, 5, 19])
@pytest.mark.parametrize("features", [(), ("window", "cap", "alibi", "sinks")], ids=["plain", "all"])
def test_on_every_generation(emulated_arch, seed, group, features):
    rng = random.Random(seed)
    problem = draw_few(
        seed,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        head_size=rng.choice([64, 120, 256]),
        num_kv_heads=1,
        group=group,
        features=features,
    )
    problem.options["max_query_len"] = 8
    out, lse = run(problem, "cpu")
    del problem.options["max_query_len"]
    check(out, problem, lse)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_quantised_caches_on_every_generation(emulated_arch, seed, cache_dtype, head_size):
    rng = random.Random(seed)
    problem = draw_few(
        seed,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        cache_dtype=cache_dtype,
        head_size=head_size,
        num_kv_heads=2,
        group=rng.choice([2, 6, 16]),
        features=rng.choice(FEATURES),
    )
    problem.options["max_query_len"] = 8
    out, lse = run(problem, "cpu")
    del problem.options["max_query_len"]
    check(out, problem, lse)


@pytest.mark.parametrize("queries", ["one", "few"])
@pytest.mark.parametrize("features", [(), ("window", "sinks")], ids=["plain", "window+sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_that_balance_the_load(backend, seed, queries, features, dtype):
    """Without batch invariance the KV splits depend on the whole batch; the result must not."""
    rng = random.Random(seed)
    seq_lens = [rng.randrange(2000, 3000), 0, rng.randrange(1, 200), 128, 129]
    problem = draw(
        seed,
        dtype=dtype,
        head_size=64,
        block_size=16,
        num_kv_heads=1,
        group=4,
        seq_lens=seq_lens,
        query_lens=None if queries == "one" else [3, 0, 1, 8, 2],
        features=features,
    )
    problem.options |= {"max_query_len": 8, "batch_invariant": False}
    out, lse = run(problem, backend[1])
    del problem.options["max_query_len"], problem.options["batch_invariant"]
    check(out, problem, lse)


def test_more_sequences_than_threads(backend, seed):
    """The blocks count the work of some sequences at a time."""
    rng = random.Random(seed)
    problem = draw(
        seed,
        dtype=torch.bfloat16,
        head_size=32,
        block_size=8,
        num_kv_heads=1,
        group=2,
        seq_lens=[rng.choice([0, 1, 2, 9, 600]) if s % 50 == 0 else rng.randrange(4) for s in range(300)],
    )
    check(*_with_lse(problem, run(problem, backend[1])))


def test_a_wrong_hint_changes_the_speed_only(backend, seed):
    problem = draw(
        seed,
        dtype=torch.bfloat16,
        head_size=64,
        block_size=16,
        num_kv_heads=1,
        group=2,
        seq_lens=[90, 33],
        query_lens=[70, 33],
    )
    problem.options["max_query_len"] = 2
    out, lse = run(problem, backend[1])
    del problem.options["max_query_len"]
    check(out, problem, lse)


def test_bits_do_not_depend_on_the_batch(backend, seed):
    """Nor on how many blocks go round the KV splits: also for a few query tokens on tensor cores."""
    rng = random.Random(seed)
    seq_lens = [rng.randrange(1100, 1400), rng.randrange(8, 60), rng.randrange(520, 600)]
    query_lens = [4, 8, 1]
    batch = draw(
        seed,
        dtype=torch.bfloat16,
        head_size=64,
        block_size=16,
        num_kv_heads=2,
        group=4,
        seq_lens=seq_lens,
        query_lens=query_lens,
    ).to(backend[1])
    together = cupaged.paged_attention(
        batch.query,
        batch.kv_cache,
        batch.block_tables,
        batch.seq_lens,
        batch.query_start_loc,
        max_query_len=8,
    )
    start = 0
    for s, count in enumerate(query_lens):
        rows = slice(start, start + count)
        start += count
        alone = cupaged.paged_attention(
            batch.query[rows],
            batch.kv_cache,
            batch.block_tables[s : s + 1],
            batch.seq_lens[s : s + 1],
            torch.tensor([0, count], dtype=torch.int32, device=backend[1]),
            max_query_len=8,
        )
        assert torch.equal(alone, together[rows])


def _with_lse(problem, result):
    return result[0], problem, result[1]
