"""Measure the simulator: simulated seconds, and tokens, per second of one core.

    python benchmarks/simulator.py [--quick] [--rounds 3] [--out DIR]

The paper's loads at the request rates of its Figure 13, on the paper's memory; the scheduler and the block
manager are those that serve, and the latter's integrity is checked every thousand steps. Seconds are CPU
time; the fastest round counts. Tokens are those of the prompts and outputs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks.evaluation import systems
from benchmarks.evaluation.memory import LOADS, requests

# Load, requests, requests/s.
CASES = (("ShareGPT", 2000, 2.0), ("Alpaca", 20_000, 30.0))
QUICK = 40  # times fewer requests


def measure(load: str, count: int, rate: float, system: str = "paged") -> dict[str, Any]:
    """Replay a load and return what it took."""
    engine, arriving = systems.engine(system), requests(LOADS[load], count, rate)
    started = time.process_time()
    record = engine.replay(arriving)
    cpu_s = time.process_time() - started
    return {
        "load": load,
        "requests": count,
        "rate": rate,
        "steps": record.num_steps,
        "tokens": record.num_tokens,
        "simulated_s": record.seconds,
        "cpu_s": cpu_s,
        "times_real_time": record.seconds / cpu_s,
        "tokens_per_s": record.num_tokens / cpu_s,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts (default: 3)")
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rows = []
    for load, count, rate in CASES:
        count = count // QUICK if options.quick else count
        rounds = [measure(load, count, rate) for _ in range(options.rounds)]
        rows.append(row := min(rounds, key=lambda each: each["cpu_s"]))
        print(
            f"{load} at {rate:g} requests/s: {row['times_real_time']:,.0f} times real time, "
            f"{row['tokens_per_s']:,.0f} tokens/s, {row['steps']:,} steps in {row['cpu_s']:.1f} s"
        )
    if options.out:
        results = {"note": systems.NOTE, "rows": rows}
        print(common.write(options.out, "simulator-cpu", common.environment(torch.device("cpu")), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
