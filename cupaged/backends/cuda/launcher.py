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
from .arguments import KernelArguments
from .kernels import Kernels
from .raw import load
from .specs import KernelCall, KernelSpec


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

    A launch writes the tensors' addresses into a struct that is there already and calls the driver: a DLPack
    capsule for each would cost more than the launch, and so would to call the `cupy.RawKernel`.
    """

    def __init__(self, arch: str | None = None) -> None:
        self._chosen_arch = arch
        self._cuda = kernel_compiler.import_cupy().cuda
        self._functions: dict[tuple[KernelSpec, int], int] = {}  # the driver's handles, by device
        self._kernels: list[Any] = []  # whose they are: cupy.RawKernel
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
        return PreparedLaunch(launch, partial(runtime.setDevice, index), call.arguments, index)

    def _load(self, spec: KernelSpec, index: int) -> int:
        """Load the kernel in the device's context, for as long as this lives. Return the driver's handle."""
        with self._lock, torch.cuda.device(index):
            if (spec, index) not in self._functions:
                self._cuda.runtime.setDevice(index)
                kernel = load(spec, self._chosen_arch or _arch(index))
                self._kernels.append(kernel)
                self._functions[spec, index] = int(kernel.kernel.ptr)
            return self._functions[spec, index]


class PreparedLaunch:
    """A kernel with all its arguments in place but the addresses.

    Args:
        launch: `cupy.cuda.driver.launchKernel` with all that comes before the stream.
        set_device: makes the device's context the thread's own, which the driver takes for granted.
        arguments: but for the pointers.
        index: of the device.
    """

    def __init__(self, launch: Any, set_device: Any, arguments: KernelArguments, index: int) -> None:
        self._launch, self._set_device, self._index = launch, set_device, index
        self._arguments = arguments.copy()
        self._pack = struct.Struct(f"={len(arguments.pointers())}Q").pack_into  # which come first
        # The driver takes the address of each parameter, of which there is one.
        self._parameters = ctypes.c_void_p(ctypes.addressof(self._arguments))
        self._parameters_address = ctypes.addressof(self._parameters)
        self._lock = threading.Lock()  # of the arguments, which the driver copies before it returns

    def __call__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        index = self._index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                self(tensors)
            return
        self._set_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        with self._lock:
            self._pack(self._arguments, 0, *addresses)
            self._launch(stream, self._parameters_address, 0)


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _arch(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return kernel_compiler.arch_for_capability(major, minor, kernel_compiler.nvrtc_archs())
