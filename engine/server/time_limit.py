"""Work that somebody else wrote, and that may not end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_within(seconds: float, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own, and stop it when it has had its time.

    It is stopped between two instructions of Python; what takes for ever in a single one goes on.

    Raises:
        TimeoutError: it was stopped.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    lock, ended = threading.Lock(), False

    def run() -> None:
        nonlocal ended
        try:
            results.append(work())
        except BaseException as error:  # that of being stopped too
            errors.append(error)
        finally:
            with lock:
                ended = True

    thread = threading.Thread(target=run, name="cupaged-time-limit", daemon=True)
    thread.start()
    thread.join(seconds)
    with lock:  # while it is held, no other thread has this one's number
        if not ended:
            _exit(thread)
            raise TimeoutError(f"it has not ended within {seconds:g} seconds")
    if errors:
        raise errors[0]
    return results[0]


def _exit(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread that runs: what the work catches is no more than Exception."""
    number, kind = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, kind)
