"""Pass the outputs of requests from the engine's thread to the event loops of their consumers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from ..outputs import RequestOutput
from .request_log import RequestLog

Item = RequestOutput | Exception  # an exception ends the request


class Stream:
    """Pass the outputs of one request to its consumer, on the event loop that creates the stream.

    Args:
        put: called on the event loop with each item until the stream ends or is closed.
        abort: called on the event loop if the stream is closed before its end.
    """

    def __init__(self, request_id: str, put: Callable[[Item], None], abort: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._put = put
        self._abort = abort
        self._log = RequestLog(request_id)
        self.closed = False  # ended, or left by its consumer

    def receive(self, item: Item) -> None:
        """Hand an item to the consumer. Called on the event loop; other threads use `deliver`."""
        if self.closed:
            return
        if isinstance(item, Exception):
            self._log.failed(item)
            self._end()
        else:
            self._log.observe(item)
            if item.finished:
                self._end()
        self._put(item)

    def close(self) -> None:
        """Abort the request unless it has ended. Called on the event loop."""
        if not self.closed:
            self._end()
            self._abort()

    def _end(self) -> None:
        self.closed = True
        self._log.close()


def deliver(items: Iterable[tuple[Stream, Item]]) -> None:
    """Pass items to their streams, from any thread, waking each event loop once however many there are."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, its_items in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the consumers
            loop.call_soon_threadsafe(_receive, its_items)


def _receive(items: list[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.receive(item)
