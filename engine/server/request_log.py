"""One line in the log for every request that has ended, however it did."""

from __future__ import annotations

import logging
import time

from ..outputs import RequestOutput

_log = logging.getLogger("cupaged.requests")


class RequestLog:
    """Follows one request, from its arrival on."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._arrival = time.monotonic()
        self._first: float | None = None  # when the first output came
        self._last: RequestOutput | None = None
        self._reason = "abort"  # unless something else is said

    def observe(self, output: RequestOutput) -> None:
        """Take note of the request's outputs so far."""
        if self._first is None:
            self._first = time.monotonic()
        self._last = output
        if output.finished:
            self._reason = ",".join(dict.fromkeys(str(one.finish_reason) for one in output.outputs))

    def failed(self, error: Exception) -> None:
        """Take note of what ended it: a refusal is a matter of the client's, all else is an error."""
        self._reason = "refused" if isinstance(error, ValueError) else "error"

    def close(self) -> None:
        """Write the line."""
        now = time.monotonic()
        last = self._last
        _log.info(
            "request %s: %s prompt tokens, %d output tokens, finish reason %s, first token after %s, %.3f s",
            self._request_id,
            "?" if last is None else len(last.prompt_token_ids),
            0 if last is None else sum(len(one.token_ids) for one in last.outputs),
            self._reason,
            "-" if self._first is None else f"{self._first - self._arrival:.3f} s",
            now - self._arrival,
        )
