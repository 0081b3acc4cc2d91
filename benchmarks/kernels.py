"""The paged kernels against dense attention (torch SDPA on contiguous tensors) on whatever device there is.

    python benchmarks/kernels.py [--device cpu] [--quick] [--out DIR]

A case is checked against float64 before it is timed: its error may be at most twice that of SDPA at the same
dtype, plus 1e-5. One that fails prints no time, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

if __package__:
    from . import common
else:
    import common

import cupaged

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Case:
    """One shape. ``query_tokens`` of 1 is decode."""

    dtype: str
    num_seqs: int
    query_tokens: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        kind = "decode" if self.query_tokens == 1 else f"prefill {self.query_tokens}"
        heads = f"{self.num_heads}/{self.num_kv_heads}x{self.head_size}"
        return f"{kind:<13} {self.dtype:<9} {self.num_seqs:>3} x {self.context:<6} {heads}"


class Batch:
    """The tensors of a case: the same keys and values contiguous and in scattered blocks."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        kv_shape = (case.num_seqs, case.num_kv_heads, case.context, case.head_size)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.case = case
        self.key, self.value = draw(*kv_shape), draw(*kv_shape)
        rows = case.num_seqs * case.query_tokens
        self.query = draw(rows, case.num_heads, case.head_size)
        self.out = torch.full_like(self.query, float("nan"))
        blocks = -(-case.context // BLOCK_SIZE)
        order = torch.randperm(case.num_seqs * blocks, generator=generator).to(torch.int32)
        self.block_tables = order.view(case.num_seqs, blocks).to(device)
        self.seq_lens = torch.full((case.num_seqs,), case.context, dtype=torch.int32, device=device)
        self.query_start_loc = None
        if case.query_tokens > 1:
            self.query_start_loc = torch.arange(
                0, rows + 1, case.query_tokens, dtype=torch.int32, device=device
            )
        cache_shape = (len(order), 2, case.num_kv_heads, BLOCK_SIZE, case.head_size)
        self.kv_cache = torch.full(cache_shape, float("nan"), dtype=dtype, device=device)
        position = torch.arange(case.context, device=device)
        slots = self.block_tables[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        flat = (t.transpose(1, 2).reshape(-1, *t.shape[1::2]) for t in (self.key, self.value))
        cupaged.reshape_and_cache(*flat, self.kv_cache, slots.flatten())

    def paged(self) -> torch.Tensor:
        cupaged.paged_attention(
            self.query,
            self.kv_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            out=self.out,
        )
        return self.out

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """SDPA over the contiguous tensors, [T, H, D]."""
        case = self.case
        query, key, value = (t if dtype is None else t.to(dtype) for t in (self.query, self.key, self.value))
        query = query.view(case.num_seqs, case.query_tokens, case.num_heads, case.head_size).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=case.query_tokens == case.context, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(-1, case.num_heads, case.head_size)

    def complaint(self) -> str | None:
        """What is wrong with the paged result, None if nothing is."""
        exact = self.dense(torch.float64)
        allowed = 2 * (self.dense().double() - exact).abs().max().item() + 1e-5
        error = (self.paged().double() - exact).abs().max().item()
        if error <= allowed:  # also false for NaN
            return None
        return f"maximum error {error:.3g}, allowed {allowed:.3g}"

    def work(self) -> tuple[int, int]:
        """Bytes that must be read and written, and floating-point operations."""
        case = self.case
        moved = sum(t.numel() * t.element_size() for t in (self.key, self.value, self.query, self.out))
        pairs = case.query_tokens * case.context
        if case.query_tokens > 1:
            pairs -= case.query_tokens * (case.query_tokens - 1) // 2
        return moved, 4 * case.num_seqs * case.num_heads * case.head_size * pairs


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Decode and prefill of the demo model and of a Llama 3 8B layer; larger where there is a GPU."""
    if quick:
        return [
            Case("float32", 2, 1, 96, 4, 2, 64),
            Case("bfloat16", 2, 1, 96, 4, 2, 64),
            Case("float32", 1, 48, 48, 4, 2, 64),
        ]
    if device.type == "cpu":
        shapes = [(32, 1, 160), (8, 1, 2048), (1, 1, 8192), (1, 512, 512), (1, 2048, 2048)]
        return [
            Case(dtype, seqs, query, context, *heads)
            for dtype in ("float32", "bfloat16")
            for heads in ((9, 3, 64), (32, 8, 128))
            for seqs, query, context in shapes
        ]
    shapes = [(64, 1, 1024), (64, 1, 8192), (1, 1, 32768), (8, 2048, 2048), (1, 8192, 8192)]
    return [
        Case("bfloat16", seqs, query, context, *heads)
        for heads in ((32, 32, 128), (32, 8, 128), (64, 8, 128))
        for seqs, query, context in shapes
    ]


def seconds(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Median time of a run; on a GPU by events, with the L2 cache written over before each."""
    run()
    times: list[float] = []
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        if flush is None:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
            continue
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 1.0)


def main(arguments: list[str] | None = None) -> int:
    """Check and time every case; returns 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    budget = 0.05 if options.quick else 0.5
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    print(f"{'case':<48} {'us':>9} {'GB/s':>7} {'GFLOP/s':>8} {'of copy':>8} {'dense us':>9} {'speed-up':>8}")
    results, wrong = [], 0
    for case in cases(device, options.quick):
        batch = Batch(case, device)
        if found := batch.complaint():
            print(f"{case!s:<48} WRONG: {found}")
            wrong = 1
            continue
        paged, dense = (seconds(run, device, budget) for run in (batch.paged, batch.dense))
        moved, operations = batch.work()
        print(
            f"{case!s:<48} {paged * 1e6:>9.1f} {moved / paged / 1e9:>7.1f} {operations / paged / 1e9:>8.1f} "
            f"{moved / paged / bandwidth:>8.2f} {dense * 1e6:>9.1f} {dense / paged:>7.2f}x"
        )
        results.append(
            {**asdict(case), "paged_s": paged, "dense_s": dense, "bytes": moved, "flop": operations}
        )
    if options.out:
        found = {"block_size": BLOCK_SIZE, "copy_bytes_per_s": bandwidth, "cases": results}
        common.write(options.out, f"kernels-{device.type}", device, found)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
