"""Latent attention on every backend: against float64, against the expanded computation, and to the bit."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from benchmarks.cases import TABLE_POISON
from cupaged import mla_checks
from cupaged.backends.cuda import kernel_choice, mla_plans, plans
from cupaged.backends.cuda import specs as kernel_specs
from cupaged.checks import BLOCK_SIZES
from cupaged.params import AttentionParams

from .mla_cases import Latents, check, check_result, draw, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# DeepSeek's and MiniCPM3's, and what fills neither a kernel's rows nor its chunks.
SIZES = [(576, 512), (288, 256), (192, 128), (200, 104), (24, 16), (8, 8)]
HEADS = [1, 5, 8, 16, 17, 40, 64, 128]


def draw_call(seed: int, mode: str, **options) -> Latents:
    """Draw a batch whose sequences have one query token, up to 8, or any number."""
    rng = random.Random(seed)
    options = {
        "num_heads": rng.choice(HEADS),
        "sizes": rng.choice(SIZES),
        "dtype": rng.choice(DTYPES),
    } | options
    lengths = [0, 1, rng.randrange(2, 80), rng.randrange(513, 560)]
    most = {"decode": 1, "speculation": 8, "prefill": 20 if options["num_heads"] < 64 else 4}[mode]
    query_lens = [rng.randrange(min(n, most) + 1) for n in lengths]
    query_lens[-1] = most
    problem = draw(
        seed,
        seq_lens=lengths,
        query_lens=None if mode == "decode" else query_lens,
        block_size=rng.choice(BLOCK_SIZES),
        padding_rows=0 if mode == "decode" else rng.choice([0, 1, 3]),
        block_stride_factor=rng.choice([1, 2]),
        causal=rng.random() < 0.8,
        **options,
    )
    if mode == "speculation":
        problem.options["max_query_len"] = 8
    return problem


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_drawn_calls(backend, seed, mode):
    """Run few heads on the emulation: its time is that of the query rows."""
    heads = {"num_heads": random.Random(seed).choice(HEADS[:4])} if "cuda" in backend[0] else {}
    check(draw_call(seed, mode, **heads), backend[1])


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["decode", "speculation", "prefill"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(backend, seed, mode, dtype, sizes):
    check(draw_call(seed, mode, dtype=dtype, sizes=sizes), backend[1])


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("num_heads", HEADS)
def test_heads_on_every_generation(emulated_arch, seed, mode, num_heads):
    check(draw_call(seed, mode, num_heads=num_heads))


def test_expanded_attention_is_the_same(backend, seed):
    """DeepSeek's attention with keys and values of each head, in float64, and with absorbed projections."""
    _, device = backend
    generator = torch.Generator().manual_seed(seed)
    heads, nope, rope, value, latent, length, rows, block_size = 3, 16, 8, 24, 40, 37, 5, 8

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w_uk, w_uv = normal(heads, nope, latent) / latent**0.5, normal(heads, value, latent) / latent**0.5
    kv_c, k_pe, query = normal(length, latent), normal(length, rope), normal(rows, heads, nope + rope)
    keys = torch.cat((torch.einsum("hdc,lc->hld", w_uk, kv_c), k_pe.expand(heads, -1, -1)), dim=-1)
    values = torch.einsum("hdc,lc->hld", w_uv, kv_c)
    hidden = torch.ones(rows, length, dtype=torch.bool).triu(length - rows + 1)
    logits = torch.einsum("thd,hld->htl", query, keys) * (nope + rope) ** -0.5
    expected = torch.einsum("htl,hld->thd", logits.masked_fill(hidden, float("-inf")).softmax(-1), values)

    absorbed = torch.einsum("thd,hdc->thc", query[..., :nope], w_uk)
    absorbed = torch.cat((absorbed, query[..., nope:]), dim=-1)
    cache = torch.full((7, block_size, latent + rope), float("nan"), device=device)
    blocks = torch.randperm(7, generator=generator)[: -(-length // block_size)]
    positions = torch.arange(length)
    slots = blocks[positions // block_size] * block_size + positions % block_size
    cupaged.concat_and_cache_mla(*(x.float().to(device) for x in (kv_c, k_pe)), cache, slots.to(device))
    out = cupaged.mla_attention(
        absorbed.float().to(device),
        cache,
        blocks[None].to(device, torch.int32),
        torch.tensor([length], dtype=torch.int32, device=device),
        torch.tensor([0, rows], dtype=torch.int32, device=device),
        scale=(nope + rope) ** -0.5,
        value_size=latent,
    )
    actual = torch.einsum("thc,hdc->thd", out.cpu().double(), w_uv)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_sequence_gets_the_same_bits_in_any_batch(backend, seed, monkeypatch, mode):
    """Alone, among others, and with a block table as wide as a long context needs.

    In many KV splits, and by few blocks that take one work item after the other.
    """
    monkeypatch.setattr(plans, "SPLIT_TOKENS", 64)
    monkeypatch.setattr(plans, "DECODE_BLOCKS_PER_SM", 1)
    rng = random.Random(seed)
    query_lens = None if mode == "decode" else [1, rng.randrange(2, 12), rng.randrange(2, 12)]
    batch = draw(
        seed,
        dtype=torch.bfloat16,
        num_heads=rng.choice([3, 16, 20]),
        sizes=(80, 64),
        block_size=16,
        seq_lens=[rng.randrange(520, 700), rng.randrange(20, 60), rng.randrange(200, 300)],
        query_lens=query_lens,
    )
    together, _ = run(batch, backend[1])
    starts = [0, *torch.tensor(query_lens or [1, 1, 1]).cumsum(0).tolist()]
    for s in range(3):
        rows = slice(starts[s], starts[s + 1])
        table = torch.full((1, 5000), TABLE_POISON, dtype=torch.int32)
        table[:, : batch.block_tables.shape[1]] = batch.block_tables[s : s + 1]
        ends = None if mode == "decode" else torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        alone = Latents(
            batch.query[rows], batch.kv_cache, table, batch.seq_lens[s : s + 1], ends, 64, batch.options
        )
        assert torch.equal(run(alone, backend[1])[0], together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_at_any_address(backend, seed, dtype):
    """Take rows of query and out that do not start at multiples of 16 bytes; write nothing else."""
    problem = draw(
        seed,
        dtype=dtype,
        num_heads=3,
        sizes=(24, 16),
        block_size=8,
        seq_lens=[19, 4],
        query_lens=[3, 1],
    )
    wide = torch.full((4, 4, 27), 7.0, dtype=dtype, device=backend[1])
    wide[:, :3, 1:25] = problem.query
    wide_out = torch.full((4, 5, 19), 7.0, dtype=dtype, device=backend[1])
    tensors = [tensor.to(backend[1]) for tensor in problem.tensors()[1:]]
    out = wide_out[:, 1:4, 1:17]
    options = problem.options | {"value_size": 16, "return_lse": True}
    check_result(problem, *cupaged.mla_attention(wide[:, :3, 1:25], *tensors, **options, out=out))
    wide_out[:, 1:4, 1:17] = 7
    assert (wide_out == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latents_are_written_into_their_slots(backend, seed, dtype):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    latent, rope, block_size = (*rng.choice([(512, 64), (24, 8), (8, 8)]), rng.choice([1, 4, 64]))
    tokens, num_blocks = 9, 40 // min(block_size, 8)
    wide = torch.randn(tokens, latent + rope + 3, generator=generator).to(backend[1], dtype)
    first = rng.choice([0, 1])  # of the rows in one tensor: aligned or not
    kv_c, k_pe = wide[:, first : first + latent], wide[:, first + latent : first + latent + rope]
    if rng.random() < 0.5:
        kv_c, k_pe = kv_c.contiguous(), k_pe.contiguous()
    memory = torch.full(
        (num_blocks, 2, block_size, latent + rope), float("nan"), dtype=dtype, device=backend[1]
    )
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens]
    slots[rng.randrange(tokens)] = -1
    cupaged.concat_and_cache_mla(kv_c, k_pe, memory[:, 1], slots.to(backend[1]))
    expected = torch.full_like(memory[:, 1], float("nan")).flatten(0, 1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = torch.cat((kv_c[token], k_pe[token]))
    torch.testing.assert_close(memory[:, 1].flatten(0, 1), expected, rtol=0, atol=0, equal_nan=True)
    assert memory[:, 0].isnan().all()


def test_nothing_to_do(backend):
    """Return zeros and -inf for no sequence, or only empty ones."""
    device = backend[1]
    for num_seqs in (0, 3):
        out, lse = cupaged.mla_attention(
            torch.full((num_seqs, 2, 24), float("nan"), device=device),
            torch.full((2, 16, 24), float("nan"), device=device),
            torch.full((num_seqs, 2), TABLE_POISON, dtype=torch.int32, device=device),
            torch.zeros(num_seqs, dtype=torch.int32, device=device),
            scale=1.0,
            value_size=16,
            return_lse=True,
        )
        assert (out == 0).all()
        assert torch.isneginf(lse).all()


@pytest.mark.matrix
@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_grow_beyond_the_most_there_may_be(backend, seed, monkeypatch, dtype):
    monkeypatch.setattr(plans, "MAX_SPLITS", 2)
    monkeypatch.setattr(plans, "DECODE_BLOCKS_PER_SM", 1)  # fewer blocks than work items: they go round
    problem = draw(seed, dtype=dtype, num_heads=20, sizes=(24, 16), seq_lens=[1600, 1025, 1024, 30])
    check(problem, backend[1])


@pytest.mark.parametrize(
    ("dtype", "num_heads", "arch", "prefills", "name"),
    [
        ("bf16", 16, "90a", False, "mla_attention_mma[{}, tile_rows=16, tile_keys=32, stages=2]"),
        ("bf16", 20, "90a", False, "mla_attention_mma[{}, tile_rows=32, tile_keys=32, stages=3]"),
        ("bf16", 16, "90a", True, "mla_attention_mma[{}, tile_rows=64, tile_keys=32, stages=3]"),
        ("fp16", 128, "80", False, "mla_attention_mma[{}, tile_rows=64, tile_keys=32, stages=2]"),
        ("fp16", 128, "86", True, "mla_attention_mma[{}, tile_rows=32, tile_keys=16, stages=2]"),
        ("bf16", 128, "75", False, "mla_attention[{}, tile_rows=8]"),
        ("fp32", 128, "90a", True, "mla_attention[{}, tile_rows=8]"),
    ],
)
def test_the_choice(dtype, num_heads, arch, prefills, name):
    kernel = kernel_choice.mla_kernel(dtype, 520, 512, num_heads, arch, prefills)
    assert str(kernel.spec) == name.format(f"dtype={dtype}, key_size=576, value_size=512")


def test_prompts_have_no_partials():
    """Leave long prompts whole, whose partials would take gigabytes; divide single tokens."""
    problem = draw(0, dtype=torch.float16, num_heads=4, seq_lens=[3000, 9], query_lens=[500, 1])
    problem.options["max_query_len"] = None
    out = torch.empty(501, 4, 512, dtype=torch.float16)
    tables, starts = problem.block_tables, problem.query_start_loc
    params = AttentionParams(**problem.options)
    singles, others = mla_plans.attention(
        problem.query, problem.kv_cache, tables, starts, out, params, "90a", 4
    )
    splits = -(-tables.shape[1] * 64 // plans.SPLIT_TOKENS)
    assert singles.partials == (2, 4, splits, 516)
    assert (others.merge, others.partials) == (None, None)


def test_the_kernels_have_room_for_what_the_checks_accept():
    assert kernel_specs.MLA_SIZES[-1] == (mla_checks.MAX_KEY_SIZE, mla_checks.MAX_VALUE_SIZE)
