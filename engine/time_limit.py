"""Run foreign code, which may not end, within a time limit."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_within(seconds: float, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own, stop it after a time limit, and return its result.

    It can only be stopped between two instructions of Python, not within a single long one.

    Raises:
        TimeoutError: the work was stopped.
        BaseException: the error that the work raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    lock, ended = threading.Lock(), False

    def run() -> None:
        nonlocal ended
        try:
            results.append(work())
        except BaseException as error:  # including the SystemExit that stops it
            errors.append(error)
        finally:
            with lock:
                ended = True

    thread = threading.Thread(target=run, name="cupaged-time-limit", daemon=True)
    thread.start()
    thread.join(seconds)
    with lock:  # keeps the thread from ending, after which another one could have its number
        if not ended:
            _raise_exit(thread)
            raise TimeoutError(f"it has not ended within {seconds:g} seconds")
    if errors:
        raise errors[0]
    return results[0]


def _raise_exit(thread: threading.Thread) -> None:
    """Raise SystemExit, which ``except Exception`` does not catch, in a running thread."""
    number, kind = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, kind)
