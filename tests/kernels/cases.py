"""Drawn attention problems with poison in everything unused, and the tolerance they are judged by."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from cupaged.backends import reference
from cupaged.params import AttentionParams

TABLE_POISON = 2147480000


@dataclass
class Problem:
    """One batch. Every slot of ``kv_cache`` that no sequence covers is NaN."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    options: dict = field(default_factory=dict)

    def to(self, device: str) -> Problem:
        def move(x):
            return x.to(device) if isinstance(x, torch.Tensor) else x

        return Problem(
            *(move(getattr(self, f)) for f in ("query", "kv_cache", "block_tables", "seq_lens")),
            move(self.query_start_loc),
            {k: move(v) for k, v in self.options.items()},
        )

    def params(self) -> AttentionParams:
        options = {"scale": self.query.shape[-1] ** -0.5, **self.options}
        return AttentionParams(**options)

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference with inputs and arithmetic in ``dtype``."""
        return reference.attend(
            self.query.to(dtype),
            self.kv_cache.to(dtype),
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            self.params(),
            compute_dtype=dtype,
        )


def draw(
    seed: int,
    *,
    dtype: torch.dtype,
    head_size: int,
    block_size: int,
    num_kv_heads: int,
    group: int,
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    padding_rows: int = 0,
    block_stride_factor: int = 1,
    features: tuple[str, ...] = (),
) -> Problem:
    """Draw a batch.

    Args:
        query_lens: query tokens of each sequence; None means decode.
        block_stride_factor: the layer's view has every n-th chunk of a wider allocation.
        features: of "window", "cap", "alibi", "sinks", "full" (not causal).
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_heads = num_kv_heads * group
    max_blocks = max([1, *(-(-n // block_size) for n in seq_lens)]) + rng.randrange(3)
    num_blocks = sum(-(-n // block_size) for n in seq_lens) + rng.randrange(1, 4)
    wide = torch.full(
        (num_blocks, block_stride_factor, 2, num_kv_heads, block_size, head_size), float("nan"), dtype=dtype
    )
    kv_cache = wide[:, rng.randrange(block_stride_factor)]
    block_tables = torch.full((len(seq_lens), max_blocks), TABLE_POISON, dtype=torch.int32)
    free = list(range(num_blocks))
    rng.shuffle(free)
    for s, length in enumerate(seq_lens):
        for b in range(-(-length // block_size)):
            block = free.pop()
            block_tables[s, b] = block
            filled = min(block_size, length - b * block_size)
            kv_cache[block, :, :, :filled] = torch.randn(
                2, num_kv_heads, filled, head_size, generator=generator
            ).to(dtype)
    num_rows = (sum(query_lens) if query_lens is not None else len(seq_lens)) + padding_rows
    query = (2.0 * torch.randn(num_rows, num_heads, head_size, generator=generator)).to(dtype)
    if padding_rows:
        query[-padding_rows:] = float("nan")
    starts = None
    if query_lens is not None:
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    options: dict = {}
    if "window" in features:
        options["sliding_window"] = rng.randrange(1, max([2, *seq_lens]))
    if "cap" in features:
        options["logits_soft_cap"] = 2.0 + 10.0 * rng.random()
    if "alibi" in features:
        options["alibi_slopes"] = torch.rand(num_heads, generator=generator) * 0.3
    if "sinks" in features:
        options["sinks"] = torch.randn(num_heads, generator=generator)
    if "full" in features:
        options["causal"] = False
    problem = Problem(
        query, kv_cache, block_tables, torch.tensor(seq_lens, dtype=torch.int32), starts, options
    )
    if "window" in features:
        _poison_before_window(problem)
    return problem


def _poison_before_window(problem: Problem) -> None:
    """Blocks that no query row can see may have been freed: their entries must not be read."""
    block_size = problem.kv_cache.shape[3]
    for s, length in enumerate(problem.seq_lens.tolist()):
        starts = problem.query_start_loc
        rows = 1 if starts is None else int(starts[s + 1] - starts[s])
        first = max(0, length - rows - problem.options["sliding_window"] + 1)
        problem.block_tables[s, : first // block_size] = TABLE_POISON


def check(actual: torch.Tensor, problem: Problem, lse: torch.Tensor | None = None) -> None:
    """At most twice the error of plain torch at the same dtype, both against float64, plus 1e-5."""
    exact, exact_lse = problem.expected(torch.float64)
    plain, plain_lse = problem.expected(problem.query.dtype)
    close(actual, plain, exact)
    if lse is not None:
        assert torch.equal(torch.isneginf(lse.cpu()), torch.isneginf(exact_lse)), "empty rows differ"
        finite = torch.isfinite(exact_lse)
        close(lse.cpu()[finite], plain_lse[finite], exact_lse[finite])


def close(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    if exact.numel() == 0:
        return
    actual = actual.cpu().double()
    assert torch.isfinite(actual).all(), "the result has NaN or inf"
    error = (actual - exact).abs().max().item()
    allowed = 2.0 * (plain.double() - exact).abs().max().item() + 1e-5
    assert error <= allowed, f"maximum error {error:.3g}, allowed {allowed:.3g}"
