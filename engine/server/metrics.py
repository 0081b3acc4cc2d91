"""Collect Prometheus metrics, under vLLM's names where vLLM has the same metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..outputs import EngineStats, RequestOutput

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)

FINISH_REASONS = ("stop", "length", "abort", "error")  # vLLM's


class Metrics:
    """Hold the metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, stats))
        labels = ["model_name"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"vllm:{name}", text, labels, buckets=buckets, registry=self.registry)
            return metric.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "Arrival to first token.", _LONG)
        self._next = histogram("inter_token_latency_seconds", "Between tokens of a sequence.", _SHORT)
        self._whole = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LONG)
        finished = Counter(
            "vllm:request_success",
            "Outputs that ended, by the reason: those of requests whose clients left are aborted, those of "
            "requests that failed are errors.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._finished = {reason: finished.labels(model_name, reason) for reason in FINISH_REASONS}

    def request(self, n: int) -> RequestTimer:
        """Start timing a new request of ``n`` outputs."""
        return RequestTimer(self, n)


class RequestTimer:
    """Measure the times of one request."""

    def __init__(self, metrics: Metrics, n: int) -> None:
        self._metrics = metrics
        self._n = n
        self._arrival = self._last = time.perf_counter()
        self._tokens = 0

    def observe(self, output: RequestOutput) -> None:
        """Record the next output of the request."""
        metrics, now = self._metrics, time.perf_counter()
        tokens = max(len(o.token_ids) for o in output.outputs)
        if tokens > self._tokens:
            if self._tokens == 0:
                metrics._first.observe(now - self._arrival)
            else:
                metrics._next.observe((now - self._last) / (tokens - self._tokens))
            self._last, self._tokens = now, tokens
        if output.finished:
            metrics._whole.observe(now - self._arrival)
            for completion in output.outputs:
                metrics._finished[str(completion.finish_reason)].inc()

    def end(self, reason: str) -> None:
        """Record the end of an unfinished request; the reason is "abort" or "error"."""
        self._metrics._finished[reason].inc(self._n)


class _EngineCollector(Collector):
    """Export the engine's statistics as metrics when they are scraped."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text, value in (
            ("num_requests_running", "Requests that run.", stats.num_running),
            ("num_requests_waiting", "Requests that wait to be run.", stats.num_waiting),
            ("num_requests_swapped", "Requests in the CPU swap space.", stats.num_swapped),
            ("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", stats.gpu_cache_usage),
            ("cpu_cache_usage_perc", "Share of the swap blocks in use; 1 is all.", stats.cpu_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, text, value in (
            ("num_preemptions", "Preemptions.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens of all requests.", stats.prompt_tokens),
            ("generation_tokens", "Sampled tokens.", stats.generation_tokens),
            (
                "prefix_cache_queries",
                "Tokens looked for in the prefix cache.",
                stats.prefix_cache_queries,
            ),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_cache_hits),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        failed = CounterMetricFamily(
            "cupaged:failed_steps", "Steps of the engine that failed.", labels=["model_name"]
        )
        failed.add_metric([self._model_name], stats.num_failed_steps)
        yield failed
