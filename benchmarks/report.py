"""What the sections of the report share: the device, the clock, the budget, and what they leave behind."""

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
    """What a section found. Rows go into the JSON as they are."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Context:
    """Handed to a section."""

    device: torch.device
    quick: bool  # only a few small shapes, for tests
    layouts: tuple[str, ...] = ("block", "layer")
    seed: int = 0
    deadline: float = float("inf")  # of the section, by time.perf_counter()
    result: Result = field(default_factory=Result)

    @cached_property
    def timer(self) -> Timer:
        return Timer(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sample_s(self) -> float:
        """How long to sample one timing."""
        return 0.02 if self.quick else 0.1 if self.on_gpu else 0.5

    @cached_property
    def rotation_bytes(self) -> int:
        """How much memory repeated calls must go round, so that the L2 cache does not serve them."""
        return 3 * l2_bytes(self.device) + 1

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a large copy on the device."""
        size = 1 << (22 if self.quick else 32 if self.on_gpu else 27)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timing = self.timer([partial(target.copy_, source)], 2 * self.sample_s)
        return 2 * size / timing.median_s

    def within_budget(self, cases: Sequence[T], name: Callable[[T], str] = str) -> Iterator[T]:
        """The cases until the section's time is over; what is left is noted by name."""
        for i, case in enumerate(cases):
            if time.perf_counter() > self.deadline:
                self.result.left_out += [name(case) for case in cases[i:]]
                return
            yield case
            self.release()

    def release(self) -> None:
        """Give memory back, so that the next case finds it in one piece."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def progress(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Section:
    """One part of the report."""

    name: str
    title: str
    budget_s: float  # on a GPU
    run: Callable[[Context], None]
    timed: bool = True  # whether it prints times, which wait for a correct `check`
    needs_gpu: bool = False


def run_section(section: Section, context: Context, end: float) -> Result:
    """Run a section within its budget and the report's; an exception in it is its result."""
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
    """An exception in one line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}"
