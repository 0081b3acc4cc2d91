"""Prefill of a few tokens over long prefixes, whose keys are divided among the blocks of a GPU."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.cases import Problem, check, draw
from cupaged.backends.cuda import kernel_choice, plans
from cupaged.params import AttentionParams

from .test_attention import FEATURES, run

SM_COUNT = 4  # of the emulation


def plan_of(problem: Problem, arch: str, sm_count: int = SM_COUNT, **settings) -> plans.PrefillPlan:
    options = {name: value for name, value in problem.options.items() if name in AttentionParams._fields}
    params = AttentionParams(scale=1.0, **options | settings)
    return plans.prefill(
        problem.query, problem.kv_cache, problem.block_tables, problem.query, params, arch, sm_count
    )


def draw_long(seed: int, **options) -> Problem:
    """Two chunks over prefixes of some KV splits and one over none; a decode of some, and padding."""
    rng = random.Random(seed)
    query_lens = [rng.randrange(2, 20), 1, 0, rng.randrange(2, 20), rng.randrange(2, 9)]
    prefixes = [rng.randrange(1030, 1600), rng.randrange(1030, 1600), 0, rng.randrange(513, 1300), 0]
    return draw(
        seed,
        block_size=rng.choice([1, 8, 16, 64]),
        seq_lens=[q + p for q, p in zip(query_lens, prefixes)],
        query_lens=query_lens,
        padding_rows=rng.choice([0, 3]),
        **options,
    )


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("features", [*FEATURES, ("full", "sinks")], ids="+".join)
def test_on_every_generation(emulated_arch, seed, group, features):
    rng = random.Random(seed)
    dtypes = [torch.float16, torch.bfloat16, *[torch.float32] * (emulated_arch == "75")]
    problem = draw_long(
        seed,
        dtype=rng.choice(dtypes),
        head_size=rng.choice([32, 64, 120]),
        num_kv_heads=1,
        group=group,
        features=features,
    )
    problem.options["batch_invariant"] = False
    assert plan_of(problem, emulated_arch).merge is not None
    out, lse = run(problem, "cpu")
    check(out, problem, lse)


@pytest.mark.parametrize(
    "emulated_arch",
    ["90a", *(pytest.param(arch, marks=pytest.mark.matrix) for arch in ("86", "75"))],
    indirect=True,
)
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches(emulated_arch, seed, cache_dtype):
    rng = random.Random(seed)
    problem = draw_long(
        seed,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
        head_size=rng.choice([64, 80]),
        num_kv_heads=2,
        group=2,
        features=rng.choice(FEATURES),
    )
    problem.options["batch_invariant"] = False
    out, lse = run(problem, "cpu")
    check(out, problem, lse)


def test_it_is_for_the_asking_and_for_small_batches(seed):
    """Nothing is divided where the blocks have work without, or where bits may not depend on the batch; and
    the partials are bounded by the GPU, however long the sequences are."""
    rng = random.Random(seed)
    sm_count = 132
    for _ in range(200):
        arch = rng.choice(["75", "80", "90a"])
        num_kv_heads, group, head_size = (
            rng.choice([1, 2, 8]),
            rng.choice([1, 4, 8]),
            rng.choice([64, 128, 256]),
        )
        num_tokens = rng.choice([2, 40, 64, 100, 500, 1000, 3000])
        query = torch.zeros(num_tokens, num_kv_heads * group, head_size, dtype=torch.float16)
        problem = Problem(
            query,
            torch.zeros(1, 2, num_kv_heads, 16, head_size, dtype=torch.float16),
            torch.zeros(rng.randrange(1, 5), rng.choice([8, 64, 100, 2000]), dtype=torch.int32),
            torch.zeros(0, dtype=torch.int32),
            None,
            {},
        )
        assert plan_of(problem, arch, sm_count).partials is None
        assert plan_of(problem, arch, sm_count, batch_invariant=False, shared_prefix=True).merge is None
        plan = plan_of(problem, arch, sm_count, batch_invariant=False)
        kernel = kernel_choice.prefill_kernel("fp16", "fp16", head_size, group, arch)
        blocks = kernel.blocks_per_sm * sm_count
        tile_rows = kernel.tile_tokens * kernel.tile_heads
        tiles = -(-num_tokens // kernel.tile_tokens) * num_kv_heads * -(-group // kernel.tile_heads)
        if tiles >= blocks or problem.block_tables.shape[1] * 16 <= 512:
            assert plan.merge is None
            continue
        assert plan.partials is not None
        tokens, heads, splits, width = plan.partials
        assert (tokens, heads, width) == (num_tokens, num_kv_heads * group, head_size + 4)
        assert 2 <= splits <= 16
        assert tokens * heads * splits <= 2 * blocks * tile_rows
