"""Find the request rates that the paper's systems sustain at the same latency: its Figures 12, 14, 16 and 17.

    python benchmarks/rates.py [--requests 1000] [--jobs 2] [--out DIR]

A simulation with the scheduler and block manager that serve, the memory of the paper's OPT-13B and a cost
model of one A100 (`cost_model.py`): no model ran. Of each system the rate is found at which the mean
normalized latency is `LATENCY`; the paper compares rates at similar latencies, where the curves rise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks.cost_model import OPT_13B_ON_A100
from benchmarks.simulation import Request, SimulatedEngine
from benchmarks.trace_generators import GENERATORS, Draw, exponential, independent, shared_prefixes
from benchmarks.traces import Arrivals

SLOTS = 15_700  # of the KV cache: Table 1
MAX_MODEL_LEN = 2048
LATENCY = 0.25  # seconds per output token; a request alone takes 0.035
STEPS = 6  # of the search
NOTE = "A simulation: no model ran, and the times are those of a cost model."
SYSTEMS = {  # memory policy, batching
    "paged": ("paged", "continuous"),
    "Orca (Oracle)": ("orca-oracle", "continuous"),
    "Orca (Pow2)": ("orca-pow2", "continuous"),
    "Orca (Max)": ("orca-max", "continuous"),
    "FasterTransformer": ("orca-max", "static"),
}
ORCA = tuple(SYSTEMS)[1:4]


@dataclass(frozen=True)
class Case:
    """A load of the paper.

    Args:
        figure: of the paper.
        draw: returns requests for a number of them, arrivals, and whether memory is paged.
        scale: number of requests, as a multiple of what is asked for: short ones need more to queue.
        others: the systems that paged memory is compared with.
        published: system -> the paper's ratio of the rates, or its range.
        caching: whether paged memory shares prefixes between requests.
    """

    figure: str
    draw: Callable[[int, Arrivals, bool], list[Request]]
    scale: float = 1.0
    others: tuple[str, ...] = ("Orca (Oracle)",)
    published: dict[str, tuple[float, ...]] = field(default_factory=dict)
    caching: bool = False


def _alpaca(n: int = 1, beam_width: int | None = None) -> Callable[[int, Arrivals, bool], list[Request]]:
    prompt, output = exponential(19.31, most=1023), exponential(58.45, most=1023)

    def draw(count: int, arrivals: Arrivals, paged: bool) -> list[Request]:
        # Contiguous memory cannot share beams: there each is an output of its own, without the copies that
        # it would take there.
        if beam_width is not None and not paged:
            return independent(count, arrivals, prompt, output, n=beam_width)
        return independent(count, arrivals, prompt, output, n=n, beam_width=beam_width)

    return draw


def _named(name: str) -> Callable[[int, Arrivals, bool], list[Request]]:
    return lambda count, arrivals, paged: GENERATORS[name](count, arrivals)


def _translation(prefix: int) -> Callable[[int, Arrivals, bool], list[Request]]:
    """Return what draws sentences to translate after a prefix; their lengths are ours: the paper has none."""
    own: Draw = exponential(35, most=500)

    def draw(count: int, arrivals: Arrivals, paged: bool) -> list[Request]:
        return shared_prefixes(count, arrivals, lambda _: prefix, own, own)

    return draw


def _chatbot(count: int, arrivals: Arrivals, paged: bool) -> list[Request]:
    """Draw prompts most of which have 1024 tokens, to which the paper cuts a conversation (section 6.5)."""
    return independent(count, arrivals, exponential(4000, most=1024), exponential(337.99, most=1023))


CASES: dict[str, Case] = {
    "ShareGPT": Case(
        "12",
        _named("sharegpt"),
        others=(*ORCA, "FasterTransformer"),
        # Section 6.2, over OPT-13B, 66B and 175B. No figures for Pow2 are in the text.
        published={"Orca (Oracle)": (1.7, 2.7), "Orca (Max)": (2.7, 8.0), "FasterTransformer": (22.0,)},
    ),
    "Alpaca": Case(
        "12",
        _alpaca(),
        scale=5,
        others=(*ORCA, "FasterTransformer"),
        published={"Orca (Oracle)": (1.3,)},  # section 6.3, where it is compared with beam search
    ),
    **{f"Alpaca, {n} outputs": Case("14", _alpaca(n=n), scale=3) for n in (2, 4, 6)},
    **{
        f"Alpaca, {width} beams": Case(
            "14",
            _alpaca(beam_width=width),
            scale=2,
            published={"Orca (Oracle)": (2.3,)} if width == 6 else {},  # section 6.3
        )
        for width in (2, 4, 6)
    },
    # Section 6.4; the paper's model is LLaMA-13B there, which has the same shape.
    "Translation, 80 tokens shared": Case(
        "16", _translation(80), scale=4, published={"Orca (Oracle)": (1.67,)}, caching=True
    ),
    "Translation, 341 tokens shared": Case(
        "16", _translation(341), scale=4, published={"Orca (Oracle)": (3.58,)}, caching=True
    ),
    # Section 6.5: the three Orcas behave alike.
    "Chatbot": Case("17", _chatbot, others=ORCA, published=dict.fromkeys(ORCA, (2.0,))),
}


def latency(case: Case, system: str, count: int, rate: float | None) -> tuple[float, float]:
    """Return the mean normalized latency at a rate, and the requests that end per second.

    Args:
        rate: requests per second; None: all arrive at once.
    """
    policy, batching = SYSTEMS[system]
    requests = case.draw(count, Arrivals(rate or 1e9), policy == "paged")
    record = SimulatedEngine(
        SLOTS // 16,
        max_num_seqs=512,
        budget=2048,
        costs=OPT_13B_ON_A100,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=case.caching and policy == "paged",
        memory_policy=policy,
        batching=batching,
    ).replay(requests)
    mean = statistics.fmean(served.normalized_latency for served in record.served)
    return mean, count / record.seconds


def sustained(case: Case, system: str, count: int) -> tuple[float, list[tuple[float, float]]]:
    """Return the rate at which the mean normalized latency is `LATENCY`, and the points that were tried.

    Raises:
        RuntimeError: even a queue of all requests is no reason to wait, or the lowest rate is.
    """
    at_once, throughput = latency(case, system, count, None)
    if at_once <= LATENCY:
        raise RuntimeError(f"{count} requests are too few for {system} to have a queue: take more")
    # Static batches make requests wait long before the system is busy all the time.
    low, high = throughput / (30 if SYSTEMS[system][1] == "static" else 4), 2 * throughput
    points = []
    for _ in range(STEPS):
        rate = (low * high) ** 0.5
        mean, _ = latency(case, system, count, rate)
        points.append((rate, mean))
        if mean <= LATENCY:
            low = rate
        else:
            high = rate
    return (low * high) ** 0.5, sorted(points)


def _job(job: tuple[str, str, int]) -> dict[str, Any]:
    name, system, count = job
    case = CASES[name]
    rate, points = sustained(case, system, round(count * case.scale))
    return {"case": name, "figure": case.figure, "system": system, "rate": rate, "points": points}


def run(cases: Iterable[str], count: int, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield a row of each case and system, with the ratio of paged memory's rate to the system's."""
    wanted = [(name, system, count) for name in cases for system in ("paged", *CASES[name].others)]
    paged: dict[str, float] = {}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for row in pool.imap(_job, wanted, chunksize=1):
            paged.setdefault(row["case"], row["rate"])  # the first of its case
            row["ratio"] = paged[row["case"]] / row["rate"]
            row["published"] = CASES[row["case"]].published.get(row["system"], ())
            yield row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="of each run of ShareGPT (default: 1000)")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="CASE")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    if min(options.requests, options.jobs) < 1:
        parser.error("--requests and --jobs must be at least 1")
    print(NOTE)
    print(f"\n{'load':<32} {'system':<18} {'requests/s':>10} {'paged over it':>14} {'(paper)':>9}")
    rows: list[dict[str, Any]] = []
    for row in run(options.cases, options.requests, options.jobs):
        rows.append(row)
        paper = " to ".join(f"{ratio:g}" for ratio in row["published"])
        print(
            f"{row['case']:<32} {row['system']:<18} {row['rate']:>10.2f} {row['ratio']:>14.2f} {paper:>9}",
            flush=True,
        )
        if options.out:
            results = {"note": NOTE, "requests": options.requests, "latency_s": LATENCY, "rows": rows}
            common.write(options.out, "rates-simulated", common.environment(torch.device("cpu")), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
