"""Find the request rates that the paper's systems sustain at the same latency: Figures 12, 14, 16 and 17.

Of each system the rate is found at which the mean normalized latency is `LATENCY`; the paper compares rates
at similar latencies, where the curves rise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.simulation import Request
from benchmarks.trace_generators import GENERATORS, Draw, exponential, independent, shared_prefixes
from benchmarks.traces import Arrivals

from . import systems
from .systems import ORCA, SYSTEMS

NAME = "paper-rates"
REQUESTS = 800  # of ShareGPT; more of shorter ones
QUICK = 150
LATENCY = 0.25  # seconds per output token; a request alone takes 0.03
STEPS = 6  # of the search
CURVE = (0.2, 0.5, 0.8, 1.1)  # points of the curves of Figure 12, in multiples of the rate that was found


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
    requests = case.draw(count, Arrivals(rate or 1e9), system == "paged")
    record = systems.engine(system, enable_prefix_caching=case.caching).replay(requests)
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


def jobs(quick: bool) -> list[dict[str, Any]]:
    """Return the runs: of each case paged memory and what it is compared with."""
    cases = {"ShareGPT": CASES["ShareGPT"]} if quick else CASES
    return [
        {"case": name, "system": system, "requests": round((QUICK if quick else REQUESTS) * case.scale)}
        for name, case in cases.items()
        for system in ("paged", *case.others)
    ]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a job."""
    case, system, count = CASES[job["case"]], job["system"], job["requests"]
    rate, points = sustained(case, system, count)
    if case.figure == "12":
        points += [(rate * factor, latency(case, system, count, rate * factor)[0]) for factor in CURVE]
    return {
        **job,
        "figure": case.figure,
        "rate": rate,
        "points": sorted(points),
        "published": case.published.get(system, ()),
    }


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the JSON has, each row with the ratio of paged memory's rate to its own."""
    paged = {row["case"]: row["rate"] for row in rows if row["system"] == "paged"}
    return {
        "note": systems.NOTE,
        "requests": rows[0]["requests"],
        "latency_s": LATENCY,
        "rows": [{**row, "ratio": paged[row["case"]] / row["rate"]} for row in rows],
    }


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    return f"{row['case']}, {row['system']}: {row['rate']:.2f} requests/s at {LATENCY} s a token"
