"""Simulate the latency by block size: Figure 18.

Large blocks waste memory, as the block manager counts it; small ones cost time, as the cost model assumes it.
"""

from __future__ import annotations

import statistics
from typing import Any

from . import systems
from .memory import LOADS, requests

NAME = "paper-block-size"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATES = {
    "ShareGPT": 2.0,
    "Alpaca": 30.0,
}  # requests/s: those of Figure 13, as Figure 18 does not name its own
REQUESTS = {"ShareGPT": 800, "Alpaca": 4000}
QUICK = 60


def jobs(quick: bool) -> list[dict[str, Any]]:
    """Return the runs: of each load and block size."""
    sizes = (16, 256) if quick else SIZES
    return [
        {"load": load, "block_size": size, "rate": rate, "requests": QUICK if quick else REQUESTS[load]}
        for load, rate in RATES.items()
        for size in sizes
    ]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a job."""
    arriving = requests(LOADS[job["load"]], job["requests"], job["rate"])
    simulated = systems.engine("paged", block_size=job["block_size"])
    record = simulated.replay(arriving)
    return {
        **job,
        "latency_s": statistics.fmean(served.normalized_latency for served in record.served),
        "preemptions": simulated.scheduler.num_preemptions,
    }


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the JSON has."""
    return {"note": systems.NOTE, "rows": rows}


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    return (
        f"{row['load']} at {row['rate']:g} requests/s, blocks of {row['block_size']}: "
        f"{row['latency_s']:.3f} s a token, {row['preemptions']} preemptions"
    )
