"""Time the kernels that only move memory, and attention over caches of different allocation.

Every timed call was checked first: the moved blocks or rows must be bitwise equal to their sources.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import cupaged
from cupaged.backends.cuda.kernels import Kernels

from ..problems import Case, attention
from ..report import Context, Row
from .ceilings import pinned_bandwidth

BLOCK_BYTES = tuple(1 << power for power in (13, 15, 17, 19, 21))  # 8 KB to 2 MB
SWAP_BYTES = (*BLOCK_BYTES, 4 << 20, 16 << 20)  # beyond `kernels.COPY_ENGINE_BYTES` as well
Swap = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def run(context: Context) -> None:
    jobs = [partial(_write, tokens=tokens) for tokens in _token_counts(context)]
    sizes = BLOCK_BYTES[:1] if context.quick else BLOCK_BYTES
    jobs += [partial(_copy, block_bytes=size) for size in sizes]
    if context.on_gpu:
        total = 256 << 20
        pinned = pinned_bandwidth(context, total)
        sizes = SWAP_BYTES[:1] if context.quick else SWAP_BYTES
        for out in (True, False):
            jobs += [partial(_swap, block_bytes=size, out=out, total=total, pinned=pinned) for size in sizes]
    else:
        context.result.left_out.append("swap_blocks: there is no GPU")
    for case in _layout_cases(context):
        jobs += [partial(_layout, case=case, layout=layout) for layout in context.layouts]
    for job in context.within_budget(jobs, _name):
        context.progress(f"  {_name(job)}")
        row = job(context)
        context.result.rows.append(row)
        if "wrong" in row:
            context.result.wrong.append(f"{_name(job)}: {row['wrong']}")


def _name(job: partial) -> str:
    values = [f"{k}={v}" for k, v in job.keywords.items() if k not in ("pinned", "total")]
    return f"{job.func.__name__.lstrip('_')} {', '.join(values)}"


def _token_counts(context: Context) -> tuple[int, ...]:
    return (8,) if context.quick else (1, 64, 1024, 16384, 65536) if context.on_gpu else (64, 4096)


def _write(context: Context, tokens: int) -> Row:
    """Time reshape_and_cache of keys and values of a Llama 3 8B layer, views of a fused projection."""
    heads, size, block_size = 8, 128, 16
    row_bytes = 2 * heads * size * 2
    moved = 2 * tokens * row_bytes
    sets = max(1, -(-context.rotation_bytes // moved))
    blocks = sets * (-(-tokens // block_size) + 1)
    generator = torch.Generator(context.device).manual_seed(context.seed)
    qkv = torch.randn(
        sets, tokens, 6 * heads, size, generator=generator, device=context.device, dtype=torch.bfloat16
    )
    cache = torch.full(
        (blocks, 2, heads, block_size, size), float("nan"), dtype=torch.bfloat16, device=context.device
    )
    order = torch.randperm(blocks * block_size, device=context.device)[: sets * tokens].view(sets, tokens)
    runs = [
        partial(
            cupaged.reshape_and_cache,
            qkv[s, :, 4 * heads : 5 * heads],
            qkv[s, :, 5 * heads :],
            cache,
            order[s],
        )
        for s in range(sets)
    ]
    row: Row = {"name": "reshape_and_cache", "tokens": tokens, "bytes": moved}
    runs[-1]()
    block, offset = order[-1] // block_size, order[-1] % block_size
    for i in range(2):
        if not torch.equal(cache[block, i, :, offset], qkv[-1, :, (4 + i) * heads : (5 + i) * heads]):
            return row | {"wrong": "other values in the cache than were written"}
    return row | rate(context, runs, moved)


def _copy(context: Context, block_bytes: int) -> Row:
    """Time copy_blocks of scattered blocks from one half of a cache to the other."""
    total = (1 << 20) if context.quick else (512 << 20) if context.on_gpu else (64 << 20)
    count = total // block_bytes
    cache = torch.randn(2 * count, block_bytes // 4, device=context.device)
    mapping = _mapping(context, count).to(context.device)
    mapping[:, 1] += count
    row: Row = {"name": "copy_blocks", "block_bytes": block_bytes, "bytes": 2 * total}
    cupaged.copy_blocks(cache, mapping)
    if not torch.equal(cache[mapping[:, 1]], cache[mapping[:, 0]]):
        return row | {"wrong": "blocks differ from their sources"}
    return row | rate(context, [lambda: cupaged.copy_blocks(cache, mapping)], 2 * total)


def _swap(context: Context, block_bytes: int, out: bool, total: int, pinned: dict[str, float]) -> Row:
    """Time swap_blocks of scattered blocks, and both of the ways between which it chooses.

    The two show whether `kernels.COPY_ENGINE_BYTES` is right. The ceiling is a single pinned copy of the same
    size.
    """
    count = total // block_bytes
    near = torch.randn(count, block_bytes // 4, device=context.device)
    far = torch.randn(count, block_bytes // 4).pin_memory()
    src, dst = (near, far) if out else (far, near)
    mapping = _mapping(context, count)
    direction = "out" if out else "in"
    row: Row = {"name": f"swap_blocks {direction}", "block_bytes": block_bytes, "bytes": total}
    expected = src.to(context.device)[mapping[:, 0]]
    seconds_by_way: dict[str, float] = {}
    for way, swap in (("chosen", cupaged.swap_blocks), *swap_ways().items()):
        dst.zero_()
        swap(src, dst, mapping)
        torch.cuda.synchronize()
        if not torch.equal(dst.to(context.device)[mapping[:, 1]], expected):
            return row | {"wrong": f"blocks differ from their sources ({way})"}
        timing = context.timer([partial(swap, src, dst, mapping)], context.sample_s, graph=False)
        seconds_by_way[way] = timing.median_s
    seconds = seconds_by_way.pop("chosen")
    rate = total / seconds
    return row | {"seconds": seconds, "of_pinned": rate / pinned[direction], "ways": seconds_by_way}


def swap_ways() -> dict[str, Swap]:
    """Return swap_blocks with the copy engine only (one copy per block), and with the kernel only."""
    from cupaged.backends.cuda.launcher import CupyLauncher  # needs CuPy

    launcher = CupyLauncher()
    return {
        "engine": Kernels(launcher, copy_engine_bytes=0).swap_blocks,
        "kernel": Kernels(launcher, copy_engine_bytes=1 << 62).swap_blocks,
    }


def _layout_cases(context: Context) -> list[Case]:
    if context.quick:
        return [Case("float32", 2, 1, 64, 4, 2, 64)]
    if not context.on_gpu:
        return [Case("bfloat16", 8, 1, 1024, 32, 8, 128)]
    return [Case("bfloat16", *shape, 32, 8, 128) for shape in ((32, 1, 4096), (1, 1, 65536))]


def _layout(context: Context, case: Case, layout: str) -> Row:
    """Time decode over all layers of a cache in turn.

    Args:
        layout: "block" for one allocation [num_blocks, layers, 2, Hkv, B, D], of which a layer is a view with
            a large stride between blocks; "layer" for a tensor [num_blocks, 2, Hkv, B, D] per layer.
    """
    layers = 16 if context.on_gpu else 4
    blocks = -(-case.context // case.block_size)
    total = case.num_seqs * blocks
    dtype = getattr(torch, case.dtype)
    shape = (2, case.num_kv_heads, case.block_size, case.head_size)
    make = partial(torch.empty, dtype=dtype, device=context.device)
    if layout == "block":
        whole = make((total, layers, *shape))
        caches = [whole[:, i] for i in range(layers)]
    else:
        caches = [make((total, *shape)) for _ in range(layers)]
    generator = torch.Generator(context.device).manual_seed(context.seed)
    for cache in caches:
        cache.normal_(generator=generator)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(context.seed))
    tables = order.to(context.device, torch.int32).view(case.num_seqs, blocks)
    lengths = torch.full((case.num_seqs,), case.context, dtype=torch.int32, device=context.device)
    query = torch.randn(
        case.num_seqs, case.num_heads, case.head_size, generator=generator, device=context.device
    ).to(dtype)
    out = torch.empty_like(query)
    runs = [partial(cupaged.paged_attention, query, cache, tables, lengths, out=out) for cache in caches]
    row: Row = {"name": f"{layout}-major", "case": str(case), "layers": layers, "bytes": case.kv_bytes}
    runs[-1]()
    keys, values = (caches[-1][tables[-1].long(), i, 0].flatten(0, 1)[: case.context] for i in range(2))
    group = case.num_heads // case.num_kv_heads
    position = torch.tensor([case.context - 1], device=context.device)
    inputs = (query[-1:, :group], keys, values, position)
    exact, plain = (attention(*inputs, kind).double() for kind in (torch.float64, dtype))
    error = (out[-1:, :group].double() - exact).abs().max().item()
    allowed = 2 * (plain - exact).abs().max().item() + 1e-5
    if not error <= allowed:
        return row | {"wrong": f"maximum error {error:.3g}, allowed {allowed:.3g}"}
    return row | rate(context, runs, case.kv_bytes)


def _mapping(context: Context, count: int) -> torch.Tensor:
    """Return a random block mapping, int64 [count, 2]."""
    generator = torch.Generator().manual_seed(context.seed)
    return torch.stack([torch.randperm(count, generator=generator) for _ in range(2)], dim=1)


def rate(context: Context, runs: list, moved: int) -> Row:
    """Return the time of a call that moves so many bytes, and its rate over that of a copy."""
    timing = context.timer(runs, context.sample_s)
    rate = moved / timing.median_s
    return {"seconds": timing.median_s, "of_copy": rate / context.copy_bandwidth, "method": timing.method}
