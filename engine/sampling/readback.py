"""Copy tensors to the host, all at once, without waiting for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Readback:
    """Start one copy of tensors to the host.

    Args:
        tensors: tensors on one device, in whose stream they are computed. Those on a CPU are not copied.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            packed = pack(tensors)
            self._host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()
            # That of the tensors' device, which need not be the current one.
            self._event.record(torch.cuda.current_stream(packed.device))

    def wait(self) -> list[torch.Tensor]:
        """Wait for the copy and return the tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._tensors = unpack(self._host, self._tensors)
            self._event = None
        return self._tensors


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the bytes of tensors in one tensor."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpack(packed: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors as those that were packed, from the bytes."""
    parts = packed.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    # A copy, as the place of a part need not be a multiple of the size of its elements.
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]
