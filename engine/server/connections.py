"""Limit the number of the server's connections and the time that each may take.

uvicorn only closes idle keep-alive connections: it waits without limit for the head or the body of a request,
or for a client to read. So its protocol is extended here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .errors import error_json
from .limits import Limits

_log = logging.getLogger("cupaged.server")

_READ_SIZE = 8192  # bytes to parse at once: 256 kB in chunks of one byte take more than a second
_LINGER = 5.0  # seconds for a client to read the answer after the server has stopped receiving
_OTHER_FILES = 64  # number of file descriptors for other purposes than connections
_LOG_INTERVAL = 60.0  # minimum seconds between log lines about connections that cannot be accepted


class Connections:
    """Keep the number of a server's connections within its limit.

    Args:
        limits: maximum number of connections, and their timeouts.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._max_connections = limits.max_connections
        self._busy: set[Connection] = set()  # a complete request is being answered
        self._idle: dict[Connection, None] = {}  # between requests, the longest idle first
        self._new: dict[Connection, None] = {}  # no complete request so far, the oldest first
        self._last_log = -_LOG_INTERVAL

    def start(self) -> None:
        """Lower the limit to the free file descriptors; call it when all other files are open."""
        self._max_connections = min(self.limits.max_connections, max(_free_descriptors() - _OTHER_FILES, 8))
        if self._max_connections < self.limits.max_connections:
            _log.warning(
                "the limit of file descriptors leaves room for %d connections, not for %d (ulimit -n)",
                self._max_connections,
                self.limits.max_connections,
            )
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)

    def add(self, connection: Connection) -> None:
        """Add a new connection, and close another one if there are too many."""
        if len(self._busy) + len(self._idle) + len(self._new) >= self._max_connections:
            self._evict()
        self._new[connection] = None

    def remove(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)
        self._new.pop(connection, None)

    def set_busy(self, connection: Connection, busy: bool) -> None:
        """Set whether a complete request of the connection is being answered."""
        if busy:
            self.remove(connection)
            self._busy.add(connection)
        elif connection in self._busy:
            self._busy.remove(connection)
            self._idle[connection] = None

    @property
    def full(self) -> bool:
        """Return whether the connections that are not busy are needed to refuse further requests."""
        return len(self._busy) > self._max_connections - self._num_reserved

    @property
    def _num_reserved(self) -> int:
        return max(self._max_connections // 8, 1)

    def _evict(self) -> None:
        """Close the oldest connection without a request: a new one if many are new, else an idle one."""
        candidates = self._new if len(self._new) >= self._num_reserved or not self._idle else self._idle
        oldest = next(iter(candidates), None)
        if oldest is not None:
            self.remove(oldest)
            oldest.abort()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
            return
        self._evict()
        if time.monotonic() - self._last_log > _LOG_INTERVAL:
            self._last_log = time.monotonic()
            _log.error("a connection cannot be accepted, and will be tried again: %s", context["exception"])


class Connection(H11Protocol):
    """Extend uvicorn's protocol by timeouts, and by closing such that the client can read the answer."""

    def __init__(self, connections: Connections, **settings: Any) -> None:
        super().__init__(**settings)
        self._table = connections
        self._limits = connections.limits
        self._waits_for: tuple[str, Any] | None = None  # "head" or "body", and the request's cycle
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None
        self._head_refused = False  # an incomplete head was refused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if hasattr(transport, "max_size"):  # asyncio's own
            transport.max_size = _READ_SIZE
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._table.add(self)
        self._wait_for("head")

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._wait_for("head")
        super().data_received(data)
        self._update_state()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # the rest of the body is not needed
            self.transport.close()
        self._update_state()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for(None)
        self.resume_writing()
        self._table.remove(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._send_deadline is None:
            self._send_deadline = self.loop.call_later(self.send_timeout, self.abort)

    def resume_writing(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None
        super().resume_writing()

    def shutdown(self) -> None:
        if self.transport.is_closing():
            self.abort()
        elif self.conn.their_state is h11.SEND_BODY:
            self._refuse(503, "the server is shutting down")
        else:
            super().shutdown()

    def abort(self) -> None:
        """Close at once, without sending what is buffered."""
        self.transport.abort()

    @property
    def send_timeout(self) -> float:
        return self._limits.send_timeout

    @property
    def receiving(self) -> bool:
        """Return whether the client may still be sending, be it a request or anything else."""
        return self._head_refused or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def send_400_response(self, msg: str) -> None:
        error = "the request is not HTTP, or its head is too large"
        self._refuse(400, error)

    def _update_state(self) -> None:
        """Update the deadline, and whether the connection is busy, by the state of the client's request."""
        state = self.conn.their_state
        answering = self.cycle is not None and not self.cycle.response_complete
        busy = answering and state is not h11.SEND_BODY
        self._table.set_busy(self, busy)
        if answering and not self.cycle.response_started:
            # An answer that comes before the body ends the connection: tell the client, or else it may send
            # its next request over it.
            closing = [CLOSE_HEADER] if state is h11.SEND_BODY else []
            self.cycle.default_headers = self.server_state.default_headers + closing
        if busy and self._table.full and not self.cycle.response_started:
            self._refuse_unless_get()
        if state is h11.SEND_BODY:
            self._wait_for("body")
        elif state is not h11.IDLE or not (self._waits_for and self._waits_for[0] == "head"):
            self._wait_for(None)

    def _refuse_unless_get(self) -> None:
        """Refuse a request unless it is a GET, which is cheap; monitors use that for /health."""
        if self.scope["method"] != "GET":
            message = "the server has too many connections (max_connections): send the request again later"
            self._refuse(429, message, (b"retry-after", b"1"))

    def _wait_for(self, what: str | None) -> None:
        wanted = (what, self.cycle) if what else None
        if wanted == self._waits_for:
            return
        self._waits_for = wanted
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if what is not None:
            seconds = self._limits.header_timeout if what == "head" else self._limits.body_timeout
            self._deadline = self.loop.call_later(seconds, self._on_deadline, what)

    def _on_deadline(self, what: str) -> None:
        self._refuse(408, f"the {what} of the request did not come in time")

    def _refuse(self, status: int, message: str, *more: tuple[bytes, bytes]) -> None:
        """Send an error in place of the application's answer and close."""
        self._head_refused = self.conn.their_state is h11.IDLE
        path = ""  # of a request whose head has not arrived
        if self.cycle is not None and not self.cycle.response_complete:
            path = self.scope["path"]
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error_json(path, status, message)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
                *more,
            ]
            response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


class _Transport:
    """Close a transport within a time limit and such that the client can read the answer.

    If the client is still sending, closing at once would reset the connection, and the answer could be lost.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing = True
        loop, linger = self._connection.loop, self._connection.receiving
        if linger and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()  # and discard, until the client closes
            loop.call_later(_LINGER, self._transport.abort)
        else:
            self._transport.close()  # asyncio sends what is buffered before
            loop.call_later(self._connection.send_timeout, self._transport.abort)


def _free_descriptors() -> int:
    """Return the number of file descriptors that the process can still open."""
    try:
        import resource
    except ImportError:  # Windows
        return 2**31
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        num_open = len(os.listdir("/proc/self/fd"))
    except OSError:
        num_open = _OTHER_FILES
    return (limit if limit != resource.RLIM_INFINITY else 2**31) - num_open
