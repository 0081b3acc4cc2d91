"""Keep the inputs of decode steps where graphs read them, and bring those of a step there in one copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..transfer import Packing, Staging
from .step_inputs import StepInputs

_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)


class DecodeTensors(NamedTuple):
    """Hold the inputs of a decode step on the device: S sequences of one token, block tables of W columns."""

    token_ids: torch.Tensor  # int64 [S]; -1 - i stands for token i that the step before has sampled
    positions: torch.Tensor  # int64 [S]
    slots: torch.Tensor  # int64 [S]
    seq_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, W]


class _Size:
    """Hold the places of a bucket's inputs, in both staging buffers and on the device."""

    def __init__(self, num_seqs: int, width: int, memory: torch.Tensor, staging: Staging) -> None:
        packing = _packing(num_seqs, width)
        self.num_seqs, self.width, self.num_bytes = num_seqs, width, packing.num_bytes
        self.tensors = DecodeTensors(*packing.tensors(memory))
        self.staged = [packing.arrays(buffer) for buffer in staging.buffers]


class DecodeBuffers:
    """Hold memory for the inputs of decode steps.

    The inputs of a bucket lie one after the other, and those of all buckets in the same memory, so that a
    step is one copy of no more than it needs. The whole block tables are among them: 256 sequences of 2,000
    tokens have 128 KiB, which a GPU's link moves in some microseconds. To send what has changed would need a
    kernel that spreads it, and a record of which row of the batch had which sequence.

    Args:
        max_num_seqs: maximum number of sequences of a step.
        max_width: maximum number of columns of its block tables.

    Attributes:
        memory: holds the inputs.
        sampled: int64 [max_num_seqs], the tokens that the step before has sampled.
    """

    def __init__(self, max_num_seqs: int, max_width: int, device: torch.device) -> None:
        num_bytes = _packing(max_num_seqs, max_width).num_bytes
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._staging = Staging(self.memory)
        self._sizes: dict[tuple[int, int], _Size] = {}

    def tensors(self, num_seqs: int, width: int) -> DecodeTensors:
        """Return the inputs of steps of a size, which are always in the same place."""
        return self._size(num_seqs, width).tensors

    def fill(self, num_seqs: int, width: int, inputs: StepInputs) -> None:
        """Copy the inputs of a step to the device, padded to a size.

        Raises:
            ValueError: the step is larger.
        """
        size = self._size(num_seqs, width)
        count, columns = inputs.block_tables.shape
        if count > num_seqs or columns > width:
            raise ValueError(
                f"a step of {count} sequences with block tables of {columns} columns does not fit into "
                f"one of {num_seqs} with {width}; please report this"
            )
        token_ids, positions, slots, seq_lens, block_tables = size.staged[self._staging.begin()]
        token_ids[:count], token_ids[count:] = inputs.token_ids, 0
        positions[:count], positions[count:] = inputs.positions, 0
        slots[:count], slots[count:] = inputs.slots, -1
        seq_lens[:count], seq_lens[count:] = inputs.seq_lens, 0
        block_tables[:count, :columns] = inputs.block_tables  # what else is there is not read
        self._staging.send(size.num_bytes)

    def _size(self, num_seqs: int, width: int) -> _Size:
        size = self._sizes.get((num_seqs, width))
        if size is None:
            size = self._sizes[num_seqs, width] = _Size(num_seqs, width, self.memory, self._staging)
        return size


def _packing(num_seqs: int, width: int) -> Packing:
    row = (num_seqs,)
    return Packing([(_INT64, row), (_INT64, row), (_INT64, row), (_INT32, row), (_INT32, (num_seqs, width))])
