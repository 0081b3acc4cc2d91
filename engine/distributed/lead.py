"""Load a model on all ranks and run its steps there, from rank 0."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import partial

import torch

from ..config import EngineConfig
from ..model.kv_cache import KVCache
from ..model.step_inputs import StepInputs
from ..model.worker import Worker
from .launch import RankGroup
from .plan import check_divides
from .rank import is_follower, run_follower
from .ranks import RankError

_GRACE = 10.0  # seconds for the step itself to notice that a rank has failed


class Lead:
    """Hold rank 0's part of a model, whose steps the other ranks run as well.

    Under torchrun the other ranks stay in here until rank 0 ends, and end.

    Args:
        model: a directory, a hub ID, or None for the demo model.
        config: settings.
        device: rank 0's device.
        group: the ranks, to be used by several engines in turn; None: they are started, and end with this.

    Attributes:
        worker: rank 0's part.
        group: the ranks.

    Raises:
        ValueError: the model cannot be divided among as many ranks.
        RankError: a rank has failed.
    """

    def __init__(
        self, model: str | None, config: EngineConfig, device: torch.device, group: RankGroup | None = None
    ) -> None:
        check_divides(model, config)
        if is_follower(config.tensor_parallel_size):
            run_follower(device.type, config.distributed_timeout_seconds)
        owned = group is None
        self.group = group = group or RankGroup(config, device)
        with group.explained():
            number = group.leader.load(model, config)
            self._let_go = weakref.finalize(self, partial(_let_go, group, number, owned))
            self.worker = Worker(model, config, group.ranks.device, group.ranks)
        runner, own_cache, leader = self.worker.runner, self.worker.cache, group.leader

        def run(inputs: StepInputs, cache: KVCache, sampled: torch.Tensor | None) -> torch.Tensor:
            with group.explained(always=True):
                if cache is own_cache:
                    leader.step(inputs, sampled)
                else:
                    leader.probe()
                return runner.run_inputs(inputs, cache, sampled)

        runner.lead = run
        own_cache.after_moves = leader.moved

    def on_failure(self, call: Callable[[RankError], None]) -> None:
        """Let another thread call a function with the error when a rank has ended by itself."""
        self.group.on_failure = call

    def overdue(self, seconds_in_step: float) -> RankError | None:
        """Return the error that the current step has to end with, if it waits in vain for another rank."""
        if self.group.failure is not None and seconds_in_step > _GRACE:
            return self.group.failure
        if seconds_in_step > self.group.timeout + _GRACE:
            return self.group.timed_out()
        return None

    def close(self) -> None:
        """End the other ranks, or let them forget the model if they are used by others."""
        self._let_go()


def _let_go(group: RankGroup, number: int, owned: bool) -> None:
    if owned:
        group.close()
    elif not group.ended:
        with contextlib.suppress(RuntimeError):
            group.leader.drop(number)
