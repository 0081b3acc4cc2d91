"""The timer of the benchmarks, on a stand-in for torch.cuda whose clock the test moves."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Timer


class Gpu:
    """Work advances ``now``; what runs under a capture is kept and advances it at every replay."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recording: list | None = None
        self.captures: list[list] = []
        self.capturable = True
        self.host_gap_s = 0.0

    def work(self, seconds: float) -> None:
        if self.recording is not None:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recording.append(seconds)
        else:
            self.now += seconds + self.host_gap_s

    def install(self, monkeypatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class CUDAGraph:
            def replay(self):
                gpu.now += sum(self.calls)

            def reset(self):
                self.calls = None

        @contextmanager
        def graph(target):
            gpu.recording = target.calls = []
            gpu.captures.append(target.calls)
            try:
                yield
            finally:
                gpu.recording = None

        for name, value in (("Event", Event), ("CUDAGraph", CUDAGraph), ("graph", graph)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


@pytest.fixture
def gpu(monkeypatch):
    found = Gpu()
    found.install(monkeypatch)
    return found


@pytest.fixture
def timer():
    return Timer(torch.device("cuda"))


def test_a_graph_goes_round_the_sets_in_whole_rounds(gpu, timer):
    """Calls of 10 and 30 us take 20 us on average, however much the host adds to each launch."""
    gpu.host_gap_s = 5e-6
    times = (10e-6, 30e-6)
    found = timer([lambda s=s: gpu.work(s) for s in times], 0.01)
    assert found.method == "graph"
    assert found.median_s == pytest.approx(20e-6)
    assert found.spread == pytest.approx(0.0, abs=1e-6)
    (captured,) = gpu.captures
    assert captured == list(times) * (len(captured) // 2)
    assert sum(captured) == pytest.approx(timing.REPLAY_S, rel=0.3)


def test_long_calls_are_not_repeated_in_a_graph(gpu, timer):
    found = timer([lambda: gpu.work(0.5)], 0.01)
    assert found.median_s == pytest.approx(0.5)
    assert gpu.captures == [[0.5]]


def test_every_set_is_in_the_graph_however_many_there_are(gpu, timer):
    count = timing.MAX_CALLS + 7
    timer([lambda s=s: gpu.work(1e-6 * (s + 1)) for s in range(count)], 0.01)
    assert len(set(gpu.captures[0])) == count


def test_what_cannot_be_captured_is_timed_by_events_with_the_hosts_part(gpu, timer):
    gpu.capturable = False
    gpu.host_gap_s = 5e-6
    found = timer([lambda: gpu.work(10e-6)], 0.01)
    assert (found.method, found.median_s) == ("events", pytest.approx(15e-6))


def test_a_graph_is_not_tried_where_it_would_be_wrong(gpu, timer):
    assert timer([lambda: gpu.work(1e-3)], 0.01, graph=False).method == "events"
    assert gpu.captures == []


def test_the_median_leaves_a_slow_spell_out(gpu, timer):
    calls = []

    def run():
        calls.append(None)
        gpu.work(1.0 if len(calls) % 5 == 0 else 1e-3)

    found = timer([run], 0.0, graph=False)
    assert found.median_s == pytest.approx(1e-3)
    assert found.spread > 1


def test_the_number_of_samples_is_bounded_whatever_the_budget(gpu, timer):
    fewest, most = timing.SAMPLES
    for budget, expected in ((0.0, fewest), (60.0, most)):
        count = []
        timer([lambda count=count: count.append(None)], budget, graph=False)
        assert len(count) == expected + 1  # and the warm-up


def test_a_cpu_is_timed_by_the_clock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    found = Timer(torch.device("cpu"))([lambda: None], 0.01)
    assert found.method == "clock"
    assert 0 < found.median_s < 1e-3
