"""Simulate recomputing against swapping by block size: Figure 19.

A block is moved by two copies in each layer, which each take some microseconds to start: small blocks use
little of the link. Recomputing does not depend on blocks.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.cost_model import Work, opt_13b_on_a100, pairs

from . import systems
from .memory import LOADS, requests

NAME = "paper-preemption"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = 256  # of the sequence that Figure 19a's times are of here; the paper does not name its length
RATE = 2.5  # requests/s of ShareGPT: more than fit, so that requests are preempted
REQUESTS, QUICK = 400, 150
MODES = ("recompute", "swap")


def jobs(quick: bool) -> list[dict[str, Any]]:
    """Return the runs: of each block size and mode."""
    return [
        {"block_size": size, "mode": mode, "rate": RATE, "requests": QUICK if quick else REQUESTS}
        for size in ((16,) if quick else SIZES)
        for mode in MODES
    ]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a job."""
    size, mode = job["block_size"], job["mode"]
    costs = opt_13b_on_a100(size)
    blocks = -(-TOKENS // size)
    if mode == "swap":
        overhead = 2 * blocks * costs.moved_block
    else:
        overhead = costs.seconds(Work(TOKENS, pairs(TOKENS, 0))) - costs.step
    simulated = systems.engine("paged", block_size=size, preemption_mode=mode)
    record = simulated.replay(requests(LOADS["ShareGPT"], job["requests"], job["rate"]))
    return {
        **job,
        "overhead_s": overhead,
        "latency_s": statistics.fmean(served.normalized_latency for served in record.served),
        "preemptions": simulated.scheduler.num_preemptions,
    }


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the JSON has."""
    return {"note": systems.NOTE, "tokens": TOKENS, "rows": rows}


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    overhead = f"{1e3 * row['overhead_s']:.0f} ms for {TOKENS} tokens"
    return (
        f"{row['mode']}, blocks of {row['block_size']}: {overhead}, {row['latency_s']:.3f} s a token, "
        f"{row['preemptions']} preemptions"
    )
