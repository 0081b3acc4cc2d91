"""Simulate every policy of the engine on drawn traces: hit rate, latency and throughput.

The paper compares none. The times are those of its OPT-13B on one A100; where prompts share beginnings the
pool is larger than the paper's, so that there is a cache beside what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks import policies
from benchmarks.cost_model import opt_13b_on_a100
from benchmarks.policies import KINDS, Machine
from benchmarks.simulation import Request
from benchmarks.trace_generators import generate
from benchmarks.traces import Arrivals

from .systems import NOTE, SLOTS

NAME = "paper-policies"
QUICK = 40  # requests


@dataclass(frozen=True)
class Trace:
    """A number of requests at a rate of requests, or sessions, per second, and the blocks that they share."""

    requests: int
    rate: float
    num_blocks: int


# Rates near what the defaults sustain.
TRACES = {
    "sharegpt": Trace(600, 2.2, SLOTS // policies.BLOCK_SIZE),
    "alpaca": Trace(3000, 32.0, SLOTS // policies.BLOCK_SIZE),
    "chat": Trace(600, 0.5, 3000),
    "mooncake-toolagent": Trace(300, 0.5, 15_000),
    "mooncake-conversation": Trace(300, 0.1, 8000),
}


def jobs(quick: bool) -> list[dict[str, Any]]:
    """Return the runs: of each trace and policy; the defaults of all kinds are one engine and one run."""
    return [
        {
            "trace": trace,
            "requests": QUICK if quick else TRACES[trace].requests,
            "kind": kind,
            "policy": policy,
        }
        for trace in TRACES
        for kind, each in KINDS.items()
        for policy in each.names
        if policy != "priority" and (kind == "eviction" or policy != each.names[0])
    ]


@cache
def _load(trace: str, count: int) -> tuple[Machine, list[Request]]:
    drawn = TRACES[trace]
    machine = Machine(opt_13b_on_a100(), drawn.num_blocks)
    requests = policies.fitting(generate(trace, count, Arrivals(drawn.rate)), drawn.num_blocks)
    return machine, policies.fixed_times(requests, machine)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a job."""
    machine, requests = _load(job["trace"], job["requests"])
    row = policies.replay(job["kind"], job["policy"], requests, machine)
    return {**job, "fitting": len(requests), **row}


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the JSON has."""
    traces = {
        name: {"rate": trace.rate, "blocks": trace.num_blocks, "block_size": policies.BLOCK_SIZE}
        for name, trace in TRACES.items()
    }
    return {"note": NOTE, "traces": traces, "rows": rows}


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    return f"{row['trace']:<21} {policies.line(row)}"
