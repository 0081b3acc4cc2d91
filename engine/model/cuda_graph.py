"""Capture what is launched on a GPU, to launch all of it again at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Record what runs on a device, and repeat it."""

    def capture(self) -> AbstractContextManager[None]:
        """Record what is launched within the context. Nothing of it runs."""

    def replay(self) -> None:
        """Launch it again, on the current stream, with the addresses and numbers of then."""


class GraphMaker(Protocol):
    """Make graphs that are replayed one after the other, so that they can share their memory."""

    def __call__(self) -> Graph:
        """Return a graph that holds nothing."""

    def warming_up(self) -> AbstractContextManager[None]:
        """Run what is to be captured beforehand: libraries get their memory and load their kernels."""


class CudaGraphs:
    """Make graphs over `torch.cuda.CUDAGraph`, with memory and a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self) -> CudaGraph:
        return CudaGraph(self._stream, self._pool)

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        with _on(self._stream):
            yield


class CudaGraph:
    """Capture and replay a `torch.cuda.CUDAGraph`."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream, self._pool = stream, pool

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        # `torch.cuda.graph` also collects garbage and gives memory back, which takes longer than all else.
        with _on(self._stream):
            # Other threads may do with the GPU what they like meanwhile.
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # which says that there was an error before
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run on a stream, after what is on the current one and before what comes there."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
