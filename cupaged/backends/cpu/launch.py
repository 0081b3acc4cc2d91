"""Launch the CPU kernels: C functions that numba compiles, on the threads of torch's OpenMP.

A kernel gets the address of one struct of int64 and float64 fields: a `Launch`, then the kernel's own
arguments. Its entry runs in the calling thread. For work that pays for threads it has OpenMP run a second C
function, the kernel's `work`, in a team, with `run_parallel`. torch's own operators use the same team, so
that no thread of another pool competes for the cores. A call costs about a microsecond; numba's own
dispatcher takes 70 for as many arguments.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from numba import types

from . import disk_cache
from .team import Launch

_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_TEAM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_SIGNATURE = types.int64(types.int64)
# The calls made while `tape.recorded` records them.
RECORDING: ContextVar[list[tuple[int, bytes]] | None] = ContextVar("RECORDING", default=None)


class Kernel:
    """Compile a kernel, or load it from the disk, and call it.

    Args:
        entry: function that takes the address of the arguments and returns a status, int64.
        work: function of one int64 that `run_parallel` runs in each thread; None for a kernel of one thread.
        arguments: NamedTuple class of the arguments, whose fields are int or float.
    """

    def __init__(
        self, entry: Callable[[int], int], work: Callable[[int], int] | None, arguments: type
    ) -> None:
        self._functions = [
            disk_cache.cfunc(f, _SIGNATURE, _version()) for f in (entry, work) if f is not None
        ]
        self.cache_hits = sum(function.cache_hits for function in self._functions)
        self._entry = self._functions[0].address or 0
        self._call = _ENTRY(self._entry)
        self._work = self._functions[-1].address
        hints = get_type_hints(arguments)
        self._pack = struct.Struct(
            f"={len(Launch._fields)}q" + "".join("d" if kind is float else "q" for kind in hints.values())
        ).pack

    def __call__(self, arguments: tuple[Any, ...]) -> int:
        """Run the kernel on as many threads as torch uses, and return its status."""
        packed = self._pack(_team(), self._work, torch.get_num_threads(), *arguments)
        if (recording := RECORDING.get()) is not None:
            recording.append((self._entry, packed))
        return self._call(packed)


@cache
def _version() -> str:
    """Return a digest of this package's sources, of which kernels are composed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _team() -> int:
    """Return the address of a function that runs another one in a team of threads.

    It is GOMP_parallel of the OpenMP library that torch has loaded, whatever its name: GNU's and LLVM's have
    it. Elsewhere it is `_pool`.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function: Any = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        function = _pool()
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def _pool() -> Any:
    """Return a function like GOMP_parallel over a pool of Python threads, whose calls release the GIL."""
    executors: dict[int, ThreadPoolExecutor] = {}
    lock = threading.Lock()

    def run(work: int, data: int, num_threads: int, flags: int) -> None:
        with lock:
            executor = executors.setdefault(num_threads, ThreadPoolExecutor(max(num_threads - 1, 1)))
        others = [executor.submit(_WORK(work), data) for _ in range(num_threads - 1)]
        _WORK(work)(data)
        for other in others:
            other.result()

    return _TEAM(run)
