"""The context that the sections of the report share: device, timer and budget; and their results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from .timing import Timer, l2_bytes

T = TypeVar("T")
Row = dict[str, Any]


@dataclass
class Result:
    """The results of a section. Rows are written to the JSON as they are."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Context:
    """The context in which a section runs."""

    device: torch.device
    quick: bool  # only a few small shapes, for tests
    layouts: tuple[str, ...] = ("block", "layer")
    seed: int = 0
    deadline: float = float("inf")  # end of the section, by time.perf_counter()
    result: Result = field(default_factory=Result)

    @cached_property
    def timer(self) -> Timer:
        return Timer(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sample_s(self) -> float:
        """Return the seconds to sample for a timing."""
        return 0.02 if self.quick else 0.1 if self.on_gpu else 0.5

    @cached_property
    def rotation_bytes(self) -> int:
        """Return the minimum number of bytes that repeated calls must cycle through to miss the L2 cache."""
        return 3 * l2_bytes(self.device) + 1

    @cached_property
    def copy_bandwidth(self) -> float:
        """Return the bandwidth of a large copy on the device, in bytes per second, read and written."""
        size = 1 << (22 if self.quick else 32 if self.on_gpu else 27)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timing = self.timer([partial(target.copy_, source)], 2 * self.sample_s)
        return 2 * size / timing.median_s

    def within_budget(self, cases: Sequence[T], name: Callable[[T], str] = str) -> Iterator[T]:
        """Yield the cases until the deadline; the names of the rest are added to ``left_out``."""
        for i, case in enumerate(cases):
            if time.perf_counter() > self.deadline:
                self.result.left_out += [name(case) for case in cases[i:]]
                return
            yield case
            self.release()

    def release(self) -> None:
        """Release cached GPU memory, so that the next case does not find it fragmented."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def progress(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Section:
    """A section of the report."""

    name: str
    title: str
    budget_s: float  # on a GPU
    run: Callable[[Context], None]
    timed: bool = True  # whether it prints times, for which `check` must have passed
    needs_gpu: bool = False


def run_section(section: Section, context: Context, end: float) -> Result:
    """Run a section within its budget and the report's. An exception in it becomes part of its result."""
    start = time.perf_counter()
    context.result = Result()
    context.deadline = min(start + section.budget_s, end) if context.on_gpu else float("inf")
    try:
        section.run(context)
    except Exception as error:
        context.result.wrong.append(f"{section.name} stopped: {reason(error)}")
    context.result.seconds = time.perf_counter() - start
    return context.result


def reason(error: Exception) -> str:
    """Return an exception as one line of text."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}"
