"""Random attention problems with poison in all unused memory, and the tolerance for their results."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from cupaged.backends import reference
from cupaged.params import AttentionParams
from cupaged.quantisation import LARGEST, dequantise, quantise

TABLE_POISON = 2147480000
# Fills slots that no sequence covers: codes of NaN, and for int8 the code that quantising never returns.
CODE_POISON = {torch.float8_e4m3fn: (0x7F, 0xFF), torch.float8_e5m2: (0x7F, 0xFE), torch.int8: (0x80,)}


@dataclass
class Problem:
    """A batch. Every slot of ``kv_cache`` that no sequence covers is NaN, or `CODE_POISON`."""

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
        """Return the reference's output and lse over the dequantised cache, computed in ``dtype``."""
        kv_cache, params = self.kv_cache, self.params()
        if params.k_scale is not None and params.v_scale is not None:
            kv_cache = torch.stack(
                [dequantise(kv_cache[:, i], s, torch.float64) for i, s in enumerate(scales_of(params))], 1
            )
            params = params._replace(k_scale=None, v_scale=None)
        return reference.attend(
            self.query.to(dtype),
            kv_cache.to(dtype),
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            params,
            compute_dtype=dtype,
        )


def scales_of(params: AttentionParams) -> tuple[torch.Tensor, torch.Tensor]:
    assert params.k_scale is not None
    assert params.v_scale is not None
    return params.k_scale, params.v_scale


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
    cache_dtype: torch.dtype | None = None,
) -> Problem:
    """Draw a batch.

    Args:
        query_lens: number of query tokens of each sequence; None means decode.
        padding_rows: number of query rows after those of the last sequence.
        block_stride_factor: ratio of the stride between blocks to a block's size.
        features: any of "window", "cap", "alibi", "sinks", "full" (not causal).
        cache_dtype: dtype of a quantised cache; the scales, one per KV head, are drawn around the smallest
            at which nothing saturates.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_heads = num_kv_heads * group
    max_blocks = max([1, *(-(-n // block_size) for n in seq_lens)]) + rng.randrange(3)
    num_blocks = sum(-(-n // block_size) for n in seq_lens) + rng.randrange(1, 4)
    wide = torch.full(
        (num_blocks, block_stride_factor, 2, num_kv_heads, block_size, head_size), float("nan"), dtype=dtype
    )
    layer = rng.randrange(block_stride_factor)
    kv_cache = wide[:, layer]
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
    if cache_dtype is not None:
        wide, scales = quantise_cache(wide, cache_dtype, rng)
        kv_cache = wide[:, layer]
        options["k_scale"], options["v_scale"] = scales
    problem = Problem(
        query, kv_cache, block_tables, torch.tensor(seq_lens, dtype=torch.int32), starts, options
    )
    if "window" in features:
        _poison_before_window(problem)
    return problem


def quantise_cache(
    wide: torch.Tensor, dtype: torch.dtype, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of a cache [num_blocks, n, 2, Hkv, B, D], and random scales [2, Hkv].

    NaN becomes poison. With small scales the largest values saturate, with large ones some codes are unused.
    """
    largest = wide.nan_to_num(nan=0.0).abs().amax(dim=(0, 1, 4, 5)).float()
    scales = largest.clamp(min=0.1) / LARGEST[dtype]
    scales *= torch.tensor([[rng.uniform(0.7, 3.0) for _ in row] for row in scales.tolist()])
    codes = torch.stack(
        [quantise(wide[:, :, i].transpose(2, 3), scales[i], dtype).transpose(2, 3) for i in range(2)], 2
    ).view(torch.uint8)
    poison = torch.tensor(rng.choice(CODE_POISON[dtype]), dtype=torch.uint8)
    return torch.where(wide.isnan(), poison, codes).view(dtype), scales


def _poison_before_window(problem: Problem) -> None:
    """Poison the entries of blocks that no query row sees, which may have been freed."""
    block_size = problem.kv_cache.shape[3]
    for s, length in enumerate(problem.seq_lens.tolist()):
        starts = problem.query_start_loc
        rows = 1 if starts is None else int(starts[s + 1] - starts[s])
        first = max(0, length - rows - problem.options["sliding_window"] + 1)
        problem.block_tables[s, : first // block_size] = TABLE_POISON


def check(actual: torch.Tensor, problem: Problem, lse: torch.Tensor | None = None) -> None:
    """Check that errors are at most twice those of plain torch at the same dtype, plus 1e-5.

    Both are against float64.

    Raises:
        AssertionError: the output, or ``lse`` if given, is wrong.
    """
    exact, exact_lse = problem.expected(torch.float64)
    plain, plain_lse = problem.expected(problem.query.dtype)
    close(actual, plain, exact)
    if lse is not None:
        assert torch.equal(torch.isneginf(lse.cpu()), torch.isneginf(exact_lse)), "empty rows differ"
        finite = torch.isfinite(exact_lse)
        close(lse.cpu()[finite], plain_lse[finite], exact_lse[finite])


def close(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Check that the error of ``actual`` is at most twice that of ``plain``, plus 1e-5."""
    if exact.numel() == 0:
        return
    actual = actual.cpu().double()
    assert torch.isfinite(actual).all(), "the result has NaN or inf"
    error = (actual - exact).abs().max().item()
    allowed = 2.0 * (plain.double() - exact).abs().max().item() + 1e-5
    assert error <= allowed, f"maximum error {error:.3g}, allowed {allowed:.3g}"
