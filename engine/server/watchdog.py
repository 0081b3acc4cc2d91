"""Detect and log steps that hang."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger("cupaged.server")


class Watchdog:
    """Detect whether the engine's current step takes too long.

    Args:
        seconds_in_step: returns the seconds since the current step began; 0 between steps.
        timeout: seconds after which a step hangs; 0: never.
    """

    def __init__(self, seconds_in_step: Callable[[], float], timeout: float) -> None:
        self._seconds_in_step, self._timeout = seconds_in_step, timeout
        self._hangs = False

    def hangs(self) -> bool:
        """Return whether a step hangs, and log changes of that; call this often."""
        hangs = self._timeout > 0 and self._seconds_in_step() > self._timeout
        if hangs and not self._hangs:
            _log.error(
                "a step of the engine takes longer than %g s (--step-timeout): until it ends /health answers "
                "503",
                self._timeout,
            )
        elif self._hangs and not hangs:
            _log.warning("the step that took so long has ended: /health answers 200 again")
        self._hangs = hangs
        return hangs
