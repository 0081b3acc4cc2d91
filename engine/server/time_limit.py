"""Work that somebody else wrote, and that may not end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_within(seconds: float, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own, and stop it when it has had its time or nobody waits any more.

    It is stopped between two instructions of Python; what takes for ever in a single one goes on.

    Raises:
        TimeoutError: it was stopped.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()
    lock, ended = threading.Lock(), False

    def settle(value: T | None, error: BaseException | None) -> None:
        if not outcome.done():
            outcome.set_result((value, error))

    def run() -> None:
        nonlocal ended
        value, problem = None, None
        try:
            value = work()
        except BaseException as error:  # that of being stopped too
            problem = error
        finally:
            with lock:
                ended = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, problem)

    thread = threading.Thread(target=run, name="cupaged-time-limit", daemon=True)
    thread.start()
    try:
        await asyncio.wait({outcome}, timeout=seconds)
        if not outcome.done():
            raise TimeoutError(f"it has not ended within {seconds:g} seconds")
    finally:
        outcome.cancel()
        with lock:  # while it is held, no other thread has this one's number
            if not ended:
                _exit(thread)
    value, error = outcome.result()
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _exit(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread that runs: what the work catches is no more than Exception."""
    number, kind = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, kind)
