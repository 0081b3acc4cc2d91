"""Random problems of latent attention with poison in all unused memory, after `benchmarks.cases`."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

import cupaged
from benchmarks.cases import TABLE_POISON, close
from cupaged.backends import reference
from cupaged.params import AttentionParams


@dataclass
class Latents:
    """A batch. Every slot of ``kv_cache`` that no sequence covers is NaN."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    value_size: int
    options: dict = field(default_factory=dict)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.query, self.kv_cache, self.block_tables, self.seq_lens, self.query_start_loc

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference's output and lse, computed in ``dtype``."""
        options = {name: value for name, value in self.options.items() if name != "max_query_len"}
        return reference.attend_latents(
            self.query.to(dtype),
            self.kv_cache.to(dtype),
            *self.tensors()[2:],
            self.value_size,
            AttentionParams(**options),
            compute_dtype=dtype,
        )


def draw(
    seed: int,
    *,
    dtype: torch.dtype,
    num_heads: int,
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    sizes: tuple[int, int] = (576, 512),
    block_size: int = 64,
    padding_rows: int = 0,
    block_stride_factor: int = 1,
    causal: bool = True,
) -> Latents:
    """Draw a batch.

    Args:
        query_lens: number of query tokens of each sequence; None means decode.
        sizes: of keys and values.
        padding_rows: number of query rows after those of the last sequence.
        block_stride_factor: ratio of the stride between blocks to a block's size.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    key_size, value_size = sizes
    blocks = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(blocks) + rng.randrange(1, 4)
    wide = torch.full((num_blocks, block_stride_factor, block_size, key_size), float("nan"), dtype=dtype)
    kv_cache = wide[:, rng.randrange(block_stride_factor)]
    shape = len(seq_lens), max([1, *blocks]) + rng.randrange(3)
    block_tables = torch.full(shape, TABLE_POISON, dtype=torch.int32)
    free = rng.sample(range(num_blocks), num_blocks)
    for s, length in enumerate(seq_lens):
        for b in range(blocks[s]):
            block_tables[s, b] = block = free.pop()
            filled = min(block_size, length - b * block_size)
            kv_cache[block, :filled] = torch.randn(filled, key_size, generator=generator).to(dtype)
    num_rows = (len(seq_lens) if query_lens is None else sum(query_lens)) + padding_rows
    query = torch.randn(num_rows, num_heads, key_size, generator=generator).to(dtype)
    if padding_rows:
        query[-padding_rows:] = float("nan")
    starts = None if query_lens is None else torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    options = {"scale": 2.0 * key_size**-0.5, "causal": causal}
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    return Latents(query, kv_cache, block_tables, lengths, starts, value_size, options)


def run(problem: Latents, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Call `mla_attention` on the device, into an output of NaN."""
    tensors = [None if tensor is None else tensor.to(device) for tensor in problem.tensors()]
    shape = *problem.query.shape[:2], problem.value_size
    out = torch.full(shape, float("nan"), dtype=problem.query.dtype, device=device)
    given, lse = cupaged.mla_attention(
        *tensors, value_size=problem.value_size, **problem.options, out=out, return_lse=True
    )
    assert given is out
    return out, lse


def check(problem: Latents, device: str = "cpu") -> None:
    """Run the problem, and check the result."""
    check_result(problem, *run(problem, device))


def check_result(problem: Latents, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Check that errors are at most twice those of plain torch at the same dtype, as `cases.check` does."""
    exact, exact_lse = problem.expected(torch.float64)
    plain, plain_lse = problem.expected(problem.query.dtype)
    close(out, plain, exact)
    assert torch.equal(torch.isneginf(lse.cpu()), torch.isneginf(exact_lse)), "empty rows differ"
    finite = torch.isfinite(exact_lse)
    close(lse.cpu()[finite], plain_lse[finite], exact_lse[finite])
