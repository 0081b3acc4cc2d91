"""What becomes of requests whose step failed.

The engine itself says what is tried next: the halves of what failed, or a single request once more
(`LLMEngine.step`). So a request that always fails is soon alone, and failures that pass cost nobody anything.

| what has failed                                    | what is done                                       |
|----------------------------------------------------|----------------------------------------------------|
| several requests, or one for the first time        | try again                                          |
| the same requests, or request, twice in a row      | they end                                           |
| `MAX_FAILURES` steps in a row, whoever was in them | probe the engine, which is dead if that fails too  |
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

MAX_FAILURES = 6


class Action(Enum):
    TRY_AGAIN = "try again"
    END = "end the requests"
    PROBE = "probe the engine"


class FailurePolicy:
    """Decides after every step that failed; remembers the one before."""

    def __init__(self) -> None:
        self._last: tuple[str, ...] = ()  # who failed in the last step; nobody if it did not fail
        self._in_a_row = 0  # steps that failed, since one did not or the engine was probed

    @property
    def failing(self) -> bool:
        """Return whether the last step has failed."""
        return bool(self._last)

    def succeeded(self) -> None:
        self._last, self._in_a_row = (), 0

    def failed(self, request_ids: Sequence[str]) -> Action:
        """Return what to do after a step with these requests has failed."""
        twice = tuple(request_ids) == self._last
        self._last = tuple(request_ids)
        self._in_a_row += 1
        if self._in_a_row == MAX_FAILURES:
            self._in_a_row = 0
            return Action.PROBE
        return Action.END if twice else Action.TRY_AGAIN
