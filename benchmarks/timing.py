"""Measure median times of calls: on a GPU with events around replays of a CUDA graph, on a CPU by clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Run = Callable[[], object]

REPLAY_S = 2e-3  # approximate duration of a graph, so that the gap between replays is negligible
MAX_CALLS = 512  # maximum number of calls in a graph, unless there are more sets
SAMPLES = (5, 50)  # minimum and maximum number of samples, whatever the budget


@dataclass(frozen=True)
class Timing:
    """The time of a call."""

    median_s: float
    spread: float  # interquartile range over the median
    method: str  # "graph", "events" or "clock"


class Timer:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, runs: Sequence[Run], budget_s: float, *, graph: bool = True) -> Timing:
        """Return the time of one of ``runs``, which are called in turn.

        Args:
            runs: calls that do the same work on different memory, together several times the L2 cache.
            budget_s: seconds to sample, within `SAMPLES`.
            graph: whether to capture the calls in a CUDA graph; if not, or if capturing fails, the time
                includes the host's time between launches.
        """
        for run in runs:  # compiles, loads, and fills the allocator's pools
            run()
        if self.device.type == "cpu":
            return _timing(list(self._sample(lambda: _clocked(runs), budget_s)), "clock")
        torch.cuda.synchronize(self.device)
        if graph:
            once = max(_evented(runs), 1e-7)
            calls = min(max(REPLAY_S / once, len(runs)), max(MAX_CALLS, len(runs)))
            rounds = max(1, math.floor(calls / len(runs)))
            if (captured := _capture(list(runs) * rounds)) is not None:
                count = rounds * len(runs)
                captured.replay()
                samples = self._sample(lambda: _evented([captured.replay]) / count, budget_s)
                timing = _timing(list(samples), "graph")
                captured.reset()
                return timing
        return _timing(list(self._sample(lambda: _evented(runs), budget_s)), "events")

    def _sample(self, measure: Callable[[], float], budget_s: float) -> Iterator[float]:
        min_samples, max_samples = SAMPLES
        end = time.perf_counter() + budget_s
        for i in range(max_samples):
            if i >= min_samples and time.perf_counter() > end:
                return
            yield measure()


def _timing(samples: list[float], method: str) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, (high - low) / median if median else 0.0, method)


def _clocked(runs: Sequence[Run]) -> float:
    start = time.perf_counter()
    for run in runs:
        run()
    return (time.perf_counter() - start) / len(runs)


def _evented(runs: Sequence[Run]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for run in runs:
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / len(runs)


def _capture(runs: Sequence[Run]) -> torch.cuda.CUDAGraph | None:
    """Capture the calls in a graph; return None if one cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for run in runs:
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


@contextmanager
def host_clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function for the seconds since the block began; the device is idle at its beginning and end."""
    synchronize(device)
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start
    synchronize(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def l2_bytes(device: torch.device) -> int:
    """Return the size of the GPU's L2 cache; 0 on a CPU, where calls do not rotate over sets."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
