"""Hold the group of processes among which a model is divided."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .packet import HEADER_BYTES, payload_bytes

_AT_ONCE = 1 << 16  # bytes of a buffer that are sent with its header; the rest follows
START = timedelta(minutes=10)  # for the processes to start and to find each other
_FOREVER = timedelta(days=365)  # an idle rank waits for the next step


class RankError(RuntimeError):
    """Say that a rank has died, hangs or disagrees. The others cannot go on without it."""


class Ranks:
    """Exchange tensors and buffers with the other ranks.

    What the model computes is moved by the device's backend: NCCL on GPUs, gloo on a CPU. What the hosts say
    to each other goes over gloo.

    Args:
        store: where the ranks find each other.
        rank: number of this process.
        size: number of all.
        device: this rank's device.
        timeout: seconds after which an operation of the model fails because a rank hangs.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, timeout: float) -> None:
        if dist.is_initialized():
            raise RuntimeError(
                "this process is in a group of torch.distributed already, such as that of another LLM with "
                "tensor parallelism: close that one first"
            )
        self.rank, self.size, self.device = rank, size, device
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=START)
        self._devices = dist.new_group(timeout=timedelta(seconds=timeout))
        self._hosts = dist.new_group(backend="gloo", timeout=_FOREVER)

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the ranks, in place, and return it."""
        dist.all_reduce(tensor, group=self._devices)
        return tensor

    def join_columns(self, tensor: torch.Tensor, num_columns: int) -> torch.Tensor:
        """Return the ``[..., num_columns]`` of which each rank has consecutive columns."""
        width = -(-num_columns // self.size)
        if tensor.shape[-1] < width:
            tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
        shape = tensor.shape[:-1]
        rows = tensor.reshape(-1, width).contiguous()
        parts = rows.new_empty((self.size, len(rows), width))
        dist.all_gather(list(parts), rows, group=self._devices)
        joined = parts.transpose(0, 1).reshape(len(rows), -1)
        return joined[:, :num_columns].reshape(*shape, num_columns)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy rank 0's tensor over that of each other rank, from device to device."""
        dist.broadcast(tensor, 0, group=self._devices)
        return tensor

    def send(self, buffer: bytes) -> None:
        """Send a buffer with a header from rank 0 to the others: at once, if it is not long."""
        if len(buffer) < _AT_ONCE:
            buffer = buffer.ljust(_AT_ONCE, b"\0")
        data = torch.frombuffer(bytearray(buffer), dtype=torch.uint8)
        dist.broadcast(data[:_AT_ONCE], 0, group=self._hosts)
        if len(data) > _AT_ONCE:
            dist.broadcast(data[_AT_ONCE:], 0, group=self._hosts)

    def receive(self) -> bytes:
        """Wait for the next buffer of rank 0."""
        first = torch.empty(_AT_ONCE, dtype=torch.uint8)
        dist.broadcast(first, 0, group=self._hosts)
        buffer = first.numpy().tobytes()
        left = HEADER_BYTES + payload_bytes(buffer) - _AT_ONCE
        if left <= 0:
            return buffer
        rest = torch.empty(left, dtype=torch.uint8)
        dist.broadcast(rest, 0, group=self._hosts)
        return buffer + rest.numpy().tobytes()

    def wait(self) -> None:
        """Wait until all ranks are here, however long their models take to load."""
        dist.barrier(group=self._hosts)

    def smallest(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._hosts)
        return int(tensor)

    def check_agreement(self, facts: dict[str, str]) -> None:
        """Check that what the ranks have found out when they loaded the model is the same.

        Raises:
            RankError: it is not.
        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, facts, group=self._hosts)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other[name] != value:
                    raise RankError(f"{name} is {value} on rank 0 and {other[name]} on rank {rank}")
