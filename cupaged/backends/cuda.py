"""The CUDA backend: `Kernels` launched through CuPy on torch's current stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from .. import compile as kernel_compiler
from ..compile import KernelSpec
from .kernels import Argument, Dim3, Kernels


def backend() -> Kernels:
    """The backend's functions.

    Raises:
        ImportError: CuPy is missing; the message names the package.
    """
    return Kernels(CupyLauncher())


class CupyLauncher:
    """Compiles a kernel at its first launch on a device, loads it, and launches it.

    Tensors are passed as their addresses: a DLPack capsule for each would cost more than the launch.
    """

    def __init__(self) -> None:
        self._cupy = kernel_compiler.import_cupy()
        self._functions: dict[tuple[KernelSpec, int], Any] = {}
        self._lock = threading.Lock()

    def sm_count(self, device: torch.device) -> int:
        return _sm_count(device)

    def arch(self, device: torch.device) -> str:
        return _arch(device.index if device.index is not None else torch.cuda.current_device())

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def launch(
        self, spec: KernelSpec, grid: Dim3, block: Dim3, smem_bytes: int, args: Sequence[Argument]
    ) -> None:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device(device):
            index = torch.cuda.current_device()
            function = self._functions.get((spec, index)) or self._load(spec, index, smem_bytes)
            stream = _TorchStream(torch.cuda.current_stream().cuda_stream)
            with self._cupy.cuda.Stream.from_external(stream):
                function(grid, block, tuple(map(_pass, args)), shared_mem=smem_bytes)

    def _load(self, spec: KernelSpec, index: int, smem_bytes: int) -> Any:
        with self._lock:
            if (spec, index) not in self._functions:
                compiled = kernel_compiler.cubin(spec, _arch(index))
                function = self._cupy.RawModule(path=str(compiled.path)).get_function(spec.entry)
                if smem_bytes > kernel_compiler.STATIC_SHARED_MEMORY:
                    function.max_dynamic_shared_size_bytes = smem_bytes
                self._functions[spec, index] = function
            return self._functions[spec, index]


class _TorchStream:
    """A stream by the CUDA stream protocol, which torch's own streams do not follow in every version."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def _pass(arg: Argument) -> np.generic:
    if isinstance(arg, torch.Tensor):
        return np.uint64(arg.data_ptr())
    return np.uint64(0) if arg is None else arg


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _arch(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return kernel_compiler.arch_for_capability(major, minor, kernel_compiler.nvrtc_archs())
