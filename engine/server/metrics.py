"""Collect Prometheus metrics, under vLLM's names where vLLM has the same metric."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, takewhile

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..config import EngineConfig
from ..outputs import EngineStats, RequestOutput
from ..sampling_params import SamplingParams

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_CHOICES = (1, 2, 5, 10, 20)

FINISH_REASONS = ("stop", "length", "abort", "error")  # vLLM's


class Metrics:
    """Hold the metrics of one server, in a registry of its own.

    What is observed for every token costs a fraction of a microsecond; the rest is observed when a request
    ends, or read when the metrics are.

    Args:
        model_name: label of all metrics.
        stats: returns the engine's statistics.
        config: the engine's settings; those of the cache are exported.
        max_model_len: maximum number of tokens of a sequence.
    """

    def __init__(
        self, model_name: str, stats: Callable[[], EngineStats], config: EngineConfig, max_model_len: int
    ) -> None:
        self.registry = CollectorRegistry()
        self._between_tokens = _TokenTimes()
        self.registry.register(_EngineCollector(model_name, stats, config, self._between_tokens))
        ProcessCollector(registry=self.registry)  # memory, processor time and files, as any client exports
        labels = ["model_name"]
        lengths = (*takewhile(lambda length: length < max_model_len, _one_two_five()), max_model_len)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(f"vllm:{name}", text, labels, buckets=buckets, registry=self.registry)
            return metric.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "Arrival to first token.", _LONG)
        self._whole = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LONG)
        self._queue = histogram("request_queue_time_seconds", "Arrival to the first step.", _LONG)
        self._prefill = histogram("request_prefill_time_seconds", "First step to first token.", _LONG)
        self._decode = histogram("request_decode_time_seconds", "First to last token.", _LONG)
        self._inference = histogram("request_inference_time_seconds", "First step to last token.", _LONG)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a request.", _SHORT
        )
        self._prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt.", lengths)
        self._generation = histogram("request_generation_tokens", "Tokens of a request's outputs.", lengths)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of requests.", lengths)
        self._n = histogram("request_params_n", "n of requests.", _CHOICES)
        finished = Counter(
            "vllm:request_success",
            "Outputs that ended, by the reason: those of requests whose clients left are aborted, those of "
            "requests that failed are errors.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._finished = {reason: finished.labels(model_name, reason) for reason in FINISH_REASONS}

    def request(self, params: SamplingParams) -> RequestTimer:
        """Start timing a new request."""
        return RequestTimer(self, params)


class RequestTimer:
    """Measure the times of one request."""

    def __init__(self, metrics: Metrics, params: SamplingParams) -> None:
        self._metrics = metrics
        self._params = params
        self._arrival = self._first = self._last = time.monotonic()
        self._tokens = 0

    def observe(self, output: RequestOutput) -> None:
        """Record the next output of the request."""
        now = time.monotonic()
        outputs = output.outputs
        tokens = len(outputs[0].token_ids) if len(outputs) == 1 else max(len(o.token_ids) for o in outputs)
        if tokens > self._tokens:
            if self._tokens == 0:
                self._metrics._first.observe(now - self._arrival)
                self._first = now
            else:
                self._metrics._between_tokens.observe((now - self._last) / (tokens - self._tokens))
            self._last, self._tokens = now, tokens
        if output.finished:
            self._finish(output, now)

    def _finish(self, output: RequestOutput, now: float) -> None:
        metrics = self._metrics
        first, last = (self._first, self._last) if self._tokens else (now, now)
        scheduled = self._arrival if output.first_scheduled is None else output.first_scheduled
        scheduled = max(scheduled, self._arrival)
        metrics._whole.observe(now - self._arrival)
        metrics._queue.observe(scheduled - self._arrival)
        metrics._prefill.observe(first - scheduled)
        metrics._decode.observe(last - first)
        metrics._inference.observe(last - scheduled)
        if self._tokens > 1:
            metrics._per_token.observe((last - first) / (self._tokens - 1))
        metrics._prompt.observe(len(output.prompt_token_ids))
        metrics._generation.observe(sum(len(completion.token_ids) for completion in output.outputs))
        metrics._n.observe(self._params.n)
        if self._params.max_tokens is not None:
            metrics._max_tokens.observe(self._params.max_tokens)
        for completion in output.outputs:
            metrics._finished[str(completion.finish_reason)].inc()

    def end(self, reason: str) -> None:
        """Record the end of an unfinished request; the reason is "abort" or "error"."""
        self._metrics._finished[reason].inc(self._params.n)


class _TokenTimes:
    """Count the times between tokens in buckets. prometheus_client's own takes five times as long."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SHORT) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SHORT, seconds)] += 1
        self._sum += seconds

    def metric(self, model_name: str) -> Metric:
        """Return the metric, to be exported."""
        family = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between tokens of a sequence.", labels=["model_name"]
        )
        bounds = [*map(floatToGoString, _SHORT), "+Inf"]
        counts = [float(count) for count in accumulate(self._counts)]
        family.add_metric([model_name], list(zip(bounds, counts)), self._sum)
        return family


def _one_two_five() -> Iterator[int]:
    """Yield 1, 2, 5, 10, 20, 50 and so on."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


class _EngineCollector(Collector):
    """Export the engine's statistics as metrics when they are scraped."""

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineStats],
        config: EngineConfig,
        between_tokens: _TokenTimes,
    ) -> None:
        self._model_name = model_name
        self._stats = stats
        self._config = config
        self._between_tokens = between_tokens

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._between_tokens.metric(self._model_name)
        yield self._cache_config(stats)
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

    def _cache_config(self, stats: EngineStats) -> Metric:
        """Return the settings of the KV cache, as labels of a metric that is always 1."""
        config = self._config
        labels = {
            "model_name": self._model_name,
            "block_size": config.block_size,
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "num_gpu_blocks": stats.num_gpu_blocks,
            "num_gpu_blocks_override": config.num_gpu_blocks_override,
            "num_cpu_blocks": stats.num_cpu_blocks,
            "swap_space": config.swap_space,
        }
        gauge = GaugeMetricFamily("vllm:cache_config_info", "Settings of the KV cache.", labels=list(labels))
        gauge.add_metric([str(value) for value in labels.values()], 1)
        return gauge
