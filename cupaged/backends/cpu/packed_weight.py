"""Pack the weights of a linear layer, and multiply with them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from . import formats, ir, launch, linear

_DTYPES = {torch.float32: np.dtype(np.float32), torch.bfloat16: formats.BFLOAT16}


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether the kernel takes this weight, and on this CPU is no slower than torch.

    Elsewhere than on x86 torch has libraries of the CPU's maker, and in bfloat16 matrix units (AMX).
    """
    is_even = weight.dtype != torch.bfloat16 or (weight.shape[-1] % 2 == 0 and not _has_matrix_units())
    return (
        weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and weight.dim() == 2
        and weight.numel() > 0
        and is_even
        and ir.HAS_FMA
    )


def _has_matrix_units() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and probe()


@cache
def _kernel(dtype: torch.dtype) -> launch.Kernel:
    entry, work = linear.build(_DTYPES[dtype], dtype.itemsize)
    return launch.Kernel(entry, work, linear.Linear)


class PackedWeight:
    """Hold a copy of a linear layer's weight in the kernel's layout.

    Args:
        weight: [outputs, inputs], float32 or bfloat16, on the CPU, for which `can_pack` is true.
        bias: [outputs] in the same dtype, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        outputs, inputs = weight.shape
        self.shape, self.dtype = weight.shape, weight.dtype
        panels = -(-outputs // linear.PANEL)
        per_step = 4 // weight.dtype.itemsize
        self._steps = inputs // per_step
        # Filled panel by panel: nothing else of the weight's size is needed.
        self._packed = torch.zeros(panels, self._steps, linear.PANEL, per_step, dtype=weight.dtype)
        for panel, rows in enumerate(weight.detach().split(linear.PANEL)):
            self._packed[panel, :, : len(rows)] = rows.reshape(len(rows), -1, per_step).transpose(0, 1)
        self.bias = None if bias is None else bias.detach()
        self._bias = torch.zeros(panels * linear.PANEL)
        if bias is not None:
            self._bias[:outputs] = bias.detach()

    def unpack(self) -> torch.Tensor:
        """Return the weight [outputs, inputs], a copy."""
        return self._packed.transpose(1, 2).reshape(-1, self.shape[1])[: self.shape[0]]

    def multiply(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ weight.T + bias, summed in float32 and rounded once.

        The bits of a row do not depend on the other rows, nor on the number of threads.

        Args:
            x: [..., inputs] in the weight's dtype.
            out: [..., outputs], contiguous, to write into, in the same dtype; returned.
        """
        outputs, inputs = self.shape
        if out is None:
            out = x.new_empty((*x.shape[:-1], outputs))
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.reshape(-1, inputs).contiguous()
        rows, size = x.shape[0], x.element_size()
        if rows:
            _kernel(self.dtype)(
                (
                    x.data_ptr(),
                    x.stride(0) * size,
                    self._packed.data_ptr(),
                    self._bias.data_ptr(),
                    out.data_ptr(),
                    outputs * size,
                    rows,
                    self._steps,
                    outputs,
                )
            )
        return out
