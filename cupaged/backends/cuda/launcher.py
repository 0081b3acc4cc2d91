"""Launch kernels through CuPy's thin wrapper of the driver, on torch's current stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch

from . import compile as kernel_compiler
from . import specs as kernel_specs
from .kernels import Kernels
from .plans import KernelCall, Number
from .specs import KernelSpec


def backend(arch: str | None = None) -> Kernels:
    """Return the CUDA backend.

    Args:
        arch: what kernels are chosen and compiled for, by default the device's own. "90" leaves out what only
            "90a" has.

    Raises:
        ImportError: CuPy is missing; the message names the package.
    """
    return Kernels(CupyLauncher(arch))


class CupyLauncher:
    """Compile and load a kernel when it is first prepared on a device, and launch it.

    Tensors are passed as their addresses: a DLPack capsule for each would cost more than the launch. So would
    `cupy.RawKernel`, which makes an object of each argument and of the stream at every launch.
    """

    def __init__(self, arch: str | None = None) -> None:
        self._chosen_arch = arch
        self._cuda = kernel_compiler.import_cupy().cuda
        self._functions: dict[tuple[KernelSpec, int], int] = {}  # the driver's handles
        self._lock = threading.Lock()

    def sm_count(self, device: torch.device) -> int:
        return _sm_count(device)

    def arch(self, device: torch.device) -> str:
        return self._chosen_arch or _arch(device.index)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def reaches(self, tensor: torch.Tensor, device: torch.device) -> bool:
        return tensor.device == device or (tensor.is_cpu and tensor.is_pinned())

    def upload(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        # torch keeps the pinned memory until the copy from it is over.
        return tensor.pin_memory().to(device, non_blocking=True)

    def prepare(self, call: KernelCall, device: torch.device) -> PreparedLaunch:
        spec, index = call.spec, device.index
        function = self._functions.get((spec, index)) or self._load(spec, index)
        shape = (*call.grid, 1, spec.threads, 1, 1, spec.dynamic_shared_memory)
        driver, runtime = self._cuda.driver, self._cuda.runtime
        launch = partial(driver.launchKernel, function, *shape)
        return PreparedLaunch(launch, partial(runtime.setDevice, index), call.numbers, index)

    def _load(self, spec: KernelSpec, index: int) -> int:
        """The kernel in the device's context. Modules are never unloaded."""
        driver, arch = self._cuda.driver, self._chosen_arch or _arch(index)
        with self._lock, torch.cuda.device(index):
            if (spec, index) not in self._functions:
                self._cuda.runtime.setDevice(index)
                module = driver.moduleLoadData(kernel_compiler.cubin(spec, arch).content)
                function = driver.moduleGetFunction(module, spec.entry)
                if spec.dynamic_shared_memory > kernel_specs.STATIC_SHARED_MEMORY:
                    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.funcSetAttribute(function, attribute, spec.dynamic_shared_memory)
                self._functions[spec, index] = function
            return self._functions[spec, index]


class PreparedLaunch:
    """A kernel with all its arguments in place but the addresses.

    Args:
        launch: `cupy.cuda.driver.launchKernel` with all that comes before the stream.
        set_device: makes the device's context the thread's own, which the driver takes for granted.
        numbers: the arguments after the pointers.
        index: of the device.
    """

    def __init__(self, launch: Any, set_device: Any, numbers: Sequence[Number], index: int) -> None:
        self._launch, self._set_device = launch, set_device
        self._numbers, self._index = numbers, index
        self._arguments: ctypes.Array[ctypes.c_uint64] | None = None
        self._lock = threading.Lock()  # of the arguments, which the driver copies before it returns

    def __call__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        index = self._index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                self(tensors)
            return
        self._set_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        with self._lock:
            if self._arguments is None:
                self._arguments = self._allocate(len(pointers))
            self._pack(self._arguments, 0, *pointers)
            self._launch(stream, self._addresses, 0)

    def _allocate(self, num_pointers: int) -> ctypes.Array[ctypes.c_uint64]:
        """Eight bytes an argument, then the address of each, which is what the driver takes."""
        count = num_pointers + len(self._numbers)
        arguments = (ctypes.c_uint64 * (2 * count))()
        address = ctypes.addressof(arguments)
        for i, number in enumerate(self._numbers, num_pointers):
            ctypes.memmove(address + 8 * i, number.tobytes(), number.itemsize)
        for i in range(count):
            arguments[count + i] = address + 8 * i
        self._pack = struct.Struct(f"={num_pointers}Q").pack_into
        self._addresses = address + 8 * count
        return arguments


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _arch(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return kernel_compiler.arch_for_capability(major, minor, kernel_compiler.nvrtc_archs())
