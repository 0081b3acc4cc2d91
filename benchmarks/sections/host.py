"""Measure the host time of a call, from the Python call to its return, with hardly any work on the GPU.

Each call is timed at four depths: the public function through torch's dispatcher (with autograd on) and past
it (in `torch.inference_mode`), the backend's function (without checks), and the prepared launches alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch

import cupaged
from cupaged.backends.cuda.kernels import Kernels, Launch, Launcher
from cupaged.params import AttentionParams

from ..problems import Batch, Case
from ..report import Context
from ..timing import host_clock

CALLS = 200  # per burst: the host has to wait once the GPU's queue has about a thousand launches
BURSTS = 15


def launcher() -> Launcher:
    from cupaged.backends.cuda.launcher import CupyLauncher

    return CupyLauncher()


class Recorder:
    """A launcher that records the launches and their tensors instead of launching."""

    def __init__(self, real: Launcher) -> None:
        self.launches: list[tuple[Launch, Sequence[torch.Tensor | None]]] = []
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def prepare(self, *args: Any) -> Launch:
        launch = self._real.prepare(*args)
        return lambda tensors: self.launches.append((launch, tensors))


def run(context: Context) -> None:
    real = launcher()
    for name, public, backend in context.within_budget(_calls(context), itemgetter(0)):
        recorder = Recorder(real)
        backend(Kernels(recorder))
        depths = {
            "call": public,
            "backend": partial(backend, Kernels(real)),
            "launches": partial(_launch_all, recorder.launches),
        }
        row = {"name": name, "launches": len(recorder.launches)}
        row["seconds"] = {"dispatched": host_seconds(context, public)}
        with torch.inference_mode():
            row["seconds"] |= {depth: host_seconds(context, call) for depth, call in depths.items()}
        context.result.rows.append(row)


def host_seconds(context: Context, call: Callable[[], object]) -> float:
    """Return the host time of a call in seconds, the median over bursts."""
    call()
    calls, bursts = (3, 3) if context.quick else (CALLS, BURSTS)
    samples = []
    for _ in range(bursts):
        with host_clock(context.device) as elapsed:
            for _ in range(calls):
                call()
            samples.append(elapsed() / calls)
    return statistics.median(samples)


def _launch_all(launches: list[tuple[Launch, Sequence[torch.Tensor | None]]]) -> None:
    for launch, tensors in launches:
        launch(tensors)


Call = tuple[str, Callable[[], object], Callable[[Kernels], object]]


def _calls(context: Context) -> list[Call]:
    """Return small calls, one of them a decode with KV splits, each with its name and at two depths."""
    calls: list[Call] = []
    for name, queries, length in (("decode", 1, 64), ("decode, split", 1, 2048), ("prefill", 16, 64)):
        batch = Batch(Case("bfloat16", 2, queries, length, 32, 8, 128), context.device)
        inputs = (batch.query[0], batch.kv_cache, batch.block_tables[0], batch.seq_lens)
        params = AttentionParams(scale=128**-0.5)
        tail = (batch.query_start_loc, batch.out[0], None, params, name)  # the name serves as the layout
        calls.append((name, batch.runs()[0], lambda kernels, a=(*inputs, *tail): kernels.paged_attention(*a)))
    key, value = torch.randn(2, 16, 8, 128, device=context.device, dtype=torch.bfloat16)
    cache = torch.zeros(8, 2, 8, 16, 128, device=context.device, dtype=torch.bfloat16)
    slots = torch.arange(16, device=context.device)
    args = (key, value, cache, slots)
    calls.append(
        (
            "reshape_and_cache",
            partial(cupaged.reshape_and_cache, *args),
            lambda kernels: kernels.reshape_and_cache(*args, None, None, "layout"),
        )
    )
    return calls
