"""Handle signals whatever the main thread does."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from uvicorn.server import HANDLED_SIGNALS


@contextlib.contextmanager
def handled_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call ``handle`` with the number of each signal to end the process, in a thread of its own.

    Python's own handlers run between two instructions of the main thread: never, while a step of the engine
    hangs there. On other threads than the main one this does nothing, as only that one may set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def read() -> None:
        with reader:
            while received := reader.recv(64):
                for number in received:
                    if number in HANDLED_SIGNALS:
                        handle(number)

    thread = threading.Thread(target=read, name="cupaged-signals", daemon=True)
    thread.start()
    # First the descriptor, which gets the numbers, so that no signal is lost between the two.
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda number, frame: None) for number in HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        writer.close()  # ends the thread
        thread.join()
