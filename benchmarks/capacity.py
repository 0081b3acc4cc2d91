"""Find how many requests a second a configuration serves within limits of latency, and which does best.

    python benchmarks/capacity.py --trace sharegpt --model llama-3-8b --device h100 --slo ttft=1s,tpot=50ms

TRACE is a file (`traces.py` lists the formats) or the name of a drawn trace (`trace_generators.py`). MODEL is
a name (`roofline.py`) or a directory with a config.json. DEVICE is a name, whose step times are estimated
from its peaks (`roofline.py`), or a file of step times, which `step_times.py` measures on any device; it
needs --slots then, the number of tokens that its KV cache holds. The limits hold if --attainment of all
requests are within all of them: `ttft`, the time to the first token; `tpot`, the time of each token after it;
and `latency`, the whole time over the number of output tokens.

A simulation with the scheduler and block manager that serve. The rate is found by bisection. Of each setting
in turn the best value is kept, from the defaults on.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks import cost_model, roofline, trace_generators, traces
from benchmarks.cost_model import BLOCK_TOKENS, Costs
from benchmarks.simulation import Request, Served, SimulatedEngine
from benchmarks.trace_generators import GENERATORS
from benchmarks.traces import Arrivals

LIMITS: dict[str, Callable[[Served], float]] = {
    "ttft": lambda served: served.time_to_first_token,
    "tpot": lambda served: served.time_per_output_token,
    "latency": lambda served: served.normalized_latency,
}
UNITS = {"s": 1.0, "ms": 1e-3}
CACHE_BYTES = {"auto": 2.0, "fp8": 1.0}  # of an element
STEPS = 7  # of a bisection
NOTE = "A simulation: no model ran, and the times are those of a cost model."
Slo = dict[str, float]


@dataclass(frozen=True)
class Configuration:
    """The settings that are searched, under the engine's names."""

    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    swap_space: float = 0.0  # GiB; more than none: preempted requests are swapped out
    kv_cache_dtype: str = "auto"


CHOICES: dict[str, Sequence[Any]] = {
    "kv_cache_dtype": ("auto", "fp8"),
    "max_num_seqs": (64, 128, 256, 512),
    "max_num_batched_tokens": (512, 1024, 2048, 4096),
    "block_size": (8, 16, 32, 64, 128),
    "swap_space": (0.0, 4.0, 16.0),
}


def parse_slo(text: str) -> Slo:
    """Return the limits in seconds.

    Raises:
        ValueError: the text has none, or something else.
    """
    slo: Slo = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+\.?\d*)\s*(ms|s)\s*", part)
        if match is None or match[1] not in LIMITS or not float(match[2]):
            raise ValueError(
                f"--slo {part.strip()!r} is not a limit: write {' or '.join(LIMITS)}, =, a positive number "
                "and s or ms, for example ttft=1s,tpot=50ms"
            )
        slo[match[1]] = float(match[2]) * UNITS[match[3]]
    return slo


@dataclass(frozen=True)
class Hardware:
    """A model on a device.

    Args:
        device: None: it was measured.
        measured: the fitted cost model, of blocks of 16 tokens and a 16-bit cache.
        slots: of a 16-bit cache, if measured.
    """

    model: roofline.Shape
    device: roofline.Device | None
    measured: Costs | None = None
    slots: int = 0

    def slots_of(self, configuration: Configuration) -> int:
        """Return the number of tokens that the KV cache holds."""
        value_bytes = CACHE_BYTES[configuration.kv_cache_dtype]
        if self.device is None:
            return int(self.slots * CACHE_BYTES["auto"] / value_bytes)
        return roofline.num_slots(self.model, self.device, value_bytes)

    def costs_of(self, configuration: Configuration) -> Costs:
        """Return the cost model under a configuration."""
        size, value_bytes = configuration.block_size, CACHE_BYTES[configuration.kv_cache_dtype]
        if self.device is not None:
            return roofline.costs(self.model, self.device, size, value_bytes)
        assert self.measured is not None
        smaller = value_bytes / CACHE_BYTES["auto"]
        per_block = (1 + BLOCK_TOKENS / size) / (1 + BLOCK_TOKENS / 16)
        return replace(
            self.measured,
            context_token=self.measured.context_token * smaller * per_block,
            moved_block=self.measured.moved_block * smaller * size / 16,
        )

    def engine(self, configuration: Configuration, max_model_len: int) -> SimulatedEngine:
        """Return a simulated engine."""
        size = configuration.block_size
        value_bytes = CACHE_BYTES[configuration.kv_cache_dtype]
        block_bytes = size * value_bytes * self.model.values_per_token
        return SimulatedEngine(
            self.slots_of(configuration) // size,
            "swap" if configuration.swap_space else "recompute",
            num_cpu_blocks=int(configuration.swap_space * 2**30 / block_bytes),
            block_size=size,
            max_num_seqs=configuration.max_num_seqs,
            budget=max(configuration.max_num_batched_tokens, configuration.max_num_seqs),
            costs=self.costs_of(configuration),
            max_model_len=max_model_len,
        )


