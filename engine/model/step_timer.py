"""Measure how fast blocks are swapped and prompts are computed."""

from __future__ import annotations

import time

import torch

from ..scheduling.preemption import Rates
from ..scheduling.step_plan import Plan
from .kv_cache import KVCache


class StepTimer:
    """Move the blocks of steps, and note the rates that preemption mode "auto" compares.

    Args:
        cache: the KV cache, whose blocks are moved.
        rates: where measurements are noted.
        enabled: whether anything is measured: to time a swap, the GPU is waited for.
    """

    def __init__(self, cache: KVCache, rates: Rates, enabled: bool) -> None:
        self._cache = cache
        self._rates = rates
        self._enabled = enabled
        self._num_tokens = 0  # of the steps since the last measurement
        self._idle = True  # no step is launched that has not been waited for
        self._started = 0.0

    def measure_link(self, num_blocks: int) -> None:
        """Swap blocks out and in before the first request, while they hold nothing."""
        if not self._enabled or not num_blocks:
            return
        pairs = tuple((block, block) for block in range(num_blocks))
        for _ in range(3):  # the first may compile a kernel
            self.move_blocks(Plan(swap_out=pairs))
            self.move_blocks(Plan(swap_in=pairs))

    def move_blocks(self, plan: Plan) -> None:
        """Run the moves of a step plan."""
        if not self._enabled or not (plan.swap_out or plan.swap_in):
            self._cache.move_blocks(plan)
            return
        self._synchronize()
        start = time.perf_counter()
        self._cache.move_blocks(plan)
        self._synchronize()
        self._rates.moved(len(plan.swap_out) + len(plan.swap_in), time.perf_counter() - start)

    def start_step(self) -> None:
        """Note the time, unless the step before has not been measured yet, or is still computed."""
        if self._idle and not self._num_tokens:
            self._started = time.perf_counter()
        self._idle = False

    def end_step(self, plan: Plan, idle: bool) -> None:
        """Note the rate of prompts, over whole steps: from one that was waited for to the next.

        Args:
            idle: no other step has been launched.
        """
        self._idle = idle
        if not self._enabled:
            return
        self._num_tokens += sum(item.num_tokens for item in plan.scheduled)
        if any(item.num_samples for item in plan.scheduled):  # the step's tokens have been read
            if self._num_tokens > 2 * len(plan.scheduled):  # mostly prompts
                self._rates.computed(self._num_tokens, time.perf_counter() - self._started)
            self._num_tokens = 0
            self._started = time.perf_counter()

    def step_failed(self) -> None:
        """Forget the steps that have not been measured."""
        self._num_tokens = 0
        self._idle = True

    def _synchronize(self) -> None:
        if self._cache.blocks.is_cuda:
            torch.cuda.synchronize(self._cache.blocks.device)
