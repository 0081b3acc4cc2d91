"""Time a batch of prefill chunks and decodes in one call, and its parts in calls of their own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch

import cupaged

from ..problems import attention
from ..report import Context, Row, reason


@dataclass(frozen=True)
class Mixed:
    """A batch of ``decodes`` over ``context`` tokens, and ``chunks`` of ``chunk`` tokens after ``prefix``."""

    decodes: int
    context: int
    chunks: int
    chunk: int
    prefix: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16

    def __str__(self) -> str:
        return f"{self.decodes} x {self.context} and {self.chunks} x {self.chunk} over {self.prefix}"


def cases(context: Context) -> list[Mixed]:
    if context.quick:
        return [Mixed(3, 90, 2, 20, 30, 4, 2, 64)]
    if not context.on_gpu:
        return [Mixed(16, 1024, 1, 256, 256, 9, 3, 64)]
    return [
        Mixed(64, 4096, 1, 2048, 0),
        Mixed(64, 4096, 4, 512, 4096),
        Mixed(256, 1024, 1, 512, 0),
        Mixed(8, 32768, 1, 2048, 8192),
        Mixed(32, 4096, 1, 2048, 0, 64, 8),
    ]


def run(context: Context) -> None:
    for case in context.within_budget(cases(context)):
        context.progress(f"  {case}")
        try:
            row = measure(context, case)
        except Exception as error:
            row = {"name": str(case), "wrong": reason(error)}
        if "wrong" in row:
            context.result.wrong.append(f"{case}: {row['wrong']}")
        context.result.rows.append(row)


def measure(context: Context, case: Mixed) -> Row:
    """Return the times of the whole and of its parts; none if the result is wrong."""
    device, dtype = context.device, torch.bfloat16
    generator = torch.Generator(device).manual_seed(context.seed)
    draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    lengths = [case.context] * case.decodes + [case.prefix + case.chunk] * case.chunks
    queries = [1] * case.decodes + [case.chunk] * case.chunks
    blocks = [-(-n // case.block_size) for n in lengths]
    # Enough copies of the batch, in other blocks, to miss the L2 cache.
    kv_bytes = 4 * case.block_size * sum(blocks) * case.num_kv_heads * case.head_size
    sets = max(1, -(-context.rotation_bytes // kv_bytes))
    cache = draw(sets * sum(blocks), 2, case.num_kv_heads, case.block_size, case.head_size)
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(context.seed)).to(torch.int32)
    tables = torch.zeros(sets, len(lengths), max(blocks), dtype=torch.int32)
    ids = iter(order.tolist())
    for table in tables:
        for row, count in zip(table, blocks):
            row[:count] = torch.tensor([next(ids) for _ in range(count)], dtype=torch.int32)
    tables = tables.to(device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32)
    query = draw(sum(queries), case.num_heads, case.head_size)
    n = case.decodes
    parts = {
        "mixed": (slice(None), slice(None), starts),
        "decodes": (slice(n), slice(n), None),
        "chunks": (slice(n, None), slice(n, None), starts[n:] - n),
    }
    calls = {
        name: [
            partial(cupaged.paged_attention, query[rows], cache, table[seqs], seq_lens[seqs], begin)
            for table in tables
        ]
        for name, (rows, seqs, begin) in parts.items()
    }
    result: Row = {"name": str(case), **asdict(case), "seconds": {}}
    out = calls["mixed"][-1]()
    if wrong := _complaint(case, out, query, cache, tables[-1], lengths, starts.tolist()):
        return result | {"wrong": wrong}
    alone = torch.cat([calls["decodes"][-1](), calls["chunks"][-1]()])
    if context.on_gpu and not torch.equal(out, alone):
        return result | {"wrong": "rows have other bits than alone"}
    for name, runs in calls.items():
        result["seconds"][name] = context.timer(runs, context.sample_s).median_s
    seconds = result["seconds"]
    result["of_parts"] = (seconds["decodes"] + seconds["chunks"]) / seconds["mixed"]
    return result


def _complaint(
    case: Mixed,
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lengths: list[int],
    starts: list[int],
) -> str | None:
    """Return what is wrong with the last row of some sequences, against float64, or None."""
    if not bool(torch.isfinite(out).all()):
        return "the result has NaN or inf"
    group = case.num_heads // case.num_kv_heads
    for s in sorted({0, case.decodes - 1, case.decodes, len(lengths) - 1}):
        length, row = lengths[s], starts[s + 1] - 1
        pair = cache[table[s, : -(-length // case.block_size)].long(), :, -1].transpose(0, 1).flatten(1, 2)
        inputs = (query[row : row + 1, -group:], pair[0, :length], pair[1, :length])
        position = torch.tensor([length - 1], device=query.device)
        exact = attention(*inputs, position, torch.float64)
        plain = attention(*inputs, position, query.dtype).double()
        error = (out[row : row + 1, -group:].double() - exact).abs().max().item()
        allowed = 2.0 * (plain - exact).abs().max().item() + 1e-5
        if not error <= allowed:
            return f"maximum error {error:.3g}, allowed {allowed:.3g}"
    return None
