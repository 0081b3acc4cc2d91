"""Decide what to do with requests whose step failed.

The engine chooses what to retry next: halves of the failed batch, or a single request once more
(`LLMEngine.step`). So a request that always fails is soon isolated, and transient failures end no request.

| failure                                            | action                                             |
|----------------------------------------------------|----------------------------------------------------|
| a step with other requests than the last failure   | try again                                          |
| two steps in a row with the same requests          | end these requests                                 |
| `MAX_FAILURES` steps in a row, with any requests   | probe the engine, which is dead if that fails too  |
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

MAX_FAILURES = 6


class Action(Enum):
    """Name the actions after a failed step."""

    TRY_AGAIN = "try again"
    END = "end the requests"
    PROBE = "probe the engine"


class FailurePolicy:
    """Decide what to do after every failed step."""

    def __init__(self) -> None:
        self._last_failed: tuple[str, ...] = ()  # request IDs of the last step; empty if it succeeded
        self._num_failures = 0  # number of failed steps since a successful one or a probe

    @property
    def failing(self) -> bool:
        """Return whether the last step has failed."""
        return bool(self._last_failed)

    def succeeded(self) -> None:
        """Record that a step has succeeded."""
        self._last_failed, self._num_failures = (), 0

    def failed(self, request_ids: Sequence[str]) -> Action:
        """Record that a step with these requests has failed, and return what to do."""
        twice = tuple(request_ids) == self._last_failed
        self._last_failed = tuple(request_ids)
        self._num_failures += 1
        if self._num_failures == MAX_FAILURES:
            self._num_failures = 0
            return Action.PROBE
        return Action.END if twice else Action.TRY_AGAIN
