"""What a call costs on the host: from Python call to return, with the GPU doing next to nothing.

Four depths of the same call: the public function where it goes through torch's dispatcher (with autograd on),
where it does not (in `torch.inference_mode`), the backend below the operator (no checks), and the launches
alone with everything worked out.
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

CALLS = 200  # in a burst: the GPU's queue takes about a thousand launches before it makes the host wait
BURSTS = 15


def launcher() -> Launcher:
    from cupaged.backends.cuda.launcher import CupyLauncher

    return CupyLauncher()


class Recorder:
    """A launcher that keeps what it was asked to launch, with the tensors."""

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
    """Median over bursts of the host's seconds for one call."""
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
    """Name, public call, and the same call of a backend; small, and one of decode that is split."""
    found: list[Call] = []
    for name, queries, length in (("decode", 1, 64), ("decode, split", 1, 2048), ("prefill", 16, 64)):
        batch = Batch(Case("bfloat16", 2, queries, length, 32, 8, 128), context.device)
        inputs = (batch.query[0], batch.kv_cache, batch.block_tables[0], batch.seq_lens)
        params = AttentionParams(scale=128**-0.5)
        tail = (batch.query_start_loc, batch.out[0], None, params, name)  # a name stands for the layout
        found.append((name, batch.runs()[0], lambda kernels, a=(*inputs, *tail): kernels.paged_attention(*a)))
    key, value = torch.randn(2, 16, 8, 128, device=context.device, dtype=torch.bfloat16)
    cache = torch.zeros(8, 2, 8, 16, 128, device=context.device, dtype=torch.bfloat16)
    slots = torch.arange(16, device=context.device)
    args = (key, value, cache, slots)
    found.append(
        (
            "reshape_and_cache",
            partial(cupaged.reshape_and_cache, *args),
            lambda kernels: kernels.reshape_and_cache(*args, None, None, "layout"),
        )
    )
    return found
