"""What the launchers that run kernels on the CPU have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class CpuLauncher:
    """A `Launcher` for CPU tensors, but for `prepare`.

    Args:
        arch: of the GPU that it stands for, which decides what kernels are chosen.
        sm_count: of that GPU. Few, so that the blocks of a launch are few and each has several items.
    """

    def __init__(self, arch: str, sm_count: int) -> None:
        self._arch, self._sm_count = arch, sm_count

    def sm_count(self, device: torch.device) -> int:
        return self._sm_count

    def arch(self, device: torch.device) -> str:
        return self._arch

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Filled with 0xFF: NaN, or -1."""
        result = torch.empty(tuple(shape), dtype=dtype, device=device)
        result.view(-1).view(torch.uint8).fill_(0xFF)
        return result

    def reaches(self, tensor: torch.Tensor, device: torch.device) -> bool:
        return True

    def upload(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.clone()
