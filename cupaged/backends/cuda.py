"""The kernels in `cuda/`: which one to launch, on what grid, with which arguments.

`Kernels` decides all that from shapes alone and hands it to a `Launcher`. Here that is `CupyLauncher`; the
tests have another, which runs the same sources on the CPU. Nothing on the way waits for the GPU, reads its
memory or allocates outside torch's allocator, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from .. import compile as kernel_compiler
from ..compile import KernelSpec

Dim3 = tuple[int, int, int]
# A tensor stands for its address, None for a null pointer; numbers carry their width.
Argument = torch.Tensor | np.int32 | np.int64 | np.float32 | None

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Launcher(Protocol):
    """Runs a kernel. All tensors of a launch are on one device."""

    def launch(
        self, spec: KernelSpec, grid: Dim3, block: Dim3, smem_bytes: int, args: Sequence[Argument]
    ) -> None:
        """Run ``spec.entry`` on the current stream.

        Args:
            smem_bytes: dynamic shared memory of a block.
            args: the entry point's parameters in order.
        """

    def sm_count(self, device: torch.device) -> int:
        """Streaming multiprocessors of the device."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Workspace that lives at least until what is launched now has run."""


class Kernels:
    """The backend's functions over a launcher."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def reshape_and_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        _require_aligned_cache(kv_cache)
        num_tokens, num_kv_heads, head_size = key.shape
        self._launcher.launch(
            kernel_compiler.spec_reshape_and_cache(DTYPE_NAMES[key.dtype]),
            (num_tokens, 1, 1),
            (128, 1, 1),
            0,
            (
                key,
                value,
                kv_cache,
                slot_mapping,
                np.int64(key.stride(0)),
                np.int64(key.stride(1)),
                np.int64(value.stride(0)),
                np.int64(value.stride(1)),
                np.int64(kv_cache.stride(0)),
                np.int32(num_kv_heads),
                np.int32(head_size),
                np.int32(_block_shift(kv_cache)),
                np.int32(_rows_aligned(key) and _rows_aligned(value)),
            ),
        )

    def copy_blocks(self, kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
        block_bytes = kv_cache.shape[1:].numel() * kv_cache.element_size()
        stride_bytes = kv_cache.stride(0) * kv_cache.element_size()
        aligned = (block_bytes | stride_bytes | kv_cache.data_ptr()) % 16 == 0
        unit_bytes = 16 if aligned else 1
        units = block_bytes // unit_bytes
        threads = 256
        # A few units a thread keep enough loads in flight; large blocks are shared by several CUDA blocks.
        self._launcher.launch(
            kernel_compiler.spec_copy_blocks(unit_bytes),
            (block_mapping.shape[0], min(64, _ceil_div(units, 4 * threads)), 1),
            (threads, 1, 1),
            0,
            (kv_cache, block_mapping, np.int64(stride_bytes // unit_bytes), np.int64(units)),
        )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _block_shift(kv_cache: torch.Tensor) -> int:
    return kv_cache.shape[3].bit_length() - 1


def _rows_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row [token, head] starts at a multiple of 16 bytes."""
    strides = tensor.stride(0) | tensor.stride(1)
    return tensor.data_ptr() % 16 == 0 and strides * tensor.element_size() % 16 == 0


def _require_aligned_cache(kv_cache: torch.Tensor) -> None:
    stride_bytes = kv_cache.stride(0) * kv_cache.element_size()
    if kv_cache.data_ptr() % 16 or (kv_cache.shape[0] > 1 and stride_bytes % 16):
        raise ValueError(
            "kv_cache must start at a multiple of 16 bytes and have a block stride that is one, got address "
            f"{kv_cache.data_ptr():#x} and a stride of {stride_bytes} bytes; allocate it with torch.empty"
        )
