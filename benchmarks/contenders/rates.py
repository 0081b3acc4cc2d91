"""Turn the times of contenders into rates, ratios and lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from .job import DECODE, PREFILL, Job
from .names import OURS, OURS_HTTP

Run = dict[str, Any]  # what a contender's row of the results has: name, http, rates by case, ...


def rates(job: Job, result: dict[str, Any]) -> dict[str, float]:
    """Return the tokens per second of each case's fastest run.

    Prefill's are of the prompt. Decode's time is the difference to prefill's: where the machine was so busy
    that there is none, there is no rate.
    """
    fastest = {case.name: min(result["cases"][case.name]["seconds"]) for case in job.cases}
    prefill = next((fastest[case.name] for case in job.cases if case.kind == PREFILL), 0.0)
    by_case = {}
    for case in job.cases:
        seconds, tokens = fastest[case.name], len(case.prompts) * case.tokens
        if case.kind == PREFILL:
            tokens = sum(map(len, case.prompts))
        elif case.kind == DECODE:
            seconds, tokens = seconds - prefill, tokens - len(case.prompts)
        if seconds > 0:
            by_case[case.name] = tokens / seconds
    return by_case


def medians(run: Run) -> dict[str, float]:
    """Return the median over the rounds for each case that a contender has a rate of."""
    return {case: statistics.median(values) for case, values in run["rates"].items() if values}


def compared_with(name: str, http: bool) -> str | None:
    """Return the name of ours that a contender is compared with; None for ours offline."""
    if name == OURS:
        return None
    return OURS_HTTP if http and name != OURS_HTTP else OURS


def ratio(runs: list[Run], run: Run, case: str) -> float | None:
    """Return our rate over a contender's; for ours over HTTP, its rate over that offline."""
    by_name = {each["name"]: medians(each) for each in runs}
    ours = by_name.get(compared_with(run["name"], run.get("http", False)) or "", {}).get(case)
    own = medians(run).get(case)
    if ours is None or own is None:
        return None
    return own / ours if run["name"] == OURS_HTTP else ours / own


def lines(cases: list[str], runs: list[Run]) -> Iterator[str]:
    """Yield the lines of the report: under each case a line for each contender."""
    for case in cases:
        yield f"{case}, tokens/s"
        for run in runs:
            if (rate := medians(run).get(case)) is not None:
                yield f"  {run['name']:<28} {rate:>9.1f}   {_in_words(runs, run, case)}".rstrip()
    loads = [run for run in runs if run.get("load_s")]
    if loads:
        yield "until it is loaded, or ready to serve, s"
    for run in loads:
        yield f"  {run['name']:<28} {statistics.median(run['load_s']):>9.1f}"


def _in_words(runs: list[Run], run: Run, case: str) -> str:
    value = ratio(runs, run, case)
    if value is None:
        return ""
    if run["name"] == OURS_HTTP:
        return f"{value:.2f}x of {OURS}"
    return f"{compared_with(run['name'], run.get('http', False))} is {value:.2f}x"
