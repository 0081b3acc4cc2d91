"""Measure the machine's ceilings: a large copy, a large matrix product, pinned copies over the bus."""

from __future__ import annotations

import torch

from ..report import Context


def run(context: Context) -> None:
    rows = context.result.rows
    rows.append({"name": "copy", "bytes_per_s": context.copy_bandwidth})
    size = 256 if context.quick else 8192 if context.on_gpu else 1024
    left, right = (torch.randn(size, size, device=context.device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    timing = context.timer([lambda: torch.mm(left, right, out=product)], 3 * context.sample_s)
    rows.append({"name": "matmul bfloat16", "size": size, "flop_per_s": 2 * size**3 / timing.median_s})
    if not context.on_gpu:
        context.result.left_out.append("pinned copies: there is no GPU")
        return
    for name, bandwidth in pinned_bandwidth(context, 1 << 30).items():
        rows.append({"name": f"pinned copy {name}", "bytes_per_s": bandwidth})


def pinned_bandwidth(context: Context, size: int) -> dict[str, float]:
    """Return bytes per second of a single copy of ``size`` bytes to and from pinned memory."""
    near = torch.ones(size, dtype=torch.uint8, device=context.device)
    far = torch.ones(size, dtype=torch.uint8).pin_memory()
    copies = {
        "out": lambda: far.copy_(near, non_blocking=True),
        "in": lambda: near.copy_(far, non_blocking=True),
    }
    return {
        name: size / context.timer([copy], 2 * context.sample_s, graph=False).median_s
        for name, copy in copies.items()
    }
