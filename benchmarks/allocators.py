"""Compare paged memory with contiguous reservations on the real engine, and with what the simulator predicts.

    python benchmarks/allocators.py [--quick] [--seeds 5] [--requests 36] [--out DIR]

The engine runs the demo model in a pool so small that memory limits how many requests run at once. Requests
arrive at random at a rate, in real time; the rate is measured at which the mean normalized latency (of a
request: its latency over its number of output tokens) is `--latency`, as the paper compares systems. The
simulator gets the times of this machine's steps, which are measured before and after, and the same requests.
Of each system and seed the predicted rate is run first, and then lower or higher ones until the latency is
between two of them. A machine that does something else meanwhile makes all of it worthless: "drift" is the
median ratio of a step's time after all runs to that before.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks import step_times
from benchmarks.cost_model import Costs, fit
from benchmarks.evaluation.systems import SYSTEMS
from benchmarks.simulation import Request, SimulatedEngine
from benchmarks.trace_generators import independent, lognormal
from benchmarks.traces import Arrivals
from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.llm_engine import LLMEngine

BLOCK_SIZE = 16
BUDGET = 256  # tokens in a step
MOST_SEQS = 32
FACTOR = 1.2  # from a rate to the next one that is run
MOST_RUNS = 3  # of a system and seed
SEARCH_STEPS = 12  # of the simulated search for a rate
Point = tuple[float, float]  # requests per second, mean normalized latency


@dataclass(frozen=True)
class Load:
    """The memory and the requests.

    Args:
        num_blocks: number of blocks of the pool.
        max_model_len: maximum number of tokens of a sequence, which "Orca (Max)" reserves.
        prompt, output: medians of the lengths, which are log-normal.
        requests: number of requests of a run.
        latency: seconds per output token at which rates are compared.
    """

    num_blocks: int = 32
    max_model_len: int = 256
    prompt: float = 16
    output: float = 32
    requests: int = 36
    latency: float = 0.05

    def draw(self, rate: float, seed: int) -> list[Request]:
        """Return requests; at every rate the same ones, at times in proportion."""
        half = self.max_model_len // 2
        prompt, output = lognormal(self.prompt, 0.7, half), lognormal(self.output, 0.7, half)
        return independent(self.requests, Arrivals(rate), prompt, output, seed)

    def settings(self, system: str) -> dict[str, Any]:
        """Return the settings of a system that the engine and the simulator share."""
        policy, batching = SYSTEMS[system]
        return {"memory_policy": policy, "batching": batching, "enable_prefix_caching": False}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: seconds per output token, output tokens per second, mean number of requests."""

    latency_s: float
    tokens_per_s: float
    running: float


def _outcome(requests: Sequence[Request], latencies: Sequence[float], seconds: float) -> Outcome:
    """Return the outcome of requests that took so long each, and all together.

    The mean number of requests in the system is by Little's law their latencies over the time.
    """
    tokens = [request.num_tokens for request in requests]
    return Outcome(
        statistics.fmean(latency / count for latency, count in zip(latencies, tokens)),
        sum(tokens) / seconds,
        sum(latencies) / seconds,
    )


def simulated(load: Load, system: str, costs: Costs, rate: float, seed: int) -> Outcome:
    """Predict a run."""
    engine = SimulatedEngine(
        load.num_blocks,
        num_cpu_blocks=0,
        block_size=BLOCK_SIZE,
        max_num_seqs=MOST_SEQS,
        budget=BUDGET,
        costs=costs,
        max_model_len=load.max_model_len,
        **load.settings(system),
    )
    record = engine.replay(load.draw(rate, seed))
    served = [each.request for each in record.served]
    return _outcome(served, [each.latency for each in record.served], record.seconds)


def real_engine(load: Load, system: str) -> LLMEngine:
    """Return an engine with the demo model, warmed up."""
    engine = LLMEngine(
        None,
        EngineConfig(
            block_size=BLOCK_SIZE,
            device="cpu",
            dtype="bfloat16",
            num_gpu_blocks_override=load.num_blocks,
            max_model_len=load.max_model_len,
            max_num_seqs=MOST_SEQS,
            max_num_batched_tokens=BUDGET,
            **load.settings(system),
        ),
    )
    engine.warm_up()
    requests = [Request(0.0, range(16), 4) for _ in range(8)]
    measured(engine, requests, prompts(requests, seed=0))
    return engine


def prompts(requests: Sequence[Request], seed: int) -> list[list[int]]:
    """Draw tokens of the demo model's vocabulary for the prompts of requests."""
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40_000) for _ in request.prompt] for request in requests]


