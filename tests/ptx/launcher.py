"""`backend()` has the functions of the CUDA backend over interpreted PTX.

The emulation in `tests/cuda_host` runs the sources as g++ understands them, with C++ in the place of a GPU's
instructions. This runs what NVRTC makes of them: the inline assembly, the branches, the layout of shared
memory, the widths of the arguments.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch

from cupaged.backends.cuda import compile as kernel_compiler
from cupaged.backends.cuda.kernels import Kernels, Launch
from cupaged.backends.cuda.specs import KernelCall, KernelSpec
from tests.cpu_launcher import CpuLauncher

from .machine import Machine
from .memory import GlobalMemory
from .program import parse
from .traffic import Traffic


@cache
def ptx(spec: KernelSpec, arch: str) -> str:
    """What NVRTC makes of the kernel."""
    kernel_compiler.import_cupy()
    from cupy.cuda import nvrtc

    directory = kernel_compiler.cuda_dir()
    path = directory / spec.source
    options = (
        *(option for option in kernel_compiler.OPTIONS if "ptxas" not in option),
        "--generate-line-info",
        f"--gpu-architecture=compute_{arch}",
        f"-I{directory}",
        f"-I{kernel_compiler.toolkit_include_dir()}",
        *(f"-D{name}={value}" for name, value in spec.macros),
    )
    program = nvrtc.createProgram(path.read_text(encoding="utf-8"), str(path), (), ())
    try:
        nvrtc.compileProgram(program, options)
        text = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    return text if isinstance(text, str) else text.decode()


@lru_cache(16)
def _machine(text: str) -> Machine:
    return Machine(parse(text))


class PtxLauncher(CpuLauncher):
    """The `Launcher` for CPU tensors.

    Args:
        seed: of what PTX leaves open; each launch draws from it.
        arch: of the GPU that it stands for.
        change: of the text, to plant a fault.

    Attributes:
        traffic: by entry point, for what is launched while this is no longer None.
    """

    def __init__(self, seed: int, arch: str, change: Callable[[str], str] = lambda text: text) -> None:
        super().__init__(arch, sm_count=2)
        self._random, self._change = random.Random(seed), change
        self.traffic: dict[str, Traffic] | None = None

    def prepare(self, call: KernelCall, device: torch.device) -> Launch:
        def launch(tensors: Sequence[torch.Tensor | None]) -> None:
            spec = call.spec
            machine = _machine(self._change(ptx(spec, self._arch)))
            memory = GlobalMemory([tensor for tensor in tensors if tensor is not None])
            addresses = (0 if tensor is None else memory.address(tensor) for tensor in tensors)
            arguments = call.arguments.copy().point_to(addresses)
            machine.launch(
                call.grid,
                spec.threads,
                spec.dynamic_shared_memory,
                bytes(arguments),
                memory.space,
                self._random,
                None if self.traffic is None else self.traffic.setdefault(spec.entry, Traffic()),
            )
            memory.copy_back()

        return launch


def backend(seed: int, arch: str, change: Callable[[str], str] = lambda text: text) -> Kernels:
    """The functions of the CUDA backend over interpreted PTX."""
    return Kernels(PtxLauncher(seed, arch, change))
