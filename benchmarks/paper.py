"""Replay the evaluation of the vLLM paper (SOSP 2023): the real scheduler and block manager, no model.

    python benchmarks/paper.py [--quick] [--only memory rates ...] [--jobs 2] [--out DIR]

OPT-13B on one A100 as in the paper's Table 1: 15.7K slots of KV cache, at most 2048 tokens a sequence.
Lengths are drawn from exponential distributions with the means of the paper's loads; the time of a step comes
from a cost model (`cost_model.py`). DIR gets a JSON and a plot of each part:

memory      what the KV cache is used for, running requests, memory saved by sharing: Figures 2, 13, 15
rates       request rates at the same latency: Figures 12, 14, 16, 17
block-size  latency by block size: Figure 18
preemption  recomputing against swapping: Figure 19
policies    eviction, scheduling order, admission and preemption on drawn traces, which the paper has not
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks.evaluation import block_sizes, memory, plots, policies, preemption, rates
from benchmarks.evaluation.systems import NOTE

PARTS = {part.NAME.partition("-")[2]: part for part in (memory, rates, block_sizes, preemption, policies)}
Job = tuple[int, str, dict[str, Any]]


def _run(job: Job) -> tuple[int, str, dict[str, Any]]:
    number, part, settings = job
    return number, part, PARTS[part].run(settings)


def run(parts: list[str], quick: bool, processes: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run the jobs of some parts, print their rows as they come, and yield each part that is complete."""
    wanted = [(part, job) for part in parts for job in PARTS[part].jobs(quick)]
    jobs: list[Job] = [(number, *job) for number, job in enumerate(wanted)]
    rows: dict[str, dict[int, dict[str, Any]]] = {part: {} for part in parts}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, part, row in pool.imap_unordered(_run, jobs):
            rows[part][number] = row
            print(f"{part}: {PARTS[part].line(row)}", flush=True)
            if len(rows[part]) == sum(name == part for name, _ in wanted):
                yield part, [rows[part][number] for number in sorted(rows[part])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests and cases, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, help="directory for the JSON and the plots")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    print(NOTE, flush=True)
    for part, rows in run(options.only, options.quick, options.jobs):
        if options.out:
            results = PARTS[part].results(rows)
            path = common.write(
                options.out, PARTS[part].NAME, common.environment(torch.device("cpu")), results
            )
            plots.draw(json.loads(path.read_text())["results"], path.with_suffix(".png"))
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