class Trace:
    """A trace that can be had at any rate.

    Args:
        source: a file, or the name of a drawn trace.
        format: of the file; None: by its beginning.
        count: number of requests.

    Raises:
        ValueError, OSError: it cannot be read or drawn.
    """

    def __init__(self, source: str, format: str | None, count: int, burstiness: float, seed: int) -> None:
        self._source, self._count, self._burstiness, self._seed = source, count, burstiness, seed
        self._requests: list[Request] = []
        if source not in GENERATORS:
            if not Path(source).is_file():
                raise ValueError(
                    f"--trace {source}: no such file, and no drawn trace: {', '.join(GENERATORS)}"
                )
            self._requests = traces.read(Path(source), format, count)

    def at(self, rate: float) -> list[Request]:
        """Return the requests at a rate of requests per second; of sessions, that of their beginnings."""
        arrivals = Arrivals(rate, self._burstiness)
        if self._source in GENERATORS:
            return trace_generators.generate(self._source, self._count, arrivals, self._seed)
        if any(request.time for request in self._requests):
            return traces.scaled(self._requests, rate)
        return traces.spread(self._requests, arrivals, self._seed)


@dataclass(frozen=True)
class Point:
    """The outcome of a replay: share of requests within the limits, and percentiles of what is limited."""

    rate: float
    attained: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class Question:
    """The trace, the limits and the hardware that configurations are compared on."""

    trace: Trace
    slo: Slo
    attainment: float
    hardware: Hardware

    def point(self, configuration: Configuration, rate: float) -> Point:
        """Replay the trace at a rate."""
        requests = self.trace.at(rate)
        longest = max(len(request.prompt) + request.num_tokens for request in requests)
        served = self.hardware.engine(configuration, longest + 1).replay(requests).served
        within = [all(LIMITS[name](each) <= limit for name, limit in self.slo.items()) for each in served]
        percentiles = {
            name: sorted(map(LIMITS[name], served))[min(len(served) - 1, int(self.attainment * len(served)))]
            for name in self.slo
        }
        return Point(rate, statistics.fmean(within), percentiles)

    def capacity(self, configuration: Configuration) -> tuple[float, list[Point]]:
        """Return the highest rate within the limits, and the points that were tried; 0 where none is.

        Raises:
            ValueError: the requests are within the limits even if they come all at once.
        """
        points: list[Point] = []

        def holds(rate: float) -> bool:
            points.append(self.point(configuration, rate))
            return points[-1].attained >= self.attainment

        low, high = 0.0, 1.0
        while holds(high):
            low, high = high, 4 * high
            if high > 1e4:
                raise ValueError(
                    "all requests at once are within the limits: take more --requests, so that there is a "
                    "queue"
                )
        if not low:
            while high > 1e-3 and not holds(high / 4):
                high /= 4
            low = high / 4
            if points[-1].attained < self.attainment:
                return 0.0, points
        for _ in range(STEPS):
            middle = sqrt(low * high)
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low, points


def search(
    question: Question, start: Configuration
) -> Iterator[tuple[str, Configuration, float, list[Point]]]:
    """Yield what was changed, a configuration, its capacity and its points; the first is where it starts.

    Of each setting in turn all values are tried beside the best ones of those before.
    """

    @cache
    def capacity(configuration: Configuration) -> tuple[float, list[Point]]:
        return question.capacity(configuration)

    best, highest = start, capacity(start)[0]
    yield "", start, *capacity(start)
    for name, values in CHOICES.items():
        candidates = [replace(best, **{name: value}) for value in values]
        for candidate in candidates:
            if candidate != best:
                yield name, candidate, *capacity(candidate)
        for candidate in candidates:
            if capacity(candidate)[0] > 1.01 * highest:  # less is no reason to change a setting
                best, highest = candidate, capacity(candidate)[0]


