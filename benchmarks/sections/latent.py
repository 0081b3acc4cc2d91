"""Time latent attention over a cache of DeepSeek's rows, beside torch's attention over the same rows, dense.

Every timed call is checked first, on the last query token of a sequence, against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import cupaged

from ..report import Context, Row, reason

KEY_SIZE, VALUE_SIZE, BLOCK_SIZE = 576, 512, 64
SCALE = 192**-0.5
MAX_CACHE_BYTES = 12 << 30
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A batch of sequences that are alike. ``query_tokens`` of 1 is decode."""

    num_seqs: int
    query_tokens: int
    context: int
    num_heads: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        kind = "decode" if self.query_tokens == 1 else f"prefill {self.query_tokens}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kind:<13} {dtype:<9} {self.num_seqs:>3} x {self.context:<6} {self.num_heads} heads"

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the rows, each of which must be read once."""
        return self.num_seqs * self.context * KEY_SIZE * self.dtype.itemsize

    @property
    def flop(self) -> int:
        """Return the operations of the two products, without those that a causal mask leaves out."""
        seen = self.query_tokens * self.context - self.query_tokens * (self.query_tokens - 1) // 2
        return 2 * self.num_seqs * self.num_heads * seen * (KEY_SIZE + VALUE_SIZE)


def cases(context: Context) -> list[Case]:
    """Return decode with the heads of DeepSeek-V3, and of an eighth of them; and prefill."""
    if context.quick:
        return [Case(2, 1, 90, 4), Case(2, 5, 90, 4)]
    if not context.on_gpu:
        return [Case(8, 1, 2048, 16), Case(8, 1, 2048, 128), Case(1, 1, 8192, 16), Case(1, 64, 1024, 16)]
    decode = [
        Case(seqs, 1, length, heads)
        for heads in (128, 16)
        for seqs, length in ((64, 4096), (128, 4096), (1, 65536))
    ]
    return [*decode, Case(1, 2048, 2048, 128), Case(4, 512, 8192, 128), Case(64, 2, 4096, 128)]


def run(context: Context) -> None:
    context.result.notes.append(f"copy: {context.copy_bandwidth / 1e9:,.1f} GB/s")
    for case in context.within_budget(cases(context)):
        context.progress(f"  latent {case}")
        row = measure(context, case)
        if "wrong" in row:
            context.result.wrong.append(f"latent {case}: {row['wrong']}")
        context.result.rows.append(row)


def measure(context: Context, case: Case) -> Row:
    """Return the times of a case over caches that miss the L2 cache; none if our result is wrong."""
    row: Row = {"name": "latent", "case": str(case), "bytes": case.cache_bytes, "flop": case.flop}
    row |= {"seconds": {}, "failed": {}}
    sets = max(1, min(-(-context.rotation_bytes // case.cache_bytes), MAX_CACHE_BYTES // case.cache_bytes))
    try:
        batches = [_Batch(case, context.device, context.seed + i) for i in range(sets)]
        if wrong := batches[0].complaint():
            row["wrong"] = wrong
            return row
        row["seconds"]["cupaged"] = context.timer([b.paged for b in batches], context.sample_s).median_s
    except Exception as error:
        row["wrong"] = reason(error)
        return row
    if case.query_tokens == 1:
        try:
            dense = [b.dense() for b in batches]
            row["seconds"]["sdpa"] = context.timer(dense, context.sample_s).median_s
        except Exception as error:
            row["failed"]["sdpa"] = reason(error)
    return row


class _Batch:
    """The tensors of a case, drawn."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        blocks = -(-case.context // BLOCK_SIZE)
        options = {"generator": generator, "device": device, "dtype": case.dtype}
        self.case = case
        self.cache = torch.randn(case.num_seqs * blocks, BLOCK_SIZE, KEY_SIZE, **options)
        self.query = torch.randn(case.num_seqs * case.query_tokens, case.num_heads, KEY_SIZE, **options)
        order = torch.randperm(len(self.cache), generator=generator, device=device)
        self.tables = order.view(case.num_seqs, blocks).int()
        self.lengths = torch.full((case.num_seqs,), case.context, dtype=torch.int32, device=device)
        starts = torch.arange(case.num_seqs + 1, dtype=torch.int32, device=device) * case.query_tokens
        self.starts = None if case.query_tokens == 1 else starts
        self.out = torch.empty_like(self.query[..., :VALUE_SIZE], memory_format=torch.contiguous_format)

    def paged(self) -> torch.Tensor:
        arguments = self.query, self.cache, self.tables, self.lengths, self.starts
        return cupaged.mla_attention(*arguments, scale=SCALE, value_size=VALUE_SIZE, out=self.out)

    def rows(self, sequence: int) -> torch.Tensor:
        """Return the cached rows of a sequence."""
        return self.cache[self.tables[sequence].long()].flatten(0, 1)[: self.case.context]

    def dense(self) -> Run:
        """Return torch's attention over the rows in order, with the heads for its query tokens."""
        keys = torch.stack([self.rows(s) for s in range(self.case.num_seqs)])[:, None]
        attend = torch.nn.functional.scaled_dot_product_attention
        return partial(attend, self.query[:, None], keys, keys[..., :VALUE_SIZE], scale=SCALE)

    def complaint(self) -> str | None:
        """Return what is wrong with the last token's result; its error may be twice that of plain torch."""
        actual, keys, query = self.paged()[-1].double(), self.rows(-1), self.query[-1]

        def attend(dtype: torch.dtype) -> torch.Tensor:
            weights = (query.to(dtype) @ keys.to(dtype).T * SCALE).softmax(dim=-1)
            return (weights @ keys[:, :VALUE_SIZE].to(dtype)).double()

        exact = attend(torch.float64)
        error, plain = ((x - exact).abs().max().item() for x in (actual, attend(query.dtype)))
        return None if error <= 2 * plain + 1e-5 else f"error {error:.2e}, of plain torch {plain:.2e}"
