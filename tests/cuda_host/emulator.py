"""Run the CUDA kernels on the CPU: `backend()` has the backend functions, over emulated kernels.

A kernel's source is compiled as it is by g++ with the headers in `include/`, and `runtime.cpp` runs its
threads as fibers. What it and its parts check is told there; this file adds out-of-bounds checks: in a launch
every tensor lies in memory of its own that ends, or starts, at an inaccessible page.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cupaged.backends.cuda.arguments import FLOAT, INT32, INT64, POINTER, KernelArguments
from cupaged.backends.cuda.kernels import Kernels, Launch
from cupaged.backends.cuda.specs import STATIC_SHARED_MEMORY, KernelCall, KernelSpec
from tests.cpu_launcher import CpuLauncher

from .build import Module, load, runtime
from .guarded import GuardedMemory

Dim3 = tuple[int, int, int]
Number = np.int32 | np.int64 | np.float32  # carries its width
Argument = torch.Tensor | Number | None
KINDS = {POINTER: "p", INT32: "i", INT64: "i", FLOAT: "f"}
NUMBERS = {INT32: np.int32, INT64: np.int64, FLOAT: np.float32}
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED_MEMORY = 227 * 1024


class EmulationError(RuntimeError):
    """A kernel did what CUDA does not define, or a launch that CUDA refuses."""


class HostLauncher(CpuLauncher):
    """The `Launcher` for CPU tensors.

    Args:
        seed: of the order of threads and of which end of a tensor is guarded; each launch draws from it.
        sources: the kernels' directory, `cuda/` by default.
        time_limit_s: CPU seconds after which a launch is taken to hang.
        arch: of the GPU that it stands for, which decides what kernels are chosen.
    """

    def __init__(
        self, seed: int, sources: Path | None = None, time_limit_s: float = 120.0, arch: str = "90a"
    ) -> None:
        super().__init__(arch, sm_count=4)
        self._random = random.Random(seed)
        self._sources = sources
        self._time_limit_s = time_limit_s
        self._modules: dict[KernelSpec, Module] = {}
        self._lock = threading.Lock()

    def prepare(self, call: KernelCall, device: torch.device) -> Launch:
        def launch(tensors: Sequence[torch.Tensor | None]) -> None:
            _check_layout(spec, self._load(spec), type(call.arguments))
            self.launch(spec, *shape, (*tensors, *_numbers(call.arguments)))

        spec = call.spec
        shape = (*call.grid, 1), (spec.threads, 1, 1), spec.dynamic_shared_memory
        return launch

    def launch(
        self, spec: KernelSpec, grid: Dim3, block: Dim3, smem_bytes: int, args: Sequence[Argument]
    ) -> None:
        """Run the kernel to its end.

        Args:
            args: the parameters, or the fields of the struct that is the only one.

        Raises:
            EmulationError: naming the kernel, the block, the thread, and what it did.
        """
        module = self._load(spec)
        with self._lock:  # the runtime emulates one launch at a time
            self._run(spec, module, grid, block, smem_bytes, args)

    def _load(self, spec: KernelSpec) -> Module:
        with self._lock:
            if spec not in self._modules:
                self._modules[spec] = load(spec, self._sources)
            return self._modules[spec]

    def _run(
        self,
        spec: KernelSpec,
        module: Module,
        grid: Dim3,
        block: Dim3,
        smem_bytes: int,
        args: Sequence[Argument],
    ) -> None:
        _check_launch(spec, module, grid, block, smem_bytes)
        _check_arguments(spec, module, args)
        seed = self._random.getrandbits(63)
        constants: dict[int, bool] = {}
        for arg, place in zip(args, module.arguments):
            if isinstance(arg, torch.Tensor):  # one that is given twice is written if either may be
                constants[id(arg)] = constants.get(id(arg), True) and place.kind == "c"
        with GuardedMemory([a for a in args if isinstance(a, torch.Tensor)], constants, seed) as memory:
            values = _parameters(module, [_value(arg, memory) for arg in args])
            addresses = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
            error = ctypes.create_string_buffer(2048)
            done = runtime().cupaged_host_launch(
                ctypes.c_void_p(module.kernel),
                str(spec).encode(),
                addresses,
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.c_size_t(smem_bytes),
                ctypes.c_uint64(seed),
                ctypes.c_double(self._time_limit_s),
                error,
                ctypes.c_size_t(len(error)),
            )
            problem = error.value.decode() if not done else memory.problem(str(spec))
        if problem:
            raise EmulationError(problem)


def _check_launch(spec: KernelSpec, module: Module, grid: Dim3, block: Dim3, smem_bytes: int) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise EmulationError(f"{spec}: {what}")

    for size, most in zip(grid, MAX_GRID):
        require(1 <= size <= most, f"the grid is {grid}, it must be 1 to {MAX_GRID}")
    for size, most in zip(block, MAX_BLOCK):
        require(1 <= size <= most, f"the block is {block}, it must be 1 to {MAX_BLOCK}")
    threads = block[0] * block[1] * block[2]
    require(threads <= module.max_threads, f"a block of {threads} threads, its bound is {module.max_threads}")
    require(
        module.static_shared <= STATIC_SHARED_MEMORY,
        f"{module.static_shared} bytes of static shared memory, {STATIC_SHARED_MEMORY} are possible",
    )
    total = module.static_shared + smem_bytes
    require(
        total <= MAX_SHARED_MEMORY,
        f"{total} bytes of shared memory, {MAX_SHARED_MEMORY} are possible",
    )


def _check_arguments(spec: KernelSpec, module: Module, args: Sequence[Argument]) -> None:
    """The numbers and their widths must be those that the kernel takes."""
    if len(args) != len(module.arguments):
        raise EmulationError(f"{spec} has {len(module.arguments)} parameters, {len(args)} were given")
    for i, (arg, place) in enumerate(zip(args, module.arguments)):
        if arg is None or isinstance(arg, torch.Tensor):
            fits = place.kind in "pc"
        else:
            fits = place.size == arg.itemsize and place.kind == ("f" if isinstance(arg, np.floating) else "i")
        if not fits:
            raise EmulationError(
                f"{spec}: parameter {i} is of kind {place.kind}, {place.size} bytes, got {arg!r:.80}"
            )


def _check_layout(spec: KernelSpec, module: Module, arguments: type[KernelArguments]) -> None:
    """The struct in Python must be the kernel's."""
    if ctypes.sizeof(arguments) != module.struct_size:
        raise EmulationError(
            f"{spec} takes {module.struct_size} bytes, {arguments.__name__} has {ctypes.sizeof(arguments)}"
        )
    for (name, kind), place in zip(arguments._fields_, module.arguments, strict=True):
        field = getattr(arguments, name)
        if (field.offset, field.size) != (place.offset, place.size) or KINDS[kind] != place.kind.replace(
            "c", "p"
        ):
            raise EmulationError(
                f"{spec} has {name} at {place.offset}, {place.size} bytes of kind {place.kind}, "
                f"{arguments.__name__} at {field.offset}, {field.size} bytes of kind {KINDS[kind]}"
            )


