"""The kernels as NVRTC compiles them, interpreted, against float64."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from benchmarks.cases import check, draw
from cupaged import backends
from cupaged.backends import reference
from cupaged.backends.cuda import plans
from cupaged.fused_checks import ACTIVATIONS
from cupaged.params import AttentionParams
from tests.kernels import test_activation, test_norm, test_rope
from tests.kernels import test_sample as samples
from tests.kernels.fused_cases import DTYPES, LAYOUTS
from tests.kernels.test_attention import FEATURES, run
from tests.kernels.test_shared_prefix import share

from . import launcher

ARCHS = ["75", "80", "90a"]  # no tensor cores for attention, mma.sync, wgmma
QUANTISED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


@pytest.fixture(params=ARCHS)
def arch(request, monkeypatch, seed) -> str:
    """Run on what is compiled for this architecture."""
    module = launcher.backend(seed, request.param)
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)
    return request.param


@pytest.mark.parametrize("mode", ["decode", "speculation", "prefill"])
def test_attention(arch, seed, mode):
    check_attention(arch, seed, mode, None)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_quantised_caches(arch, seed, mode):
    check_attention(arch, seed, mode, random.Random(seed).choice(QUANTISED))


def check_attention(arch: str, seed: int, mode: str, cache_dtype: torch.dtype | None) -> None:
    rng = random.Random(seed)
    lengths = [0, 1, rng.randrange(2, 40), rng.randrange(40, 160)]
    most = {"decode": 1, "speculation": 8, "prefill": 40}[mode]
    dtypes = [torch.float16, torch.bfloat16, *[torch.float32] * (arch == "75")]
    problem = draw(
        seed,
        dtype=rng.choice(dtypes),
        cache_dtype=cache_dtype,
        head_size=rng.randrange(16, 129 if arch == "75" else 257, 8 if cache_dtype is None else 16),
        block_size=rng.choice([1, 8, 16, 32]),
        num_kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 3, 6]),
        seq_lens=lengths,
        query_lens=None if mode == "decode" else [rng.randrange(0, min(n, most) + 1) for n in lengths],
        padding_rows=0 if mode == "decode" else rng.choice([0, 3]),
        block_stride_factor=rng.choice([1, 2]),
        features=rng.choice(FEATURES),
    )
    if mode == "speculation":
        problem.options["max_query_len"] = most
    out, lse = run(problem, "cpu")
    check(out, problem, lse)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_splits_by_the_load(arch, seed, mode):
    """Few sequences that are long: their keys are divided as the planner on the device says."""
    rng = random.Random(seed)
    problem = draw(
        seed,
        dtype=torch.float16,
        head_size=32,
        block_size=16,
        num_kv_heads=1,
        group=rng.choice([1, 3]),
        seq_lens=[rng.randrange(300, 600), 3],
        query_lens=None if mode == "decode" else [rng.randrange(10, 20), 1],
        features=rng.choice(FEATURES),
    )
    problem.options["batch_invariant"] = False
    out, lse = run(problem, "cpu")
    check(out, problem, lse)


@pytest.mark.matrix
@pytest.mark.parametrize("arch", ["80", "90a"], indirect=True)
@pytest.mark.parametrize(("group", "cache_dtype"), [(2, None), (12, None), (12, torch.float8_e4m3fn)])
def test_shared_prefix(arch, seed, group, cache_dtype):
    """KV splits that several sequences have are read for all of them, with many rows by the wide kernel,
    which for e4m3 unpacks in another way. No bit changes."""
    rng = random.Random(seed)
    lengths = [plans.SPLIT_TOKENS + rng.randrange(9, 60) for _ in range(6)]
    problem = draw(
        seed,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
        head_size=64,
        block_size=32,
        num_kv_heads=1,
        group=group,
        seq_lens=lengths,
    )
    problem = share(problem, [(0, target, plans.SPLIT_TOKENS) for target in range(1, 5)])
    apart = run(problem, "cpu")
    problem.options["shared_prefix"] = True
    out, lse = run(problem, "cpu")
    check(out, problem, lse)
    assert torch.equal(out, apart[0])
    assert torch.equal(lse, apart[1])


@pytest.mark.parametrize("cache_dtype", [None, *QUANTISED], ids=str)
def test_reshape_and_cache(arch, seed, cache_dtype):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    tokens, heads, head_size, block_size = 19, rng.choice([1, 3]), rng.choice([16, 48, 80]), 8
    key, value = (torch.randn(tokens, heads, head_size, generator=generator).to(dtype) for _ in range(2))
    shape = (5, 2, heads, block_size, head_size)
    cache = torch.randint(0, 100, shape, generator=generator, dtype=torch.uint8)
    cache = cache.view(cache_dtype) if cache_dtype else cache.to(dtype)
    slots = torch.randperm(5 * block_size, generator=generator)[:tokens]
    slots[rng.randrange(tokens)] = -1
    scales = [torch.rand(heads, generator=generator) * 0.02 + 0.001 for _ in range(2)]
    arguments = (slots, *(scales if cache_dtype else (None, None)))
    expected = cache.clone()
    reference.reshape_and_cache(key, value, expected, *arguments, None)
    cupaged.reshape_and_cache(key, value, cache, *arguments)
    assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))


def test_copy_blocks(arch, seed):
    generator = torch.Generator().manual_seed(seed)
    for width in (13, 64):  # in bytes, and in words of 16
        cache = torch.randint(0, 255, (9, 2, width), generator=generator, dtype=torch.uint8)
        pairs = torch.randperm(9, generator=generator)[:8].view(4, 2)
        expected = cache.clone()
        expected[pairs[:, 1]] = cache[pairs[:, 0]]
        cupaged.copy_blocks(cache, pairs)
        assert torch.equal(cache, expected)


def test_merge_attention_states(arch, seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    outs = torch.randn(3, 5, 2, 24, generator=generator).to(dtype)
    lses = 3 * torch.randn(3, 5, 2, generator=generator)
    lses[rng.randrange(3), :2] = float("-inf")
    lses[:, 1] = float("-inf")
    outs[lses.isneginf()] = float("nan")
    out, lse = cupaged.merge_attention_states(outs, lses)
    exact, exact_lse = torch.empty_like(outs[0]).double(), torch.empty_like(lses[0]).double()
    reference.merge_attention_states(outs.double(), lses.double(), exact, exact_lse)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=torch.finfo(dtype).eps * 8)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "residual", "input norm"])
@pytest.mark.parametrize("size", [96, 1100, 16500])
def test_rms_norm(arch, seed, kind, size):
    """Rows of a warp and of a thread block, and rows that do not fit in its registers."""
    rng = random.Random(seed)
    size += 4 * rng.randrange(20)
    rows = 1 if size > 16384 else rng.choice([1, 3])
    test_norm.check_call("cpu", rng, rng.choice(DTYPES), kind, rng.choice(LAYOUTS), rows, size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_mul(arch, seed, activation):
    rng = random.Random(seed)
    dtype, layout = rng.choice(DTYPES), rng.choice(LAYOUTS)
    test_activation.test_act_and_mul(("cuda_ptx", "cpu"), seed, dtype, activation, layout)
    test_activation.test_edges(("cuda_ptx", "cpu"), dtype, activation)


@pytest.mark.parametrize("cache_dtype", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("rotation", ["halves", "interleaved", "none"])
def test_rope_and_cache(arch, seed, cache_dtype, rotation):
    rng = random.Random(seed)
    dtype, layout = rng.choice(DTYPES), rng.choice(LAYOUTS)
    test_rope.test_rope_and_cache(("cuda_ptx", "cpu"), seed, dtype, cache_dtype, rotation, layout)


def test_sample(arch, seed):
    """Rows of less than a chunk a thread, and of more than each warp's lanes have."""
    rng = random.Random(seed)
    size = rng.choice([rng.randrange(1, 600), rng.randrange(8200, 12000)])
    samples.check_call("cpu", rng, rng.choice(DTYPES), rng.choice(LAYOUTS), 1, size)


def test_the_kernels_are_those_that_are_meant():
    """What the problems above run is chosen by the plans."""
    problem = draw(0, dtype=torch.float16, head_size=64, block_size=16, num_kv_heads=1, group=2, seq_lens=[9])
    params = AttentionParams(scale=1.0)
    tensors = problem.query, problem.kv_cache, problem.block_tables
    names = {
        arch: (
            plans.decode(*tensors, None, problem.query, params, arch, 2).decode.spec.entry,
            plans.prefill(*tensors, problem.query, params, arch, 2).prefill.spec.entry,
        )
        for arch in ARCHS
    }
    assert names == {
        "75": ("paged_decode", "paged_prefill"),
        "80": ("paged_decode_mma", "paged_prefill_mma"),
        "90a": ("paged_decode_mma", "paged_prefill_wgmma"),
    }
