"""Simulate what the KV cache is used for, how many requests run, and what sharing saves: Figures 2, 13, 15.

The use of memory is a mean over time while requests wait. "running" is the mean number of running requests at
the paper's request rate. What sequences of a request save by sharing: samples share the prompt, beams all
tokens before they diverge. Beams fork where the simulated model hesitates, at every second token; if at every
token, they save up to 5 points more; if at every tenth, 3 to 14 points less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.memory_use import memory_use
from benchmarks.simulation import Record, Request
from benchmarks.trace_generators import GENERATORS
from benchmarks.traces import Arrivals
from cupaged.engine.scheduling.request import Sequence, SequenceGroup

from . import systems
from .systems import SYSTEMS

NAME = "paper-memory"
REQUESTS = 1500  # of each run
QUICK = 300  # likewise: fewer of Alpaca fit all at once
KINDS = {  # what a slot is used for, as `MemoryUse` names it and in words
    "stored": "tokens",
    "reserved": "reserved for later tokens",
    "internal": "never used",
    "external": "between reservations",
}
WIDTHS = (2, 4, 6)
AT_ONCE = 1e9  # requests per second


@dataclass(frozen=True)
class Load:
    """A load of the paper, and its results.

    Args:
        trace: name of the drawn trace.
        rate: requests per second at which the paper counts running requests.
        used: the paper's share of the memory that holds tokens, by system.
        running: the paper's mean number of running requests, by system.
        saved: the paper's share of memory saved by sharing, by kind and number of sequences.
    """

    trace: str
    rate: float
    used: dict[str, float]
    running: dict[str, float]
    saved: dict[str, dict[int, float]]


LOADS = {
    "ShareGPT": Load(
        "sharegpt",
        2,
        {"Orca (Max)": 0.204, "Orca (Pow2)": 0.268, "Orca (Oracle)": 0.382, "paged": 0.963},
        {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "paged": 30.42},
        {"n": {2: 0.162, 6: 0.305}, "beam_width": {2: 0.443, 6: 0.663}},
    ),
    "Alpaca": Load(
        "alpaca",
        30,
        {},
        {"Orca (Max)": 7.00, "Orca (Pow2)": 43.24, "Orca (Oracle)": 72.75, "paged": 132.44},
        {
            "n": {2: 0.0609, 4: 0.0853, 6: 0.0979},
            "beam_width": {2: 0.376, 4: 0.531, 6: 0.552},
        },
    ),
}


def requests(load: Load, count: int, rate: float = AT_ONCE, **width: int) -> list[Request]:
    """Draw requests, all with the ``n`` or ``beam_width`` in ``width``."""
    return GENERATORS[load.trace](count, Arrivals(rate), **width)


def use(load: Load, system: str, count: int, **width: int) -> dict[str, float]:
    """Return means over time while requests wait: shares of the memory in use by kind, and saved by sharing.

    Also returns the number of requests that finish per second.
    """
    simulated = systems.engine(system)
    contiguous = SYSTEMS[system][0] != "paged"
    totals = dict.fromkeys((*KINDS, "saved", "seconds"), 0.0)

    def observe(trace: Record, seconds: float) -> None:
        if trace.num_steps % 10 or not simulated.scheduler.waiting:
            return
        found = memory_use(simulated.blocks, simulated.scheduler.running, tokens_at_end, contiguous)
        for kind in KINDS:
            totals[kind] += seconds * getattr(found, kind) / (found.allocated + found.external)
        totals["saved"] += seconds * found.saved_by_sharing
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
    """Return the number of tokens that are stored when a sequence ends, at its maximum length."""
    return group.prompt_len + group.max_tokens - 1


def running(load: Load, system: str, count: int) -> float:
    """Return the mean number of running requests at the load's rate, from the first fifth of arrivals on."""
    simulated, arriving = systems.engine(system), requests(load, count, load.rate)
    begin, end = arriving[count // 5].time, arriving[-1].time
    request_seconds = observed_seconds = 0.0

    def observe(trace: Record, seconds: float) -> None:
        nonlocal request_seconds, observed_seconds
        if begin <= trace.seconds <= end:
            request_seconds += seconds * len(simulated.scheduler.running)
            observed_seconds += seconds

    simulated.replay(arriving, observe=observe)
    return request_seconds / observed_seconds


def jobs(quick: bool) -> list[dict[str, Any]]:
    """Return the runs: of each load and system, and of each number of sequences of a request."""
    count = QUICK if quick else REQUESTS
    loads = ["ShareGPT"] if quick else list(LOADS)
    found: list[dict[str, Any]] = [
        {"load": load, "system": system, "requests": count}
        for load in loads
        for system in reversed(SYSTEMS)  # in the order of the paper's figures
    ]
    widths = [
        {"load": load, "requests": count, decoding: width}
        for decoding in ("n", "beam_width")
        for load in loads
        for width in (WIDTHS[:1] if quick else WIDTHS)
    ]
    return found + widths


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a job."""
    load, count = LOADS[job["load"]], job["requests"]
    if "system" not in job:
        kind = "n" if "n" in job else "beam_width"
        found = use(load, "paged", count, **{kind: job[kind]})
        return {**job, "saved": found["saved"], "published": load.saved[kind].get(job[kind])}
    system = job["system"]
    row = {**job, **use(load, system, count), "running": running(load, system, count)}
    del row["saved"]
    return {
        **row,
        "published": load.used.get(system),
        "published_running": load.running.get(system),
    }


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the JSON has."""
    return {
        "note": f"{systems.NOTE} The memory is as it was planned.",
        "slots": systems.SLOTS,
        "max_model_len": systems.MAX_MODEL_LEN,
        "policies": [row for row in rows if "system" in row],
        "parallel_sampling": [row for row in rows if "n" in row],
        "beam_search": [row for row in rows if "beam_width" in row],
    }


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    if "system" not in row:
        width = f"{row['n']} outputs" if "n" in row else f"{row['beam_width']} beams"
        paper = _of_paper(row["published"], 100, "%")
        return f"{row['load']}, {width}: {100 * row['saved']:.1f}% saved by sharing{paper}"
    shares = ", ".join(f"{kind} {100 * row[kind]:.1f}%" for kind in KINDS)
    paper = _of_paper(row["published"], 100, "%")
    running = f"{row['running']:.1f} running{_of_paper(row['published_running'], 1, '')}"
    return f"{row['load']}, {row['system']}: {shares}{paper}, {running}"


def _of_paper(value: float | None, factor: float, unit: str) -> str:
    return "" if value is None else f" (paper {factor * value:.1f}{unit})"
