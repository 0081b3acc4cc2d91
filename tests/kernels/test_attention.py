"""`paged_attention` on every backend against float64, on drawn problems."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from benchmarks.cases import Problem, check, draw
from cupaged.checks import BLOCK_SIZES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CACHE_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
HEAD_SIZES = [32, 64, 80, 96, 112, 120, 128, 192, 256]
FEATURES = [(), ("window",), ("cap",), ("alibi",), ("sinks",), ("window", "cap", "alibi", "sinks")]


def run(problem: Problem, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    p = problem.to(device)
    out = torch.full_like(p.query, float("nan"))
    result, lse = cupaged.paged_attention(
        p.query,
        p.kv_cache,
        p.block_tables,
        p.seq_lens,
        p.query_start_loc,
        **p.options,
        out=out,
        return_lse=True,
    )
    assert result.data_ptr() == out.data_ptr()
    return result, lse


def sizes(rng: random.Random, longest: int) -> list[int]:
    """Lengths of a batch: one empty, one of a single token, the rest drawn; longer where it is cheap."""
    return [0, 1, *(rng.randrange(1, longest) for _ in range(3))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_decode(backend, seed, dtype, head_size):
    rng = random.Random(seed)
    problem = draw(
        seed,
        dtype=dtype,
        head_size=head_size,
        block_size=rng.choice(BLOCK_SIZES),
        num_kv_heads=rng.choice([1, 2, 3]),
        group=rng.choice([1, 2, 3, 4, 5, 7, 8]),
        seq_lens=sizes(rng, 700),
        block_stride_factor=rng.choice([1, 3]),
        features=rng.choice(FEATURES),
    )
    check(*_swap(run(problem, backend[1]), problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_prefill(backend, seed, dtype, head_size):
    rng = random.Random(seed)
    seq_lens = sizes(rng, 700)
    problem = draw(
        seed,
        dtype=dtype,
        head_size=head_size,
        block_size=rng.choice(BLOCK_SIZES),
        num_kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 3, 4]),
        seq_lens=seq_lens,
        query_lens=[rng.randrange(min(n, 1), min(n, 90) + 1) for n in seq_lens],
        padding_rows=rng.choice([0, 3]),
        block_stride_factor=rng.choice([1, 2]),
        features=rng.choice(FEATURES),
    )
    check(*_swap(run(problem, backend[1]), problem))


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_any_head_size(backend, seed, mode):
    """A multiple of 8, most of which no model is known to have."""
    rng = random.Random(seed)
    head_size = rng.randrange(8, 257, 8)
    seq_lens = sizes(rng, 400)
    problem = draw(
        seed,
        dtype=rng.choice([torch.float16, torch.bfloat16] if "cuda" in backend[0] else DTYPES),
        head_size=head_size,
        block_size=16,
        num_kv_heads=1,
        group=3,
        seq_lens=seq_lens,
        query_lens=None if mode == "decode" else [min(n, rng.randrange(2, 60)) for n in seq_lens],
    )
    check(*_swap(run(problem, backend[1]), problem))


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("features", [*FEATURES, ("full",), ("full", "window")], ids="+".join)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_features(backend, seed, mode, features, block_size):
    rng = random.Random(seed)
    seq_lens = sizes(rng, 700)
    problem = draw(
        seed,
        dtype=torch.float32,
        head_size=64,
        block_size=block_size,
        num_kv_heads=2,
        group=rng.choice([1, 2, 6]),
        seq_lens=seq_lens,
        query_lens=None if mode == "decode" else [rng.randrange(0, min(n, 40) + 1) for n in seq_lens],
        features=features,
    )
    check(*_swap(run(problem, backend[1]), problem))


@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 71), (1, 32), (4, 16), (8, 1), (2, 17)])
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_head_ratios(backend, seed, mode, num_kv_heads, group):
    problem = draw(
        seed,
        dtype=torch.bfloat16,
        head_size=64,
        block_size=16,
        num_kv_heads=num_kv_heads,
        group=group,
        seq_lens=[37, 5],
        query_lens=None if mode == "decode" else [19, 5],
    )
    check(*_swap(run(problem, backend[1]), problem))


# The sizes in float32 have rows of an odd number of 16-byte pieces.
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "head_sizes"),
    [(torch.float16, [128]), (torch.bfloat16, [64]), (torch.float32, [32, 80, 112, 256])],
    ids=str,
)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_quantised_cache(backend, seed, mode, dtype, head_sizes, cache_dtype):
    rng = random.Random(seed)
    seq_lens = sizes(rng, 700)
    problem = draw(
        seed,
        dtype=dtype,
        head_size=rng.choice(head_sizes),
        block_size=rng.choice(BLOCK_SIZES),
        num_kv_heads=rng.choice([1, 2, 3]),
        group=rng.choice([1, 2, 4, 5, 8]),
        seq_lens=seq_lens,
        query_lens=None if mode == "decode" else [rng.randrange(min(n, 1), min(n, 60) + 1) for n in seq_lens],
        block_stride_factor=rng.choice([1, 3]),
        features=rng.choice(FEATURES),
        cache_dtype=cache_dtype,
    )
    check(*_swap(run(problem, backend[1]), problem))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_every_code_reads_as_its_number(backend, mode, dtype, cache_dtype):
    """A sequence of one token attends to nothing else: it gets its value, code * scale, rounded once."""
    codes = torch.arange(256, dtype=torch.uint8)
    usable = codes.view(cache_dtype).float().isfinite()
    cache = torch.zeros(3, 2, 1, 8, 256, dtype=torch.uint8)
    cache[2, 1, 0, 0] = codes.masked_fill(~usable, 0)
    device = backend[1]
    scale = torch.tensor([0.375], device=device)
    out = cupaged.paged_attention(
        torch.randn(1, 1, 256, device=device).to(dtype),
        cache.to(device).view(cache_dtype),
        torch.tensor([[2]], dtype=torch.int32, device=device),
        torch.ones(1, dtype=torch.int32, device=device),
        None if mode == "decode" else torch.tensor([0, 1], dtype=torch.int32, device=device),
        k_scale=scale,
        v_scale=scale,
    )
    expected = cache[2, 1, 0, 0].view(cache_dtype).float() * 0.375
    assert torch.equal(out.cpu()[0, 0], expected.to(dtype))


def test_long_decode_is_split(backend, seed):
    """Long enough that a sequence is cut into several parts and merged."""
    rng = random.Random(seed)
    problem = draw(
        seed,
        dtype=torch.float32,
        head_size=32,
        block_size=16,
        num_kv_heads=1,
        group=2,
        seq_lens=[rng.randrange(1500, 2500), 3, 512, 513],
        features=rng.choice(FEATURES),
    )
    check(*_swap(run(problem, backend[1]), problem))


def test_strided_query_and_out(backend, seed):
    """Rows of a fused QKV projection: contiguous in D only."""
    problem = draw(
        seed,
        dtype=torch.float16,
        head_size=64,
        block_size=16,
        num_kv_heads=2,
        group=2,
        seq_lens=[40, 9],
        query_lens=[7, 9],
    )
    p = problem.to(backend[1])
    wide = torch.full((16, 8, 64), float("nan"), dtype=torch.float16, device=backend[1])
    wide[:, 2:6] = p.query
    wide_out = torch.full((16, 9, 64), 7.0, dtype=torch.float16, device=backend[1])
    cupaged.paged_attention(
        wide[:, 2:6], p.kv_cache, p.block_tables, p.seq_lens, p.query_start_loc, out=wide_out[:, 1:5]
    )
    check(wide_out[:, 1:5], problem)
    assert (wide_out[:, 0] == 7).all()
    assert (wide_out[:, 5:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("unaligned", ["query", "out"])
def test_rows_at_any_address(backend, seed, mode, dtype, unaligned):
    """Rows of query or out that do not start at multiples of 16 bytes."""
    problem = draw(
        seed,
        dtype=dtype,
        head_size=64,
        block_size=16,
        num_kv_heads=2,
        group=2,
        seq_lens=[40, 9],
        query_lens=None if mode == "decode" else [7, 9],
    )
    p = problem.to(backend[1])
    odd = torch.full((len(p.query), 4, 67), 7.0, dtype=dtype, device=backend[1])
    query, out = p.query, torch.full_like(p.query, float("nan"))
    if unaligned == "query":
        query = odd[:, :, 1:65]
        query.copy_(p.query)
    else:
        out = odd[:, :, 1:65]
    cupaged.paged_attention(query, p.kv_cache, p.block_tables, p.seq_lens, p.query_start_loc, out=out)
    check(out, problem)
    assert (odd[:, :, 0] == 7).all()
    assert (odd[:, :, 65:] == 7).all()


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_nothing_to_do(backend, mode):
    """No sequence, or only empty ones: zeros and -inf, also with sinks."""
    device = backend[1]
    cache = torch.full((2, 2, 1, 16, 64), float("nan"), device=device)
    for num_seqs in (0, 3):
        query = torch.full((num_seqs, 2, 64), float("nan"), device=device)
        starts = torch.zeros(num_seqs + 1, dtype=torch.int32, device=device) if mode == "prefill" else None
        out, lse = cupaged.paged_attention(
            query,
            cache,
            torch.full((num_seqs, 2), 2147480000, dtype=torch.int32, device=device),
            torch.zeros(num_seqs, dtype=torch.int32, device=device),
            starts,
            sinks=torch.zeros(2, device=device),
            return_lse=True,
        )
        assert (out == 0).all()
        assert torch.isneginf(lse).all()


@pytest.mark.parametrize("features", [("full",), ("full", "sinks")], ids="+".join)
def test_splitting_the_keys_and_merging(backend, seed, features):
    """Attention over two halves of the keys, merged, is attention over all of them; one has the sinks."""
    problem = draw(
        seed,
        dtype=torch.float32,
        head_size=64,
        block_size=16,
        num_kv_heads=2,
        group=2,
        seq_lens=[100, 40, 16],
        features=features,
    )
    p = problem.to(backend[1])
    first = p.seq_lens.clamp(max=32)
    states = [
        cupaged.paged_attention(p.query, p.kv_cache, tables, lens, causal=False, sinks=sinks, return_lse=True)
        for tables, lens, sinks in [
            (p.block_tables, first, p.options.get("sinks")),
            (p.block_tables[:, 2:], p.seq_lens - first, None),
        ]
    ]
    outs, lses = zip(*states)
    out, lse = cupaged.merge_attention_states(outs, lses)
    check(out, problem, lse)


def test_merge_reads_no_empty_state(backend):
    device = backend[1]
    outs = torch.full((3, 2, 1, 8), float("nan"), device=device)
    lses = torch.full((3, 2, 1), float("-inf"), device=device)
    outs[1, 0], lses[1, 0] = 5.0, 0.25
    out, lse = cupaged.merge_attention_states(outs, lses)
    assert (out[0] == 5).all()
    assert (out[1] == 0).all()
    assert lse[0].item() == 0.25
    assert torch.isneginf(lse[1]).all()


def _swap(result, problem):
    return result[0], problem, result[1]
