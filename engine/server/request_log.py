"""Log one line for every request that has ended."""

from __future__ import annotations

import logging
import time

from ..outputs import RequestOutput

_log = logging.getLogger("cupaged.requests")


class RequestLog:
    """Record the course of one request, from its arrival on."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._arrival = time.monotonic()
        self._first_output_time: float | None = None
        self._last_output: RequestOutput | None = None
        self._reason = "abort"  # unless the request finishes or fails

    def observe(self, output: RequestOutput) -> None:
        """Record the request's outputs so far."""
        if self._first_output_time is None:
            self._first_output_time = time.monotonic()
        self._last_output = output
        if output.finished:
            reasons = dict.fromkeys(str(completion.finish_reason) for completion in output.outputs)
            self._reason = ",".join(reasons)

    def failed(self, error: Exception) -> None:
        """Record the error that ended the request: a ValueError is a refusal, the client's own fault."""
        self._reason = "refused" if isinstance(error, ValueError) else "error"

    def close(self) -> None:
        """Write the log line."""
        now = time.monotonic()
        first, last = self._first_output_time, self._last_output
        _log.info(
            "request %s: %s prompt tokens, %d output tokens, finish reason %s, first token after %s, %.3f s",
            self._request_id,
            "?" if last is None else len(last.prompt_token_ids),
            0 if last is None else sum(len(completion.token_ids) for completion in last.outputs),
            self._reason,
            "-" if first is None else f"{first - self._arrival:.3f} s",
            now - self._arrival,
        )
