"""Hold the group of processes among which a model is divided."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Ranks:
    """Exchange tensors with the other ranks.

    The device's backend moves what the model computes: NCCL on GPUs, gloo on a CPU. What the host sends to
    the other hosts goes over gloo.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def join_columns(self, tensor: torch.Tensor, num_columns: int) -> torch.Tensor:
        width = -(-num_columns // self.size)
        if tensor.shape[-1] < width:
            tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
        shape = tensor.shape[:-1]
        rows = tensor.reshape(-1, width).contiguous()
        parts = rows.new_empty((self.size * len(rows), width))
        dist.all_gather_into_tensor(parts, rows)
        joined = parts.view(self.size, len(rows), width).transpose(0, 1).reshape(len(rows), -1)
        return joined[:, :num_columns].view(*shape, num_columns)
