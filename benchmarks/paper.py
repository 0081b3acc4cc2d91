"""Simulate the comparison of the vLLM paper (SOSP 2023): the real scheduler and block manager, no model.

    python benchmarks/paper.py [--requests 1500] [--out DIR]

OPT-13B on one A100 as in the paper's Table 1: 15.7K slots of KV cache, at most 2048 tokens per sequence.
Lengths are drawn from exponential distributions with the means of the paper's loads. The time of a step comes
from a cost model: a constant for reading the weights and running the layers, and a cost per token, chosen so
that about as many requests run at once with a paged cache as in the paper. No figure was measured on a GPU.

The first table is for a queue that is never empty: use of the memory (the paper's Figure 2) and number of
requests that finish per second of simulated time. "running" is the mean number of running requests at the
paper's request rate (its Figure 13). The second table is the memory that the sequences of a request save by
sharing (Figure 15): samples share the prompt, beams all tokens before they diverge. Beams fork where the
simulated model hesitates, at every second token; if at every token, they save up to 5 points more; if at
every tenth, 3 to 14 points less.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks.cost_model import Costs
from benchmarks.memory_use import memory_use
from benchmarks.simulation import Record, Request, SimulatedEngine, Spans
from cupaged.engine.scheduling.request import Sequence, SequenceGroup

SLOTS = 15_700
MAX_MODEL_LEN = 2048
COSTS = Costs(step=0.04, prompt_token=1.3e-4, decoded_token=2e-4)
NOTE = "A simulation: no model ran, and the times are those of a cost model. The memory is as it was planned."


@dataclass(frozen=True)
class Load:
    """A load of the paper, and its results."""

    prompt: float  # mean length in tokens
    output: float  # likewise
    rate: float  # requests per second at which the paper counts running requests
    running: dict[str, float]  # the paper's mean number of running requests, by policy
    saved: dict[str, dict[int, float]]  # the paper's saved memory, by n or beam_width, where it is published


LOADS = {
    "ShareGPT": Load(
        161.31,
        337.99,
        2,
        {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "paged": 30.42},
        {"n": {2: 0.162, 6: 0.305}, "beam_width": {2: 0.443, 6: 0.663}},
    ),
    "Alpaca": Load(
        19.31,
        58.45,
        30,
        {"orca-max": 7.00, "orca-pow2": 43.24, "orca-oracle": 72.75, "paged": 132.44},
        {
            "n": {2: 0.0609, 4: 0.0853, 6: 0.0979},
            "beam_width": {2: 0.376, 4: 0.531, 6: 0.552},
        },
    ),
}
# Memory policy and batching. The first is FasterTransformer.
POLICIES = [
    ("orca-max", "static"),
    ("orca-max", "continuous"),
    ("orca-pow2", "continuous"),
    ("orca-oracle", "continuous"),
    ("paged", "continuous"),
]
PAPERS_USE = {"orca-max": 0.204, "orca-pow2": 0.268, "orca-oracle": 0.382, "paged": 0.963}
WIDTHS = (2, 4, 6)
KINDS = ("stored", "reserved", "internal", "external")


def requests(load: Load, count: int, rate: float | None = None, **width: int) -> list[Request]:
    """Draw requests, all with the ``n`` or ``beam_width`` in ``width``; without a rate all arrive at 0."""
    rng = random.Random(0)
    drawn, time = [], 0.0
    for _ in range(count):
        prompt, output = (
            max(1, min(MAX_MODEL_LEN // 2 - 1, round(rng.expovariate(1 / mean))))
            for mean in (load.prompt, load.output)
        )
        time += rng.expovariate(rate) if rate else 0.0
        drawn.append(Request(time, Spans((0, prompt)), output, **width))
    return drawn


def engine(policy: str, batching: str) -> SimulatedEngine:
    return SimulatedEngine(
        SLOTS // 16,
        max_num_seqs=512,
        budget=2048,
        costs=COSTS,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
        memory_policy=policy,
        batching=batching,
    )


def memory(load: Load, policy: str, batching: str, count: int, **width: int) -> dict[str, float]:
    """Return means over time while requests wait: shares of the memory in use by kind, and saved by sharing.

    Also returns the number of requests that finish per second.
    """
    simulated = engine(policy, batching)
    totals = dict.fromkeys((*KINDS, "saved", "seconds"), 0.0)

    def observe(trace: Record, seconds: float) -> None:
        if trace.num_steps % 10 or not simulated.scheduler.waiting:
            return
        use = memory_use(simulated.blocks, simulated.scheduler.running, tokens_at_end, policy != "paged")
        for kind in KINDS:
            totals[kind] += seconds * getattr(use, kind) / (use.allocated + use.external)
        totals["saved"] += seconds * use.saved_by_sharing
        totals["seconds"] += seconds

    trace = simulated.replay(requests(load, count, **width), observe=observe)
    seconds = totals.pop("seconds")
    if not seconds:
        raise RuntimeError(f"{count} requests fit all at once: no queue, no figures; take more")
    return {
        **{kind: total / seconds for kind, total in totals.items()},
        "requests_per_s": count / trace.seconds,
    }


def tokens_at_end(group: SequenceGroup, seq: Sequence) -> int:
    return group.prompt_len + group.max_tokens - 1  # every output has its maximum length


def running(load: Load, policy: str, batching: str, count: int) -> float:
    """Return the mean number of running requests at the load's rate, from the first fifth of arrivals on."""
    simulated, arriving = engine(policy, batching), requests(load, count, load.rate)
    begin, end = arriving[count // 5].time, arriving[-1].time
    request_seconds = observed_seconds = 0.0

    def observe(trace: Record, seconds: float) -> None:
        nonlocal request_seconds, observed_seconds
        if begin <= trace.seconds <= end:
            request_seconds += seconds * len(simulated.scheduler.running)
            observed_seconds += seconds

    simulated.replay(arriving, observe=observe)
    return request_seconds / observed_seconds


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500, help="of each run (default: 1500)")
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    print(NOTE)
    print(f"\n{'':34}share of the memory, %{'':23}requests")
    print(f"{'load':<9} {'memory':<12} {'batching':<11} ", end="")
    print(" ".join(f"{name:>8}" for name in (*KINDS, "(paper)", "ended/s", "running", "(paper)")))
    rows: list[dict[str, Any]] = []
    for name, load in LOADS.items():
        for policy, batching in POLICIES:
            row = {"load": name, "memory_policy": policy, "batching": batching}
            row |= memory(load, policy, batching, options.requests)
            del row["saved"]
            row["running"] = running(load, policy, batching, options.requests)
            rows.append(row)
            use = f"{100 * PAPERS_USE[policy]:.1f}" if name == "ShareGPT" and batching != "static" else ""
            of_paper = f"{load.running[policy]:.1f}" if batching != "static" else ""
            print(f"{name:<9} {policy:<12} {batching:<11} ", end="")
            print(" ".join(f"{100 * row[kind]:>8.1f}" for kind in KINDS), end="")
            print(f" {use:>8} {row['requests_per_s']:>8.2f} {row['running']:>8.1f} {of_paper:>8}")
    print("\nmemory saved by sharing, %")
    print(f"{'load':<9} {'':<10} {'width':>5} {'saved':>6} {'(paper)':>8}")
    saved: dict[str, list[dict[str, Any]]] = {"n": [], "beam_width": []}
    for decoding, saved_rows in saved.items():
        for name, load in LOADS.items():
            for width in WIDTHS:
                share = memory(load, "paged", "continuous", options.requests, **{decoding: width})["saved"]
                saved_rows.append({"load": name, decoding: width, "saved": share})
                published = load.saved[decoding].get(width)
                of_paper = "" if published is None else f"{100 * published:.1f}"
                print(f"{name:<9} {decoding:<10} {width:>5} {100 * share:>6.1f} {of_paper:>8}")
    if options.out:
        results = {
            "note": NOTE,
            "requests": options.requests,
            "slots": SLOTS,
            "max_model_len": MAX_MODEL_LEN,
            "policies": rows,
            "parallel_sampling": saved["n"],
            "beam_search": saved["beam_width"],
        }
        common.write(options.out, "paper-simulated", common.environment(torch.device("cpu")), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