def _numbers(arguments: KernelArguments) -> list[Number]:
    """The fields that are no pointers, as they are in memory."""
    content = bytes(arguments)
    return [
        np.frombuffer(content, NUMBERS[kind], 1, getattr(type(arguments), name).offset)[0]
        for name, kind in arguments._fields_
        if kind is not POINTER
    ]


def _parameters(module: Module, values: list[ctypes.Array | ctypes.c_void_p]) -> list[Any]:
    """Return what the driver would take the addresses of: the values, or the struct that they are in."""
    if not module.struct_size:
        return values
    whole = (ctypes.c_char * module.struct_size)()
    for value, place in zip(values, module.arguments):
        ctypes.memmove(ctypes.addressof(whole) + place.offset, ctypes.addressof(value), place.size)
    return [whole]


def _value(arg: Argument, memory: GuardedMemory) -> ctypes.Array | ctypes.c_void_p:
    if arg is None:
        return ctypes.c_void_p(0)
    if isinstance(arg, torch.Tensor):
        return ctypes.c_void_p(memory.address(arg))
    return (ctypes.c_char * arg.itemsize).from_buffer_copy(arg.tobytes())


def backend(seed: int, arch: str = "90a") -> Kernels:
    """The functions of the CUDA backend over the emulation."""
    return Kernels(HostLauncher(seed, arch=arch))
