"""The tables of docs/paper.md, from the committed results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.charts import hardware
from benchmarks.markdown import header, line
from benchmarks.policies import CLAIRVOYANT
from benchmarks.policies import KINDS as POLICY_KINDS

from .memory import KINDS

Run = dict[str, Any]


def memory_tables(run: Run, link: str) -> Iterator[str]:
    results = run["results"]
    yield (
        f"{results['note']} {results['policies'][0]['requests']:,} requests of each load, "
        f"{results['slots']:,} slots, at most {results['max_model_len']:,} tokens a sequence ({link}); the "
        "paper's figures in brackets."
    )
    yield ""
    yield from header("load", "system", *[f"{kind}, %" for kind in KINDS.values()], "running")
    for row in results["policies"]:
        used = [f"{100 * row[kind]:.1f}" for kind in KINDS]
        used[0] += _of_paper(row["published"], 100)
        running = f"{row['running']:.1f}{_of_paper(row['published_running'])}"
        yield line(row["load"], row["system"], *used, running)
    yield ""
    yield from header("load", "decoding", "outputs or beams", "memory saved by sharing, %")
    for decoding, name in (("parallel_sampling", "n"), ("beam_search", "beam_width")):
        for row in results[decoding]:
            saved = f"{100 * row['saved']:.1f}{_of_paper(row['published'], 100)}"
            yield line(row["load"], decoding.replace("_", " "), str(row[name]), saved)


def _of_paper(value: float | None, factor: float = 1) -> str:
    return "" if value is None else f" ({factor * value:.1f})"


def rates_table(run: Run, link: str) -> Iterator[str]:
    results = run["results"]
    yield (
        f"{results['note']} {results['requests']:,} requests of ShareGPT, more of shorter ones; rates at "
        f"a mean latency of {results['latency_s']} s per output token ({link}); the paper's in brackets."
    )
    yield ""
    yield from header("figure", "load", "system", "requests/s", "paged memory sustains")
    for row in results["rows"]:
        published = " to ".join(f"{ratio:g}" for ratio in row["published"])
        if row["case"] == "ShareGPT" and row["system"] == "FasterTransformer":
            published = f"up to {published}"
        ratio = f"{row['ratio']:.2f}x" + f" ({published}x)" * bool(published)
        ratio = "" if row["system"] == "paged" else ratio
        yield line(row["figure"], row["case"], row["system"], f"{row['rate']:.2f}", ratio)


def block_size_table(run: Run, link: str) -> Iterator[str]:
    rows = run["results"]["rows"]
    yield f"{run['results']['note']} Seconds per output token ({link})."
    yield ""
    sizes = list(dict.fromkeys(row["block_size"] for row in rows))
    yield from header("load", "requests/s", *[f"blocks of {size}" for size in sizes])
    for load in dict.fromkeys(row["load"] for row in rows):
        own = [row for row in rows if row["load"] == load]
        yield line(load, f"{own[0]['rate']:g}", *[f"{row['latency_s']:.3f}" for row in own])


def preemption_table(run: Run, link: str) -> Iterator[str]:
    results = run["results"]
    rows = results["rows"]
    yield (
        f"{results['note']} {rows[0]['rate']:g} requests/s of ShareGPT; a sequence of {results['tokens']} "
        f"tokens is preempted and resumed ({link})."
    )
    yield ""
    sizes = list(dict.fromkeys(row["block_size"] for row in rows))
    yield from header("", "mode", *[f"blocks of {size}" for size in sizes])
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        yield line("of a sequence, ms", mode, *[f"{1e3 * row['overhead_s']:.0f}" for row in own])
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        yield line("s per output token", mode, *[f"{row['latency_s']:.3f}" for row in own])


def allocators_table(run: Run, link: str) -> Iterator[str]:
    """Yield a line for each system: its rate and paged memory's over it, measured and predicted."""
    results = run["results"]
    load, fitted = results["load"], results["fit"]
    num_steps = len(results["step_times"]["steps"])
    yield (
        f"Measured: {results['model']} in {results['dtype']} on {hardware(run)}, "
        f"{load['num_blocks']} blocks of {results['block_size']} tokens, at most {load['max_model_len']} "
        f"tokens a sequence, {load['requests']} requests with a median of {load['prompt']:g} tokens in and "
        f"{load['output']:g} out; requests/s at {load['latency']} s per output token, means of "
        f"{results['seeds']} seeds and their range. The cost model was fitted to {num_steps} steps with a "
        f"median error of {fitted['median_error']:.0%}; from before the runs to after them "
        f"the steps' times changed by {results['drift'] - 1:+.1%} ({link})."
    )
    yield ""
    yield from header(
        "system", "requests/s, measured", "predicted", "error", "paged over it, measured", "predicted"
    )
    for row in results["systems"]:
        real, expected = row["measured"], row["predicted"]
        ratio = f"{real['paged_over_it']:.2f}x ({real['lowest_ratio']:.2f} to {real['highest_ratio']:.2f})"
        paged = row["system"] == "paged"
        yield line(
            row["system"],
            f"{real['rate']:.2f} ({real['lowest_rate']:.2f} to {real['highest_rate']:.2f})",
            f"{expected['rate']:.2f}",
            f"{row['error']:+.1%}",
            "" if paged else ratio,
            "" if paged else f"{expected['paged_over_it']:.2f}x",
        )


