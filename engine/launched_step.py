"""Hold a step from its launch until its samples are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .sampling.samples import LaunchedSamples
from .scheduling.step_plan import Plan


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device computes, or one that could not be launched.

    Args:
        plan: the step.
        samples: what it samples; None if it failed.
        error: why it failed; raised when the outputs of the steps before have been returned.
    """

    plan: Plan
    samples: LaunchedSamples | None = None
    error: BaseException | None = None

    @property
    def sampled(self) -> torch.Tensor | None:
        """Return the sampled tokens, on the device."""
        return self.samples.tokens if self.samples is not None else None

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Return the IDs of its requests and prefixes."""
        return tuple(group.request_id for group in dict.fromkeys(item.group for item in self.plan.scheduled))
