"""Log load and cache usage every few seconds, while there is load."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..outputs import EngineStats

_log = logging.getLogger("cupaged.load")


class LoadLog:
    """Log the engine's load since the last log line.

    Args:
        stats: returns the engine's current statistics.
        interval: seconds between log lines.
        clock: returns a time in seconds.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stats, self._interval, self._clock = stats, interval, clock
        self._time, self._before = clock(), stats()

    def tick(self) -> None:
        """Write a log line if the interval has passed and was not idle; call this often."""
        now = self._clock()
        seconds = now - self._time
        if seconds < self._interval:
            return
        stats, before = self._stats(), self._before
        self._time, self._before = now, stats
        prompt = stats.prompt_tokens - before.prompt_tokens
        generated = stats.generation_tokens - before.generation_tokens
        if not (prompt or generated or stats.num_running or stats.num_waiting or stats.num_swapped):
            return
        queries = stats.prefix_cache_queries - before.prefix_cache_queries
        hits = stats.prefix_cache_hits - before.prefix_cache_hits
        _log.info(
            "running %d, waiting %d, swapped %d requests; prompts %.1f tokens/s, generation %.1f tokens/s; "
            "KV cache %.1f%% in use, swap space %.1f%%, prefix cache hits %s; %d preemptions",
            stats.num_running,
            stats.num_waiting,
            stats.num_swapped,
            prompt / seconds,
            generated / seconds,
            100 * stats.gpu_cache_usage,
            100 * stats.cpu_cache_usage,
            f"{100 * hits / queries:.1f}%" if queries else "-",
            stats.num_preemptions - before.num_preemptions,
        )