def policies_tables(run: Run, link: str) -> Iterator[str]:
    """Yield a table for each trace: of each kind its policies, beside the defaults of the others."""
    results = run["results"]
    yield (
        f"{results['note']} {len(results['traces'])} drawn traces, the times of OPT-13B on an A100 ({link}). "
        "The first line of each table is the default engine; each of the others changes one setting."
    )
    for trace, load in results["traces"].items():
        rows = [row for row in results["rows"] if row["trace"] == trace]
        yield ""
        yield (
            f"`{trace}`: {rows[0]['fitting']:,} requests at {load['rate']:g} {_unit(trace)}/s, "
            f"{load['blocks']:,} blocks of {load['block_size']} tokens."
        )
        yield ""
        yield from header(
            "setting",
            "policy",
            "hits, %",
            "first token, s",
            "its 99th percentile, s",
            "s per output token",
            "tokens/s",
            "preempted",
        )
        for row in rows:
            default = row is rows[0]
            yield line(
                "defaults" if default else f"`{POLICY_KINDS[row['kind']].setting}`",
                "" if default else _policy(row["policy"]),
                f"{100 * row['hit_rate']:.1f}",
                f"{row['ttft_median_s']:.2f}",
                f"{row['ttft_p99_s']:.2f}",
                f"{row['normalized_latency_s']:.4f}",
                f"{row['queued_tokens_per_s']:,.0f}",
                f"{row['preemptions']:,}",
            )


def _unit(trace: str) -> str:
    return "sessions" if trace in ("chat", "mooncake-conversation") else "requests"


def _policy(name: str) -> str:
    return name if name == CLAIRVOYANT else f"`{name}`"


def capacity_table(run: Run, link: str) -> Iterator[str]:
    """Yield a line for each configuration that was tried, with what it serves."""
    results = run["results"]
    limits = " and ".join(f"{name} {limit:g} s" for name, limit in results["slo"].items())
    yield (
        f"{results['note']} `{results['trace']}`, {results['requests']:,} requests, {results['model']}; "
        f"limits that {results['attainment']:.0%} of the requests are within: {limits} ({link})."
    )
    yield ""
    names = list(results["best"]["configuration"])
    yield from header(*(f"`{name}`" for name in names), "requests/s")
    for row in results["rows"]:
        best = "**" if row["configuration"] == results["best"]["configuration"] else ""
        settings = [f"{best}{row['configuration'][name]}{best}" for name in names]
        yield line(*settings, f"{best}{row['rate']:.2f}{best}")
