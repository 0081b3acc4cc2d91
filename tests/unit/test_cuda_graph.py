"""How CUDA graphs are captured, over a torch.cuda that notes what it is told. No GPU has run this."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from cupaged.engine.model.cuda_graph import CudaGraphs


@pytest.fixture
def told(monkeypatch) -> list[tuple]:
    """What torch.cuda was told, in order."""
    notes: list[tuple] = []

    class Stream:
        def __init__(self, device="cuda:0", name="side"):
            self.device, self.name = device, name

        def wait_stream(self, other):
            notes.append((self.name, "waits for", other.name))

    class Graph:
        broken = False

        def capture_begin(self, **settings):
            notes.append(("begin", settings))

        def capture_end(self):
            notes.append(("end",))
            if Graph.broken:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self):
            notes.append(("replay",))

    @contextlib.contextmanager
    def stream(which):
        notes.append(("on", which.name))
        yield
        notes.append(("off", which.name))

    fakes = SimpleNamespace(
        Stream=Stream,
        CUDAGraph=Graph,
        stream=stream,
        current_stream=lambda device: Stream(device, "current"),
        graph_pool_handle=lambda: "pool",
    )
    for name, fake in vars(fakes).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    notes.append(Graph)
    return notes


def test_a_graph_is_captured_beside_other_threads_and_from_where_it_was_warmed_up(told):
    graph_class = told.pop()
    make = CudaGraphs(torch.device("cuda", 0))
    for context in (make.warming_up, make().capture):
        with context():
            told.append(("step",))
    begin = ("begin", {"pool": "pool", "capture_error_mode": "thread_local"})
    enter = [("side", "waits for", "current"), ("on", "side")]
    leave = [("off", "side"), ("current", "waits for", "side")]
    assert told == [*enter, ("step",), *leave, *enter, begin, ("step",), ("end",), *leave]
    told.clear()
    graph_class.broken = True
    with pytest.raises(ValueError, match="the cause"), make().capture():
        raise ValueError("the cause")
    assert ("end",) in told  # otherwise the stream would go on capturing
    make().replay()
    assert told[-1] == ("replay",)