def draw(results: dict[str, Any], target: Path) -> Path:
    """Draw the limited latencies against the rate, of the defaults and the best, and return the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    slo = results["slo"]
    figure, axes = pyplot.subplots(1, len(slo), figsize=(5 * len(slo), 3.6), squeeze=False)
    for place, (name, limit) in zip(axes[0], slo.items()):
        for label, row in (("defaults", results["rows"][0]), ("best", results["best"])):
            points = sorted((point["rate"], point["percentiles"][name]) for point in row["points"])
            place.plot(*zip(*points), marker=".", label=f"{label}: {row['rate']:.2f} requests/s")
        place.axhline(limit, color="grey", linewidth=0.8, linestyle="--")
        share = f"{100 * results['attainment']:.0f}% of requests"
        place.set(title=f"{name} of {share} (simulated)", xlabel="requests per second", ylabel="seconds")
        place.set(xscale="log", yscale="log")
        place.grid(alpha=0.3)
        place.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return target


def _parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, Question]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", required=True, help=f"a file, or one of {', '.join(GENERATORS)}")
    parser.add_argument("--format", choices=tuple(traces.READERS), help="default: by the file's beginning")
    parser.add_argument("--model", required=True, help=f"{', '.join(roofline.MODELS)}, or a directory")
    parser.add_argument("--device", required=True, help=f"{', '.join(roofline.DEVICES)}, or step times")
    parser.add_argument("--slots", type=int, help="tokens that the KV cache holds, with measured step times")
    parser.add_argument("--slo", default="ttft=1s,tpot=50ms", help="default: ttft=1s,tpot=50ms")
    parser.add_argument("--attainment", type=float, default=0.9, help="share within them (default: 0.9)")
    parser.add_argument("--requests", type=int, default=300, help="of the trace (default: 300)")
    parser.add_argument("--burstiness", type=float, default=1.0, help="of arrivals (default: 1, Poisson)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory for the JSON and the plot")
    options = parser.parse_args(arguments)
    if options.requests < 1 or not 0 < options.attainment <= 1:
        parser.error("--requests must be at least 1, and --attainment in (0, 1]")
    try:
        slo = parse_slo(options.slo)
        hardware = _hardware(options)
        trace = Trace(options.trace, options.format, options.requests, options.burstiness, options.seed)
        longest = max(len(request.prompt) + request.num_tokens for request in trace.at(1.0))
        slots = hardware.slots_of(Configuration())
        if longest >= slots:
            raise ValueError(f"a request has {longest} tokens, and the KV cache holds {slots}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options, Question(trace, slo, options.attainment, hardware)


def _hardware(options: argparse.Namespace) -> Hardware:
    model = roofline.shape(options.model)
    if options.device in roofline.DEVICES:
        hardware = Hardware(model, roofline.DEVICES[options.device])
        hardware.slots_of(Configuration())  # the weights fit
        return hardware
    if not Path(options.device).is_file():
        raise ValueError(
            f"--device {options.device}: no device of this name ({', '.join(roofline.DEVICES)}), nor a file "
            "of step times"
        )
    if not options.slots or options.slots < 1:
        raise ValueError("--slots must say how many tokens the KV cache holds, as --device is a file")
    return Hardware(model, None, cost_model.read(Path(options.device)).costs, options.slots)


def main(arguments: list[str] | None = None) -> int:
    options, question = _parsed(arguments)
    print(NOTE)
    print(f"{'requests/s':>10}  configuration", flush=True)
    rows: list[dict[str, Any]] = []
    try:
        for changed, configuration, rate, points in search(question, Configuration()):
            settings = asdict(configuration)
            tried = [asdict(point) for point in points]
            rows.append({"changed": changed, "configuration": settings, "rate": rate, "points": tried})
            shown = " ".join(f"{name}={value}" for name, value in settings.items())
            print(f"{rate:>10.2f}  {shown}", flush=True)
    except ValueError as error:
        print(f"capacity.py: {error}", file=sys.stderr)
        return 2
    best = max(rows, key=lambda row: row["rate"])
    if not best["rate"]:
        print("no configuration is within the limits at any rate: allow more time")
        return 1
    shown = " ".join(f"{name}={value}" for name, value in best["configuration"].items())
    print(f"best: {best['rate']:.2f} requests/s with {shown}; the defaults {rows[0]['rate']:.2f}")
    if options.out:
        name = f"capacity-{Path(options.trace).stem}"
        results = {
            "note": NOTE,
            **{key: getattr(options, key) for key in ("trace", "model", "device", "requests", "attainment")},
            "slo": question.slo,
            "rows": rows,
            "best": best,
        }
        path = common.write(options.out, name, common.environment(torch.device("cpu")), results)
        print(path, draw(results, path.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