def measured(engine: LLMEngine, requests: Sequence[Request], prompts: Sequence[list[int]]) -> Outcome:
    """Serve requests in real time."""
    ended: dict[int, float] = {}
    added = 0
    started = time.perf_counter()
    while len(ended) < len(requests):
        now = time.perf_counter() - started
        while added < len(requests) and requests[added].time <= now:
            params = SamplingParams(temperature=0.0, max_tokens=requests[added].num_tokens, ignore_eos=True)
            engine.add_request(str(added), {"prompt_token_ids": prompts[added]}, params)
            added += 1
        if not engine.has_unfinished():
            time.sleep(max(0.0, started + requests[added].time - time.perf_counter()))
            continue
        for output in engine.step():
            if output.finished:
                ended[int(output.request_id)] = time.perf_counter() - started
    latencies = [ended[i] - request.time for i, request in enumerate(requests)]
    return _outcome(requests, latencies, max(ended.values()))


def predicted_rate(load: Load, latency: Callable[[float], float]) -> float:
    """Return the rate at which a simulated latency is the load's.

    Raises:
        ValueError: the latency is higher at any rate, or lower.
    """
    low, high = 1e-2, 1e3
    if not latency(low) < load.latency < latency(high):
        raise ValueError(
            f"a latency of {load.latency} s a token is below that of a request alone, {latency(low):.3f}, or "
            f"not reached with all {load.requests} requests at once, {latency(high):.3f}"
        )
    for _ in range(SEARCH_STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if latency(middle) < load.latency else (low, middle)
    return math.sqrt(low * high)


def rate_at(points: Sequence[Point], latency: float) -> float:
    """Return the rate of a latency, on the line through the two points around it in logarithms.

    If all points are on one side of it, the two that are nearest to it are taken.
    """
    points = sorted(points, key=lambda point: abs(math.log(point[1] / latency)))
    below = [point for point in points if point[1] < latency]
    above = [point for point in points if point[1] >= latency]
    (rate, found), (other, far) = (below[0], above[0]) if below and above else points[:2]
    if far == found:
        return math.sqrt(rate * other)
    slope = math.log(other / rate) / math.log(far / found)
    return rate * math.exp(slope * math.log(latency / found))


def rates_to_run(predicted: float, latency: float, points: list[Point]) -> Iterator[float]:
    """Yield rates until the latency is between those of two of them; the caller appends to ``points``."""
    rate = predicted
    for _ in range(MOST_RUNS):
        yield rate
        too_slow = [found >= latency for _, found in points]
        if len(set(too_slow)) > 1:
            return
        rate = rate / FACTOR if too_slow[0] else rate * FACTOR


def sustained(load: Load, system: str, costs: Costs, seed: int) -> float:
    """Return the rate at which the simulated latency is the load's."""
    return predicted_rate(load, lambda rate: simulated(load, system, costs, rate, seed).latency_s)


def compare(load: Load, systems: Sequence[str], seeds: int, costs: Costs) -> Iterator[dict[str, Any]]:
    """Yield a measured row of each seed and system; the systems take turns.

    Args:
        costs: a cost model, which tells where to begin.
    """
    engines = {system: real_engine(load, system) for system in systems}
    for seed in range(seeds):
        for system, engine in engines.items():
            points: list[Point] = []
            runs = []
            for rate in rates_to_run(sustained(load, system, costs, seed), load.latency, points):
                requests = load.draw(rate, seed)
                real = measured(engine, requests, prompts(requests, seed))
                points.append((rate, real.latency_s))
                runs.append({"rate": rate, "measured": asdict(real)})
            rate = rate_at(points, load.latency)
            yield {"system": system, "seed": seed, "measured_rate": rate, "runs": runs}


def predict(load: Load, row: dict[str, Any], costs: Costs) -> dict[str, Any]:
    """Return a measured row with what the simulator predicts of it."""
    system, seed = row["system"], row["seed"]
    runs = [
        {**run, "predicted": asdict(simulated(load, system, costs, run["rate"], seed))} for run in row["runs"]
    ]
    return {**row, "predicted_rate": sustained(load, system, costs, seed), "runs": runs}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row of each system: means over the seeds, the range, and paged memory's rate over its own.

    Ratios are of the same seed, so that a seed with more to do counts for both.
    """
    paged = {row["seed"]: row for row in rows if row["system"] == "paged"}
    found = []
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        line: dict[str, Any] = {"system": system}
        for kind in ("measured", "predicted"):
            rates = [row[f"{kind}_rate"] for row in own]
            ratios = [paged[row["seed"]][f"{kind}_rate"] / row[f"{kind}_rate"] for row in own]
            line[kind] = {
                "rate": statistics.fmean(rates),
                "lowest_rate": min(rates),
                "highest_rate": max(rates),
                "paged_over_it": statistics.geometric_mean(ratios),
                "lowest_ratio": min(ratios),
                "highest_ratio": max(ratios),
            }
        line["error"] = line["predicted"]["rate"] / line["measured"]["rate"] - 1
        runs = [run for row in own for run in row["runs"]]
        line["tokens_per_s"] = statistics.fmean(row["runs"][0]["measured"]["tokens_per_s"] for row in own)
        line["throughput_errors"] = [
            run["predicted"]["tokens_per_s"] / run["measured"]["tokens_per_s"] - 1 for run in runs
        ]
        found.append(line)
    return found


def _step_engine(load: Load, steps: list[step_times.Step]) -> LLMEngine:
    """Return an engine whose pool holds each of the steps."""
    return LLMEngine(
        None,
        EngineConfig(
            block_size=BLOCK_SIZE,
            device="cpu",
            dtype="bfloat16",
            num_gpu_blocks_override=step_times.blocks_needed(steps, BLOCK_SIZE),
            max_model_len=load.max_model_len,
            max_num_seqs=MOST_SEQS + 1,
            preemption_mode="swap",
        ),
    )


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that it runs")
    parser.add_argument("--seeds", type=int, default=5, help="runs with different requests (default: 5)")
    parser.add_argument("--requests", type=int, default=Load.requests, help="of a run (default: 36)")
    parser.add_argument(
        "--latency", type=float, default=Load.latency, help="s per output token (default: 0.05)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.requests, options.threads) < 1 or options.latency <= 0:
        parser.error("--seeds, --requests, --threads and --latency must be positive")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = _parsed(arguments)
    torch.set_num_threads(options.threads)
    load = Load(requests=options.requests, latency=options.latency)
    systems, seeds, seqs, rounds = list(SYSTEMS), options.seeds, [1, 2, 4, 8, 12, 16], 15
    if options.quick:
        load = Load(num_blocks=8, max_model_len=64, output=8, requests=12, latency=0.05)
        systems, seeds, seqs, rounds = ["paged", "FasterTransformer"], 1, [1, 8], 1
    steps = step_times.grid(load.max_model_len // 2, tuple(seqs), (8, 16, 64))
    engine = _step_engine(load, steps)
    times = step_times.results(engine, steps, rounds)
    first = fit(times["steps"])
    print(f"{'seed':>4} {'system':<18} {'requests/s':>10}", flush=True)
    measured_rows = []
    for row in compare(load, systems, seeds, first.costs):
        measured_rows.append(row)
        print(f"{row['seed']:>4} {row['system']:<18} {row['measured_rate']:>10.2f}", flush=True)
    after = step_times.results(engine, steps, rounds)["steps"]
    drift = statistics.median(late["ms"] / row["ms"] for late, row in zip(after, times["steps"]))
    fitted = fit([*times["steps"], *after])
    rows = [predict(load, row, fitted.costs) for row in measured_rows]
    print(f"error of the fit to steps: median {fitted.median_error:.1%}, largest {fitted.largest_error:.1%}")
    print(f"drift of the steps' times: {drift - 1:+.1%}")
    decoding = [row["first_ms"] / row["ms"] for row in times["steps"] if not row["prefill_tokens"]]
    print(f"decoding after another step takes {statistics.median(decoding):.2f} times as long as in a row")
    means = summary(rows)
    print(f"{'system':<18} {'requests/s':>10} {'predicted':>9} {'error':>7} {'paged over it':>14} predicted")
    for line in means:
        real, expected = line["measured"], line["predicted"]
        print(
            f"{line['system']:<18} {real['rate']:>10.2f} {expected['rate']:>9.2f} {line['error']:>7.1%} "
            f"{real['paged_over_it']:>13.2f}x {expected['paged_over_it']:>8.2f}x"
        )
    if options.out:
        device = torch.device("cpu")
        results = {
            "model": times["model"],
            "dtype": "bfloat16",
            "block_size": BLOCK_SIZE,
            "load": asdict(load),
            "seeds": seeds,
            "step_times": times,
            "step_times_after": after,
            "drift": drift,
            "fit": asdict(fitted),
            "systems": means,
            "rows": rows,
        }
        print(
            common.write(
                options.out, common.result_name("allocators", device), common.environment(device), results
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
